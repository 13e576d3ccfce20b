"""`fully_shard` on an encoder over pipelines that stand side by side: every call gathers, so all must make equally many."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.executor import toys
from tests.multirank import run_ranks
from ultraep_compile.errors import PipelineError
from ultraep_compile.executor.holdings import names_of
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings
from ultraep_compile.multimodal.parts import Parts


def _worst(pipe: Pipeline, single: Parts) -> float:
    """Largest relative difference of this rank's gradients from those of one process."""
    expected, worst = names_of(None, single), 0.0
    for name, p in pipe.named_parameters():
        assert p.grad is not None
        own, right = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad, expected[name].grad
        worst = max(worst, float((own - right).norm() / right.norm()))
    return worst


def _steps(rank: int) -> tuple[float, str]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "dp"))
    parts = toys.parts(1, seed=3)
    single = toys.copied(parts)
    pipe = Pipeline(None, parts, mesh, Settings(3, deadline=60.0), "pp")
    tower = parts.encoders[0].module.tower
    fully_shard(tower[0], mesh=mesh["dp"])
    fully_shard(tower, mesh=mesh["dp"])
    equal = toys.microbatches(3, 5, images=1.0)
    pipe.step({"microbatches": equal})
    toys.reference(single, equal)
    worst = _worst(pipe, single)
    uneven = equal if rank else toys.microbatches(3, 6, images=1.0)
    with pytest.raises(PipelineError, match=r"encoder 'image' is sharded .* leave the encoder unsharded") as caught:
        pipe.step({"microbatches": uneven})
    pipe.zero_grad()
    pipe.step({"microbatches": equal})  # and goes on
    dist.barrier()
    return max(worst, _worst(pipe, single)), str(caught.value)


def test_pipelines_with_other_numbers_of_items_are_refused_and_equal_ones_are_right() -> None:
    torch.manual_seed(0)
    for worst, told in run_ranks(2, _steps):
        assert worst < 1e-5
        assert "by microbatch [" in told
