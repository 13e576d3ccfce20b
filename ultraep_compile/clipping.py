"""Gradient clipping where some parameters are sharded and some are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultraep_compile.errors import ArgumentError
from ultraep_compile.exchange import Line, at, line_named, line_of
from ultraep_compile.exchange.distributed_tensors import over_mesh, plainly_divided, shards
from ultraep_compile.ops.expert_tensor import ExpertTensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for plain parameters beside sharded ones, on one mesh or several, and for those of
    an `ultraep_compile.pipeline`, which are spread over its ranks.

    torch's own function refuses such a mixture. The norm is that of the whole model's gradient, equal on all ranks;
    every rank must call this.

    Returns: the norm before clipping, a plain 0-d tensor.
    Raises: RuntimeError for a norm that is not finite, if asked for.
    """
    if isinstance(parameters, torch.nn.Module):
        raise ArgumentError("clip_grad_norm_ takes parameters, not a model. Give it model.parameters().")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    group, counted = _pipeline_of(parameters)
    with at(phase="optimizer"):
        total = _norm(counted, norm_type, parameters)
        if group is not None:
            total = _over_ranks(total, line_of(group), norm_type)
    if error_if_nonfinite:
        torch.nn.utils.get_total_norm([total], norm_type, error_if_nonfinite=True)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.device))
    return total


def _pipeline_of(parameters: list[Tensor]) -> tuple[dist.ProcessGroup | None, list[Tensor]]:
    """The pipeline's group, if the parameters are one's, and the gradients that this rank counts: what several ranks
    hold is counted by one of them."""
    group, counted = None, []
    for p in parameters:
        mark = getattr(p, "_ultraep_pipeline", None)
        if mark is not None:
            group = mark[0]
        if p.grad is not None and (mark is None or mark[1]):
            counted.append(p.grad)
    return group, counted


def _norm(grads: list[Tensor], norm_type: float, parameters: list[Tensor]) -> Tensor:
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_mesh[_holders_of(grad)].append(grad)
    norms = [_norm_over(where, part, norm_type) for where, part in by_mesh.items()]
    if not norms and parameters:
        first = parameters[0]
        norms = [torch.zeros((), device=first.device)]
    return torch.nn.utils.get_total_norm(norms, norm_type)


def _over_ranks(norm: Tensor, line: Line, norm_type: float) -> Tensor:
    """The norm of all ranks' gradients from the norm of each rank's."""
    norm = norm.double().clone()
    if norm_type == float("inf"):
        line.all_reduce(norm, "the norm of all gradients", dist.ReduceOp.MAX)
        return norm.float()
    norm = norm**norm_type
    line.all_reduce(norm, "the norm of all gradients")
    return (norm ** (1.0 / norm_type)).float()


def _holders_of(grad: Tensor) -> object:
    """Who has a gradient, or a part of it: nobody but this rank, a mesh and how it is divided there, or the owners of a group."""
    if isinstance(grad, ExpertTensor):
        return vars(grad)["_expert_group"]
    return (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None


def _norm_over(where: object, grads: list[Tensor], norm_type: float) -> Tensor:
    if isinstance(where, str):
        mine = [g.to_local() for g in grads if g.to_local().numel()]  # pyright: ignore[reportAttributeAccessIssue]
        norm = torch.nn.utils.get_total_norm(mine, norm_type).to(grads[0].device).reshape(1)
        line = line_named(where)
        norms = norm.new_empty(line.size)
        line.all_gather(norms, norm, "the norms of all experts' gradients")
        return torch.nn.utils.get_total_norm(list(norms), norm_type)
    if not isinstance(where, tuple):
        return torch.nn.utils.get_total_norm(grads, norm_type)
    mesh, _ = where
    first = grads[0]
    assert isinstance(first, DTensor)
    if plainly_divided(first) and norm_type != 0:
        mine = [t for g in grads if isinstance(g, DTensor) and (t := g.to_local()).numel()]
        norm = torch.nn.utils.get_total_norm(mine, norm_type).to(first.device)
        if mesh.get_coordinate() is not None:
            for line, _ in shards(first):
                norm = _over_ranks(norm, line, norm_type)
        return norm

    def total() -> Tensor:
        norm = torch.nn.utils.get_total_norm(grads, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    return over_mesh(mesh, total, "the norm of all gradients")
