"""Unmodified transformers models through `ultraep_compile.pipeline`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.executor import vlm
from tests.multirank import run_ranks


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
