"""Unmodified transformers models through `ultraep_compile.pipeline`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.executor import vlm
from tests.multirank import run_ranks
from ultraep_compile.decorator import take_options
from ultraep_compile.report import collect_reports


def _llava(rank: int) -> dict[str, Any]:
    model = vlm.llava()
    single = copy.deepcopy(model)
    whole = sum(p.numel() for p in model.parameters())
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    pipe = ultraep_compile.pipeline(model, mesh, 4, vlm.batch(4, 0), deadline=60.0)
    batches = [vlm.batch(8, 1), vlm.batch(6, 2, images=(True, False, False, True, True, False))]
    worst = vlm.worst_difference(pipe, single, batches, 4)
    state = pipe.full_state_dict()
    if rank == 0:
        assert state.keys() == single.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in single.state_dict().items())
    held = sum(p.numel() for p in model.parameters() if not p.is_meta)
    assert held == sum(p.numel() for p in pipe.parameters())
    return {"worst": worst, "held": held / whole}


def test_llava_equals_one_process() -> None:
    for result in run_ranks(2, _llava):
        assert result["worst"] < 1e-5, result
        assert result["held"] < 0.85, result


def _experts_in_stages(rank: int) -> dict[str, Any]:
    """Both transformations at once, over virtual expert ranks inside each stage."""
    model = vlm.llava(experts=4)
    single = copy.deepcopy(model)
    for m in (model, single):
        m.set_experts_implementation("batched_mm")  # pyright: ignore[reportCallIssue]
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    decorated = ultraep_compile.balance(ranks=4, redundant_experts=1, inner="aot_eager")(type(model))
    model = copy.deepcopy(model)  # an instance of the decorated class, as if it had been made now
    assert take_options(single) is None and isinstance(model, decorated)
    with collect_reports() as collected:
        pipe = ultraep_compile.pipeline(model, mesh, 4, vlm.batch(4, 0), deadline=120.0)
        worst = vlm.worst_difference(pipe, single, [vlm.batch(8, 1), vlm.batch(8, 2)], 4)
    return {"worst": worst, "sites": sum(len(g.prepared) for g in collected.graphs)}


def test_experts_over_virtual_ranks_inside_stages() -> None:
    for result in run_ranks(2, _experts_in_stages):
        assert result["sites"] >= 2 and result["worst"] < 1e-4, result


def _expert_mesh(rank: int) -> dict[str, Any]:
    """Two pipelines of two stages; the ranks of a stage divide its experts."""
    model = vlm.llava(experts=4)
    single = copy.deepcopy(model)
    for m in (model, single):
        m.set_experts_implementation("batched_mm")  # pyright: ignore[reportCallIssue]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    ultraep_compile.shard_experts(model, mesh["ep"])
    options = {"redundant_experts": 1, "inner": "aot_eager"}
    with collect_reports() as collected:
        pipe = ultraep_compile.pipeline(
            model, mesh, 4, vlm.batch(4, 0), backend="ultraep", options=options, deadline=120.0
        )
        batches = [vlm.batch(8, 1), vlm.batch(8, 2, images=(True, False) * 4)]
        result = pipe.step(batches[mesh["ep"].get_local_rank()])
    losses = []
    for whole in batches:
        for mb in pipe.parts.microbatches(whole, 4):
            loss = single(**mb.inputs).loss * mb.weight / 2
            loss.backward()
            losses.append(float(loss.detach()))
    worst = abs(float(result) - sum(losses)) / sum(losses)
    sites = [s for g in collected.graphs for s in g.prepared.values()]
    assert all(s.sharded and s.group for s in sites)
    return {"worst": max(worst, vlm.gradients_differ(pipe, single)), "sites": len(sites)}


@pytest.mark.slow
def test_experts_divided_over_a_mesh_dimension() -> None:
    for result in run_ranks(4, _expert_mesh):
        assert result["sites"] >= 2 and result["worst"] < 1e-4, result
