"""Sharding of experts that are modules of their own, or rows of a flat matrix: what a rank holds, trains, saves and loads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tests import forms
from tests.balancing import backend, relative
from tests.multirank import run_ranks
from tests.test_checkpoints import files_of_single_ranks
from ultraep_compile import clip_grad_norm_, shard_experts
from ultraep_compile.errors import RoutingError, ShardingError
from ultraep_compile.report import collect_reports

FULL = StateDictOptions(full_state_dict=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
KINDS = ("LoopOverHit", "SwitchCapacity", "LowRankExperts", "FlatWeights")


class Model(nn.Module):
    """A layer of every kind of experts, between dense ones."""

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for kind in kinds:
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


def _assert_whole(state: dict, expected: dict) -> None:
    """A state dict of plain whole tensors with these values."""
    found, right = _flat(state), _flat(expected)
    assert found.keys() == right.keys() and right
    for key, value in right.items():
        assert type(found[key]) is Tensor and torch.equal(found[key], value), key


def _over_ranks(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    single, x = Model(), _batch(world)
    model = shard_experts(copy.deepcopy(single), mesh, (x[:1],))
    _holds_its_own(model, single, world)
    reference = _mean_step(single, x)
    _close(_sharded_step(model, x[rank : rank + 1]), reference)
    compiled = torch.compile(model, backend=backend())
    with collect_reports() as collected:
        _close(_sharded_step(compiled, x[rank : rank + 1]), {f"_orig_mod.{n}" if n != "loss" else n: g for n, g in reference.items()})
    sites = [s for g in collected.graphs for s in g.prepared.values()]
    assert len(sites) == len(KINDS) and all(s.sharded and s.group for s in sites)
    assert not any("unshard" in g.graph_module.code for g in collected.graphs), "experts must not be gathered"
    optimizer = _trains(compiled, model, single, x, rank)
    dcp.save(_states(model, optimizer), checkpoint_id=f"{folder}/{world}")
    saved = {k: _whole(v).clone() for k, v in _flat(_states(model, optimizer)["model"]).items()}
    _whole_weights(model, single, x[rank : rank + 1])
    _whole_states(model, optimizer)
    files_of_single_ranks(model, rank, folder)
    _never_whole(mesh, x[rank : rank + 1], rank, folder)
    return saved


def _holds_its_own(model: nn.Module, single: nn.Module, world: int) -> None:
    """A rank holds its experts and nothing of the others'; names, shapes, dtypes and values are the whole model's."""
    keys = {k: (v.shape, v.dtype) for k, v in single.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == keys
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in single.named_parameters()]
    plain = dict(single.named_parameters())
    experts = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    assert sum(".experts." in n for n in experts) == sum(".experts." in n for n in plain) > 0
    held = sum(p.to_local().untyped_storage().nbytes() for p in experts.values())
    assert held * world == sum(plain[n].untyped_storage().nbytes() for n in experts)
    for name, value in model.state_dict().items():
        assert torch.equal(_whole(value), single.state_dict()[name])


def _trains(call: nn.Module, model: nn.Module, single: nn.Module, x: Tensor, rank: int) -> torch.optim.Optimizer:
    """Clipping and an optimizer whose state is as divided as the weights; the optimizer of the sharded model."""
    optimizers = [_optimizer(m) for m in (model, single)]
    for turn in range(2):
        _sharded_step(call, x[rank : rank + 1] * (turn + 1))
        _mean_step(single, x * (turn + 1))
        norms = [clip_grad_norm_(m.parameters(), 0.01) for m in (model, single)]
        assert relative(norms[0], norms[1]) < 1e-5 and norms[1] > 0.01
        for optimizer in optimizers:
            optimizer.step()
    _close({n: _whole(p.detach()) for n, p in model.named_parameters()}, {n: p.detach() for n, p in single.named_parameters()})
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) and p.requires_grad:
            moment = optimizers[0].state[p]["exp_avg"]
            assert moment.to_local().numel() == p.to_local().numel() and moment.shape == p.shape, name
    return optimizers[0]


def _whole_weights(model: nn.Module, single: nn.Module, x: Tensor) -> None:
    """A whole state dict, as plain tensors, is got and set; broadcast by rank 0 too. A copy in another dtype computes the same."""
    whole = get_model_state_dict(model, options=FULL)
    assert {k: (v.shape, type(v)) for k, v in whole.items()} == {k: (v.shape, Tensor) for k, v in single.state_dict().items()}
    whole = {k: v.clone() for k, v in whole.items()}  # what is not divided is the parameter itself
    for load in (
        lambda: model.load_state_dict(whole),
        lambda: set_model_state_dict(model, dict(whole), options=FULL),
        lambda: set_model_state_dict(model, dict(whole) if dist.get_rank() == 0 else {}, options=FROM_RANK_0),
    ):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
        load()
        assert all(torch.equal(_whole(v), whole[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model).double()
    assert all(torch.equal(_whole(v), whole[k].to(v.dtype)) for k, v in twin.state_dict().items())
    assert relative(twin(x.double()).detach(), model(x).detach()) < 1e-5


def _whole_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same of an optimizer's state, into this optimizer and into one that has made no step; training can go on."""
    weights = {k: _whole(v).clone() for k, v in model.state_dict().items()}
    whole = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    assert any("exp_avg" in k and float(v.norm()) > 0 for k, v in _flat(whole).items())
    rank_0 = dist.get_rank() == 0
    for each in (optimizer, _optimizer(model)):
        for options in (FULL, FROM_RANK_0):
            for state in each.state.values():
                state["exp_avg"].mul_(0.5)
            model.zero_grad()
            given = copy.deepcopy(whole) if rank_0 or options is FULL else {}
            set_optimizer_state_dict(model, each, given, options=options)
            _assert_whole(get_optimizer_state_dict(model, each, options=FULL), whole)
    assert all(torch.equal(_whole(v), weights[k]) for k, v in model.state_dict().items())
    held = {p: p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor) and p.requires_grad}
    assert held and all(optimizer.state[p]["exp_avg_sq"].to_local().numel() == n for p, n in held.items())


def _never_whole(mesh: DeviceMesh, x: Tensor, rank: int, folder: str) -> None:
    """A model made on the meta device, sharded there, and filled by a checkpoint, by whole tensors, or by rank 0's."""
    single = Model(KINDS[:2])
    right = {k: v.clone() for k, v in single.state_dict().items()}
    dcp.save({"model": shard_experts(copy.deepcopy(single), mesh, (x,)).state_dict()}, checkpoint_id=f"{folder}/first")
    with torch.device("meta"):
        made = Model(KINDS[:2])
    shard_experts(made, mesh, (x,))
    assert all(p.is_meta or p.to_local().numel() == 0 for p in made.parameters()), "memory for what is not there"
    for load in ("checkpoint", FULL, FROM_RANK_0):
        model = copy.deepcopy(made)
        if load == "checkpoint":
            model.to_empty(device="cpu")
            state = {"model": model.state_dict()}
            dcp.load(state, checkpoint_id=f"{folder}/first")
            model.load_state_dict(state["model"])
        else:
            given = dict(right) if rank == 0 or load is FULL else {}
            set_model_state_dict(model, given, options=load)
        _holds_its_own(model, single, mesh.size())
        out = torch.compile(model, backend=backend(inner="eager"))(x)
        assert relative(out.detach(), single(x).detach()) < 1e-6


def _load_elsewhere(rank: int, world: int, kinds: Sequence[str], folder: str) -> dict[str, Tensor]:
    """A checkpoint of another number of ranks, or some of its layers; optimizer state too."""
    x = _batch(world)
    model = shard_experts(Model(kinds), init_device_mesh("cpu", (world,)), (x[:1],))
    optimizer = _optimizer(model)
    _sharded_step(model, x[rank : rank + 1])
    optimizer.step()
    state = _states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    dcp.save(_states(model, optimizer), checkpoint_id=f"{folder}-again")
    return {k: _whole(v).clone() for k, v in _flat(_states(model, optimizer)["model"]).items()}


def _plain_load(kinds: Sequence[str], folder: str) -> dict[str, Tensor]:
    model = Model(kinds)
    optimizer = _optimizer(model)
    _mean_step(model, _batch(2))
    optimizer.step()
    state = _states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    return _flat(state)


@pytest.mark.parametrize(
    "ranks, others, kinds", [(2, 4, KINDS[:1]), pytest.param(4, 2, KINDS, marks=pytest.mark.slow)], ids=["2-4", "4-2"]
)
def test_experts_in_lists(ranks: int, others: int, kinds: Sequence[str], tmp_path: Path) -> None:
    """Over some ranks; what they saved is then read by other ranks and by the unmodified model."""
    saved = run_ranks(ranks, _over_ranks, ranks, str(tmp_path))
    folder = str(tmp_path / str(ranks))
    loaded = run_ranks(others, _load_elsewhere, others, kinds, folder)
    for result in (*saved, *loaded):
        assert len(result) > 8 and [k for k, v in result.items() if not torch.equal(v, saved[0][k])] == []
    first = _plain_load(KINDS, folder)
    assert all(torch.equal(v, saved[0][k.removeprefix("model/")]) for k, v in first.items() if k.startswith("model/"))
    again = _plain_load(kinds, f"{folder}-again")
    assert any("exp_avg" in k for k in again)
    assert all(torch.equal(v, first[k]) for k, v in again.items())


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


def _groups(rank: int) -> tuple[int, str]:
    """Experts in groups: a rank keeps whole groups."""
    mesh = init_device_mesh("cpu", (2,))
    single, _ = forms.build("GroupedEinsum")
    x = torch.randn(2, 16, forms.WIDTH, generator=torch.Generator().manual_seed(1))
    model = shard_experts(copy.deepcopy(single), mesh, (x[:1],))
    assert isinstance(model.weight, DTensor) and tuple(model.weight.shape) == tuple(single.weight.shape)
    reference = _mean_step(single, x)
    _close(_sharded_step(model, x[rank : rank + 1]), reference)
    compiled = torch.compile(model, backend=backend())
    with collect_reports() as collected:
        _close(_sharded_step(compiled, x[rank : rank + 1]), {f"_orig_mod.{n}" if n != "loss" else n: g for n, g in reference.items()})
    assert not any("unshard" in g.graph_module.code for g in collected.graphs)
    three, _ = forms.build("GroupedDense")
    with pytest.raises(ShardingError, match=r"GroupedDense: .* holds 12 experts in 3 groups, which cannot be divided over 2 ranks") as error:
        shard_experts(three, mesh, (x[:1],))
    return sum(len(g.prepared) for g in collected.graphs), str(error.value)


def test_experts_in_groups_are_divided_by_groups() -> None:
    (first, said), (second, _) = run_ranks(2, _groups)
    assert first == second == 1 and said.endswith("Use a mesh of a size out of [1, 3].")
