"""Groups that end and begin again in one process, and checkpoints that other numbers of ranks read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.multirank import run_ranks
from tests.test_agreement import MoE
from ultraep_compile.ops import plane


class Modules(nn.Module):
    """Experts that are modules, which `shard_experts` gives to one rank each."""

    def __init__(self, experts: int = 6):
        super().__init__()
        self.gate = nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, choice, None])
        return x + out


OPTIONS = {"inner": "eager", "redundant_experts": 1, "deadline_s": 60}
SHARDED = {"stacked": MoE, "modules": Modules}


def _again(rank: int, world: int) -> None:
    """The default group, destroyed and made again."""
    dist.barrier()
    dist.destroy_process_group()
    _again.count = getattr(_again, "count", 0) + 1  # type: ignore[attr-defined]
    folder = Path(os.environ["AGAIN"])
    dist.init_process_group("gloo", f"file://{folder}/{_again.count}", rank=rank, world_size=world)  # type: ignore[attr-defined]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(16, 8)).square().mean()
    loss.backward()
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is not None and not hasattr(grad, "full_tensor"):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    optimizer.step()
    return loss.detach()


def _lives(rank: int, kind: str, transport: str) -> list[list[float]]:
    losses = []
    for lives in (1, 3):  # three steps in one life of the group, and in three
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, options = SHARDED[kind](), {**OPTIONS, "transport": transport}
        ultraep_compile.shard_experts(model, init_device_mesh("cpu", (2,)), (torch.randn(16, 8),))
        model.compile(backend="ultraep", options=options)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, foreach=False)
        losses.append([])
        for step in range(3):
            losses[-1].append(float(_step(model, optimizer, 10 * step + rank)))
            if lives > 1:
                _again(rank, 2)
    plane.close_planes_of_the_dead()
    assert not plane.planes()
    return losses


@pytest.mark.parametrize(
    "kind, transport", [("modules", "symmetric"), pytest.param("stacked", "collective", marks=pytest.mark.slow)]
)
def test_training_goes_on_after_the_group_was_made_again(kind: str, transport: str, monkeypatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("AGAIN", folder)
        for one, three in run_ranks(2, _lives, kind, transport):
            assert one == three and len(set(one)) == 3


def _meets(rank: int, world: int, kind: str, folder: str, before: str, after: str) -> list[Tensor]:
    """Load what other ranks saved, train a step on the same 12 rows, save; the whole state."""
    torch.manual_seed(0)
    model = MoE(12) if kind == "stacked" else Modules(12)
    ultraep_compile.shard_experts(model, init_device_mesh("cpu", (world,)), (torch.randn(16, 8),))
    model.compile(backend="ultraep", options={**OPTIONS, "inner": "eager"})
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, foreach=False)
    if before:
        state, held = get_state_dict(model, optimizer)
        dcp.load({"model": state, "optimizer": held}, checkpoint_id=f"{folder}/{before}")
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=held)
    torch.manual_seed(ord(after.rstrip('2')[-1]))
    rows = torch.randn(12, 8)[rank * 12 // world : (rank + 1) * 12 // world]
    loss = model(rows).square().mean()
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None and not hasattr(parameter.grad, "full_tensor"):
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
    optimizer.step()
    state, held = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": held}, checkpoint_id=f"{folder}/{after}")
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stacked", "modules"])
def test_checkpoints_are_read_by_other_numbers_of_ranks(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone, last = {}, ""
        for world, name in ((4, "a"), (2, "ab"), (3, "abc")):
            found = run_ranks(world, _meets, world, kind, folder, last, name)
            assert all(torch.equal(x, y) for other in found for x, y in zip(found[0], other, strict=True))
            alone[name], last = found[0], name
        last = ""
        for name in alone:  # the same three steps on as many ranks throughout
            (expected, *_), last = run_ranks(2, _meets, 2, kind, folder, f"{last}2" if last else "", f"{name}2"), name
            for got, want in zip(alone[name], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
