"""Sharded models over real processes: what they hold, how they load and save, what they can be combined with.

A launch of processes costs more than all that it checks, so there are few launches and many checks in each.
"""

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

import ultraep_compile
from tests import zoo
from tests.balancing import backend, prepared, relative, step
from tests.multirank import run_ranks
from ultraep_compile import shard_experts
from ultraep_compile.errors import ShardingError
from ultraep_compile.ops.transport import CollectiveTransport
from ultraep_compile.report import collect_reports

WORLD = 4
SLOTS = 2


def _model(**sizes) -> nn.Module:
    return prepared("mixtral", "batched_mm", output_router_logits=False, tie_word_embeddings=True, **sizes)[0]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6, foreach=False)


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _whole_state(state: dict) -> dict:
    """A copy of a nested dict, of its tensors only, and these whole."""
    kept = {k: v for k, v in state.items() if isinstance(v, (dict, Tensor))}
    return {k: _whole_state(v) if isinstance(v, dict) else _whole(v).detach().clone() for k, v in kept.items()}


def _flat(state: dict, prefix: str = "") -> dict[str, Tensor]:
    out = {}
    for k, v in state.items():
        out |= _flat(v, f"{prefix}{k}/") if isinstance(v, dict) else {prefix + str(k): v}
    return out


def _assert_equal(ours: dict, theirs: dict) -> None:
    ours, theirs = _flat(_whole_state(ours)), _flat(_whole_state(theirs))
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key].cpu(), value.cpu()), key


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, turns: int) -> list[float]:
    """Steps on this rank's rows of a batch that is the same for every number of ranks; mean losses."""
    losses = []
    for turn in range(turns):
        torch.manual_seed(turn)
        rows = 4 // world
        inputs = {k: v[rank * rows : (rank + 1) * rows] for k, v in zoo.tokens(4, 16).items()}
        loss = step(model, model, inputs).loss
        for p in model.parameters():
            if p.grad is not None and not isinstance(p.grad, DTensor):
                if world > 1:
                    dist.all_reduce(p.grad)
                p.grad /= world
        ultraep_compile.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(float(loss) / world)
    return losses


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _load(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """A checkpoint of any number of ranks into this model; the state afterwards."""
    state = _states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return _states(model, optimizer)


def _bytes(tensors) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _experts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.dim() == 3}


def files_of_single_ranks(model: nn.Module, rank: int, folder: str) -> None:
    """`torch.save` on every rank: each file goes back to its own rank, and is refused by another, which lacks these experts."""
    before = _whole_state(model.state_dict())
    torch.save(model.state_dict(), f"{folder}/part{rank}.pt")
    dist.barrier()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    with pytest.raises(ShardingError, match=rf"has the experts of rank \d, and is loaded on rank {rank}"):
        model.load_state_dict(torch.load(f"{folder}/part{(rank + 1) % dist.get_world_size()}.pt", weights_only=True))
    model.load_state_dict(torch.load(f"{folder}/part{rank}.pt", weights_only=True))
    _assert_equal(model.state_dict(), before)


def _on_four(rank: int, folder: str) -> dict:
    mesh = init_device_mesh("cpu", (WORLD,))
    single = _model()
    whole_bytes = _bytes(_experts_of(single).values())
    keys = {k: (v.shape, v.dtype) for k, v in single.state_dict().items()}
    model = shard_experts(copy.deepcopy(single), mesh)
    optimizer = _optimizer(model)

    # what a rank holds
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == keys
    experts = _experts_of(model)
    held = _bytes(p.to_local() for p in experts.values())
    assert held * WORLD == whole_bytes > 0
    slots = []
    fill = CollectiveTransport.fill_slots

    def counting(*args):
        slots.append(fill(*args))
        return slots[-1]

    CollectiveTransport.fill_slots = counting
    model.compile(backend=backend(redundant_experts=SLOTS))
    with collect_reports() as collected:
        losses = _train(model, optimizer, rank, WORLD, 1)
    CollectiveTransport.fill_slots = fill
    assert sum(len(g.prepared) for g in collected.graphs) == zoo.LAYERS
    assert not any("unshard" in g.graph_module.code for g in collected.graphs), "experts must not be gathered"
    one_layer = [slots[i : i + 2] for i in range(0, len(slots), 2)]  # gate_up and down, forward and backward
    assert {_bytes(s) for s in one_layer} == {whole_bytes // zoo.LAYERS // zoo.EXPERTS * SLOTS}
    for p in experts.values():
        assert _bytes([optimizer.state[p]["exp_avg"].to_local()]) * WORLD == p.numel() * p.element_size()
    assert model.lm_head.weight is model.model.embed_tokens.weight

    # checkpoints: of the unmodified model into ours; ours to a folder; the same back
    _assert_equal(_load(f"{folder}/unmodified", model, optimizer), torch.load(f"{folder}/unmodified.pt"))
    losses = _train(model, optimizer, rank, WORLD, 2)
    dcp.save(_states(model, optimizer), checkpoint_id=f"{folder}/sharded")
    saved = _whole_state(_states(model, optimizer))

    # reading outside a forward is local: one rank alone may do it
    if rank == 0:
        owner = model.model.layers[0].mlp.experts
        assert isinstance(owner.down_proj, DTensor) and owner.down_proj.shape[0] == zoo.EXPERTS
        assert owner.down_proj is owner._parameters["down_proj"]

    # new weights in mid-run: whole tensors, then distributed ones, each seen by the next step
    batch = {k: v[rank : rank + 1] for k, v in zoo.tokens(4, 16).items()}
    for state in (single.state_dict(), shard_experts(copy.deepcopy(single), mesh).state_dict()):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
        model.load_state_dict(state)
        assert relative(step(model, model, batch).loss, step(single, single, batch).loss) < 1e-5
    set_model_state_dict(model, dict(saved["model"]), options=StateDictOptions(full_state_dict=True))
    _assert_equal(get_model_state_dict(model), saved["model"])

    files_of_single_ranks(model, rank, folder)

    # a model that was never whole anywhere
    with torch.device("meta"):
        empty = zoo.build("mixtral", "batched_mm", output_router_logits=False, tie_word_embeddings=True)[0]
    shard_experts(empty, mesh).to_empty(device="cpu")
    empty.tie_weights()
    assert _bytes(p.to_local() for p in _experts_of(empty).values()) * WORLD == whole_bytes
    weights = {"model": empty.state_dict()}
    dcp.load(weights, checkpoint_id=f"{folder}/sharded")
    empty.load_state_dict(weights["model"])
    _assert_equal(empty.state_dict(), saved["model"])

    # transformers' own format
    model.save_pretrained(f"{folder}/pretrained")
    dist.barrier()
    return {"saved": saved, "losses": losses}


def _on_two(rank: int, folder: str) -> dict:
    model = shard_experts(_model(), init_device_mesh("cpu", (2,)))
    optimizer = _optimizer(model)
    _train(model, optimizer, rank, 2, 1)
    loaded = _whole_state(_load(f"{folder}/sharded", model, optimizer))
    model.compile(backend=backend(redundant_experts=SLOTS))
    return {"loaded": loaded, "losses": _train(model, optimizer, rank, 2, 2)}


def test_checkpoints_over_4_ranks_2_ranks_and_the_unmodified_model(tmp_path: Path) -> None:
    single = _model()
    optimizer = _optimizer(single)
    _train(single, optimizer, 0, 1, 1)
    dcp.save(_states(single, optimizer), checkpoint_id=str(tmp_path / "unmodified"))
    torch.save(_states(single, optimizer), tmp_path / "unmodified.pt")
    expected = _train(single, optimizer, 0, 1, 2)

    four = run_ranks(WORLD, _on_four, str(tmp_path))
    assert all(torch.tensor(r["losses"]).allclose(torch.tensor(expected), rtol=1e-4) for r in four)
    two = run_ranks(2, _on_two, str(tmp_path))
    for result in two:
        _assert_equal(result["loaded"], four[0]["saved"])

    fresh = _model()
    fresh_optimizer = _optimizer(fresh)
    _train(fresh, fresh_optimizer, 0, 1, 1)
    _assert_equal(_load(str(tmp_path / "sharded"), fresh, fresh_optimizer), four[0]["saved"])
    assert torch.tensor(two[0]["losses"]).allclose(torch.tensor(_train(fresh, fresh_optimizer, 0, 1, 2)), rtol=1e-4)

    pretrained = type(fresh).from_pretrained(tmp_path / "pretrained")
    _assert_equal(pretrained.state_dict(), four[0]["saved"]["model"])
