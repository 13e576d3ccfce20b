"""Which ranks share a parameter, and the sums of their gradients at the end of a step.

The gradient is that of the pipeline's loss, averaged over pipelines that stand side by side (data parallel): encoders and
generators, which every rank of a pipeline holds, are added up over the pipeline; a tensor read by stages on several
ranks (tied embeddings) over those; then everything is averaged over the other mesh dimensions, unless a DTensor's own
mesh has done so already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ultraep_compile.exchange import line_of

_BUCKET = 32 * 1024 * 1024  # bytes added up in one go


@dataclass(slots=True)
class Reduction:
    """One sum over one group; every rank of the group lists the same parameters in the same order."""

    group: dist.ProcessGroup
    parameters: list[nn.Parameter]
    divide: int = 1
    among: tuple[int, ...] = ()  # ranks of the group that take part, this one too; empty: all


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reduce(reductions: Iterable[Reduction]) -> None:
    """Run all sums, in order. A parameter that no rank of the group has a gradient of keeps none."""
    for job in reductions:
        if job.group.size() > 1 and job.parameters:
            for bucket in _buckets(job.parameters):
                _add_up(job, bucket)


def _add_up(job: Reduction, bucket: Sequence[nn.Parameter]) -> None:
    """Sum a bucket's gradients as one tensor, with a flag for each parameter that has one."""
    first = local(bucket[0])
    flags = torch.tensor([p.grad is not None for p in bucket], dtype=first.dtype).to(first.device)
    parts = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in bucket]
    flat = torch.cat([flags, *(x.reshape(-1) for x in parts)])
    _sum(flat, job)
    if job.divide > 1:
        flat[len(bucket) :] /= job.divide
    seen = flat[: len(bucket)].tolist()
    at = len(bucket)
    for p, here, flag in zip(bucket, parts, seen, strict=True):
        total = flat[at : at + here.numel()].view(here.shape)
        at += here.numel()
        if p.grad is not None:
            here.copy_(total)
        elif flag:
            p.grad = _like(p, total.clone())


def _sum(flat: Tensor, job: Reduction) -> None:
    """Add `flat` up over the ranks of a job. Some of a group's ranks do it by messages, the lowest adding in rank order: a
    group of their own would have to be made by all."""
    line, what = line_of(job.group), "the sum of gradients over ranks"
    if not job.among:
        line.all_reduce(flat, what)
        return
    first, *rest = job.among
    if line.rank != first:
        line.pass_on(flat, first, True, what)
        line.pass_on(flat, first, False, what)
        return
    other = torch.empty_like(flat)
    for rank in rest:
        line.pass_on(other, rank, False, what)
        flat += other
    for rank in rest:
        line.pass_on(flat, rank, True, what)


def _like(p: nn.Parameter, value: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return value
    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Neighbours of one dtype and device, up to a size."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        here = local(p)
        if bucket and (
            local(bucket[0]).dtype != here.dtype or local(bucket[0]).device != here.device or size > _BUCKET
        ):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += here.numel() * here.element_size()
    if bucket:
        yield bucket


def outer_reductions(parameters: Iterable[nn.Parameter], mesh: DeviceMesh, pipeline_dim: str) -> list[Reduction]:
    """The averages over every mesh dimension but the pipeline's, leaving out what a DTensor's own mesh has averaged."""
    jobs = []
    parameters = list(parameters)
    for name in mesh.mesh_dim_names or ():
        if name == pipeline_dim or mesh[name].size() == 1:
            continue
        left = [p for p in parameters if not (isinstance(p, DTensor) and name in (p.device_mesh.mesh_dim_names or ()))]
        jobs.append(Reduction(mesh[name].get_group(), left, mesh[name].size()))
    return jobs
