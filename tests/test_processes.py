"""Whole models over gloo processes with sharded experts, against one process without us."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests import zoo
from tests.balancing import backend, prepared, relative, step
from tests.multirank import run_ranks
from ultraep_compile import shard_experts
from ultraep_compile.report import collect_reports

WORLD = 4


def _full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _mean_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the mean of the ranks' losses: dense ones averaged, expert ones as they are."""
    out = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        if isinstance(p.grad, DTensor):
            out[name] = p.grad.full_tensor()
        else:
            grad = p.grad.clone()
            dist.all_reduce(grad)
            out[name] = grad / dist.get_world_size()
    return out


def _family(rank: int, ranks: int, family: str, compiled: bool, transport: str = "auto") -> dict:
    model, _ = prepared(
        family, "batched_mm", **({"output_router_logits": False} if family in ("mixtral", "qwen2_moe", "jamba", "gpt_oss") else {})
    )
    inputs = zoo.tokens(4, 16)
    single = copy.deepcopy(model)
    keys = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    shard_experts(model, init_device_mesh("cpu", (ranks,)))
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == keys
    for name, value in single.state_dict().items():
        assert torch.equal(_full(model.state_dict()[name]), value)
    held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    whole = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
    assert held * ranks == whole > 0
    if compiled:
        model.compile(backend=backend(transport=transport))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-6, foreach=False) for m in (model, single)]
    rows = 4 // ranks
    mine = {k: v[rank * rows : (rank + 1) * rows] for k, v in inputs.items()}
    worst = 0.0
    for turn in range(3):
        with collect_reports() as collected:
            loss = step(model, model, mine).loss
        if compiled and turn == 0:
            sites = [s for g in collected.graphs for s in g.prepared.values()]
            assert sites and all(s.sharded and s.group for s in sites)
            assert not any("unshard" in g.graph_module.code for g in collected.graphs), "the gather must be gone"
        dist.all_reduce(loss)
        expected = step(single, single, inputs)
        worst = max(worst, relative(loss / ranks, expected.loss))
        grads = _mean_gradients(model)
        for name, grad in expected.grads.items():
            if grad.norm() > 1e-7:
                worst = max(worst, relative(grads[name], grad))
        for name, p in model.named_parameters():
            if p.grad is not None and not isinstance(p.grad, DTensor):
                p.grad = grads[name]
        for o in optimizers:
            o.step()
    after = max(
        relative(_full(a), b)
        for a, b in zip(model.state_dict().values(), single.state_dict().values(), strict=True)
        if b.is_floating_point()
    )
    return {"worst": worst, "after": after}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "mixtral" else pytest.mark.slow) for f in zoo.FAMILIES]
)
def test_sharded_family_trains_like_one_process(family: str) -> None:
    for result in run_ranks(WORLD, _family, WORLD, family, True):
        assert result["worst"] < 1e-4 and result["after"] < 1e-4, result


@pytest.mark.parametrize(
    "family, ranks", [("gpt_oss", 2), *(pytest.param(f, WORLD, marks=pytest.mark.slow) for f in zoo.FAMILIES)]
)
def test_sharded_family_over_symmetric_memory(family: str, ranks: int) -> None:
    for result in run_ranks(ranks, _family, ranks, family, True, "symmetric"):
        assert result["worst"] < 1e-4 and result["after"] < 1e-4, result


def test_sharded_model_is_right_without_any_compiler() -> None:
    for result in run_ranks(2, _family, 2, "mixtral", False):
        assert result["worst"] < 1e-4 and result["after"] < 1e-4, result


def _replicated(rank: int, transport: str) -> float:
    """Experts not sharded: every rank holds all of them; averaging gradients over ranks makes them right."""
    torch.manual_seed(0)
    model = zoo.HandMoE()
    single = copy.deepcopy(model)
    x = torch.randn(4, 16, zoo.WIDTH, generator=torch.Generator().manual_seed(1))
    expected = step(single, single, {"x": x})
    model.compile(backend=backend(group=dist.group.WORLD, transport=transport))
    step(model, model, {"x": x[rank : rank + 1]})
    grads = _mean_gradients(model)
    return max(relative(grads[n], g) for n, g in expected.grads.items())


@pytest.mark.parametrize("transport", ["auto", "symmetric"])
def test_replicated_experts_with_a_group(transport: str) -> None:
    assert max(run_ranks(WORLD, _replicated, transport)) < 1e-5


def _refusals(rank: int) -> list[str]:
    from ultraep_compile.errors import UltraEPError

    messages = []
    mesh = init_device_mesh("cpu", (WORLD,))
    for make in (
        lambda: shard_experts(torch.nn.Linear(3, 3), mesh),
        lambda: shard_experts(prepared("mixtral", "batched_mm", num_local_experts=6)[0], mesh),
        lambda: torch.compile(zoo.HandMoE(), backend=backend(group=dist.group.WORLD, ranks=2))(
            torch.randn(1, 4, zoo.WIDTH)
        ),
        lambda: torch.compile(shard_experts(zoo.HandMoE(), mesh), backend=backend(ranks=2))(
            torch.randn(1, 4, zoo.WIDTH)
        ),
    ):
        try:
            make()
            messages.append("no error")
        except UltraEPError as error:
            messages.append(str(error))
    return messages


def test_bad_topologies_are_refused_on_every_rank() -> None:
    for messages in run_ranks(WORLD, _refusals):
        assert "no experts found that could be divided" in messages[0]
        assert "6 experts cannot be divided over 4 ranks" in messages[1]
        assert "'ranks' is 2 but the process group has 4 processes" in messages[2]
        assert "'ranks' is 2 but the experts are divided over 4 processes" in messages[3]
