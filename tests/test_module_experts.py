"""Sharding of experts that are modules of their own, or rows of a flat matrix: what a rank holds, trains, saves and loads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests import forms
from tests.balancing import backend, relative
from tests.multirank import run_ranks
from ultraep_compile import clip_grad_norm_, shard_experts
from ultraep_compile.errors import RoutingError
from ultraep_compile.report import collect_reports

KINDS = ("LoopOverHit", "SwitchCapacity", "LowRankExperts", "FlatWeights")


class Model(nn.Module):
    """A layer of every kind of experts, between dense ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for kind in KINDS:
            self.layers.append(forms.build(kind, seed=len(self.layers))[0])
            self.layers.append(nn.Linear(forms.WIDTH, forms.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x)
            x = 0.5 * (x + (out[0] if isinstance(out, tuple) else out))
        return x


def _batch(world: int) -> Tensor:
    return torch.randn(world, 24, forms.WIDTH, generator=torch.Generator().manual_seed(1))


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _mean_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of the mean of the losses of all ranks' slices, in one process."""
    model.zero_grad()
    total = sum(model(part[None]).pow(2).mean() for part in x) / len(x)
    total.backward()
    return {"loss": total.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _sharded_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    for p in model.parameters():
        if p.grad is not None and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return {"loss": loss / dist.get_world_size()} | {
        n: _whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None
    }


def _close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(t.norm()) for n, t in theirs.items() if n != "loss")
    for name, value in theirs.items():
        assert float((ours[name] - value).norm()) < 1e-5 * float(value.norm()) + 1e-7 * scale, name


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6, foreach=False)


def _flat(state: dict, prefix: str = "") -> dict[str, Tensor]:
    out = {}
    for k, v in state.items():
        if isinstance(v, dict):
            out |= _flat(v, f"{prefix}{k}/")
        elif isinstance(v, Tensor):
            out[prefix + str(k)] = v
    return out


def _over_ranks(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    single = Model()
    x = _batch(world)
    model = shard_experts(copy.deepcopy(single), mesh, (x[:1],))
    keys = {k: (v.shape, v.dtype) for k, v in single.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == keys
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in single.named_parameters()]

    # a rank holds its experts and nothing of the others'
    plain = dict(single.named_parameters())
    experts = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    assert sum(".experts." in n for n in experts) == sum(".experts." in n for n in plain) > 0
    held = sum(p.to_local().untyped_storage().nbytes() for p in experts.values())
    assert held * world == sum(plain[n].untyped_storage().nbytes() for n in experts)
    for name, value in model.state_dict().items():
        assert torch.equal(_whole(value), single.state_dict()[name])

    # as they are written, and compiled
    reference = _mean_step(single, x)
    _close(_sharded_step(model, x[rank : rank + 1]), reference)
    compiled = torch.compile(model, backend=backend())
    with collect_reports() as collected:
        _close(_sharded_step(compiled, x[rank : rank + 1]), {f"_orig_mod.{n}" if n != "loss" else n: g for n, g in reference.items()})
    sites = [s for g in collected.graphs for s in g.prepared.values()]
    assert len(sites) == len(KINDS) and all(s.sharded and s.group for s in sites)
    assert not any("unshard" in g.graph_module.code for g in collected.graphs), "experts must not be gathered"

    # optimizer and clipping
    optimizers = [_optimizer(m) for m in (model, single)]
    for turn in range(2):
        _sharded_step(compiled, x[rank : rank + 1] * (turn + 1))
        _mean_step(single, x * (turn + 1))
        norms = [clip_grad_norm_(m.parameters(), 0.01) for m in (model, single)]
        assert relative(norms[0], norms[1]) < 1e-5 and norms[1] > 0.01
        for optimizer in optimizers:
            optimizer.step()
    _close({n: _whole(p.detach()) for n, p in model.named_parameters()}, {n: p.detach() for n, p in single.named_parameters()})
    for name, p in experts.items():
        if p.requires_grad:
            moment = optimizers[0].state[p]["exp_avg"]
            assert moment.to_local().numel() == p.to_local().numel() and moment.shape == p.shape, name

    # checkpoints
    dcp.save(_states(model, optimizers[0]), checkpoint_id=f"{folder}/{world}")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert {k: (v.shape, type(v)) for k, v in whole.items()} == {k: (v.shape, Tensor) for k, v in single.state_dict().items()}
    whole = {k: v.clone() for k, v in whole.items()}  # what is not divided is the parameter itself
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    model.load_state_dict(whole)
    assert all(torch.equal(_whole(v), whole[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    set_model_state_dict(model, dict(whole), options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(_whole(v), whole[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model).double()
    assert all(torch.equal(_whole(v), whole[k].to(v.dtype)) for k, v in twin.state_dict().items())
    assert relative(twin(x[rank : rank + 1].double()).detach(), model(x[rank : rank + 1]).detach()) < 1e-5
    return {k: _whole(v).clone() for k, v in _flat(_states(model, optimizers[0])["model"]).items()}


def _load_elsewhere(rank: int, world: int, saved_by: int, folder: str) -> dict[str, Tensor]:
    """A checkpoint of another number of ranks; optimizer state too."""
    x = _batch(world)
    model = shard_experts(Model(), init_device_mesh("cpu", (world,)), (x[:1],))
    optimizer = _optimizer(model)
    _sharded_step(model, x[rank : rank + 1])
    optimizer.step()
    state = _states(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/{saved_by}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    dcp.save(_states(model, optimizer), checkpoint_id=f"{folder}/again")
    return {k: _whole(v).clone() for k, v in _flat(_states(model, optimizer)["model"]).items()}


def _plain_load(folder: str) -> dict[str, Tensor]:
    model = Model()
    optimizer = _optimizer(model)
    _mean_step(model, _batch(2))
    optimizer.step()
    state = _states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    return _flat(state)


def test_experts_in_lists_over_2_and_4_ranks(tmp_path: Path) -> None:
    four = run_ranks(4, _over_ranks, 4, str(tmp_path))
    two = run_ranks(2, _load_elsewhere, 2, 4, str(tmp_path))
    for result in (*four, *two):
        assert result.keys() == four[0].keys()
        assert [k for k, v in result.items() if not torch.equal(v, four[0][k])] == []
    first, again = _plain_load(str(tmp_path / "4")), _plain_load(str(tmp_path / "again"))
    assert all(torch.equal(v, four[0][k.removeprefix("model/")]) for k, v in first.items() if k.startswith("model/"))
    assert any("exp_avg" in k for k in first) and first.keys() == again.keys()
    assert all(torch.equal(v, first[k]) for k, v in again.items())


@pytest.mark.slow
def test_experts_in_lists_over_2_ranks(tmp_path: Path) -> None:
    run_ranks(2, _over_ranks, 2, str(tmp_path))


class ByThreshold(forms.DenseGated):
    """As many experts as have a probability of a fifth: how many differs from token to token."""

    def mix(self, h: Tensor) -> Tensor:
        gates = self.router.proj(h).softmax(-1)
        gates = gates * (gates > 0.2)
        y = torch.stack([expert(h) for expert in self.experts], dim=1)
        return torch.einsum("te,ted->td", gates, y)


def _one_bad_batch(rank: int) -> list[str]:
    """On one rank a token goes to more experts than any did when the model was prepared."""
    torch.manual_seed(0)
    model = ByThreshold().train()
    with torch.no_grad():
        model.router.proj.weight.zero_()[:2, :2] = torch.eye(2) * 40  # without these features all experts are alike
    x = torch.randn(1, 24, forms.WIDTH)
    x[..., :2] = x[..., :2].sign() * torch.rand(1, 24, 2) + 0.1
    shard_experts(model, init_device_mesh("cpu", (2,)), (x,))
    compiled = torch.compile(model, backend=backend())
    found = []
    for bad in (False, True, False):
        batch = torch.zeros_like(x) if bad and rank == 1 else x
        try:
            compiled(batch)
            found.append("")
        except RoutingError as error:
            found.append(str(error))
    return found


def test_more_choices_than_prepared_for_are_an_error_on_all_ranks() -> None:
    first, second = run_ranks(2, _one_bad_batch)
    assert first == second
    assert [bool(text) for text in first] == [False, True, False]
    assert "on rank 1, token 0 has weights for 4 experts, but no token had more than" in first[1]
