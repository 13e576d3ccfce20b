"""All ranks' experts at hand, for code that is not balanced: `ultraep::unshard` gathers, its gradient returns to the owners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultraep_compile.ops.agreement import GATHERS, RUNS, Statement, common
from ultraep_compile.ops.derivatives import only_first_derivatives
from ultraep_compile.ops.routing import begin_backward, say_and_do
from ultraep_compile.ops.transport import CollectiveTransport, SymmetricTransport, deadline_of, transport_for


@torch.library.custom_op("ultraep::unshard", mutates_args=())
def unshard(local: Tensor, rows: int, ranks: int, group: str) -> Tensor:
    """All ranks' parts [rows, ...] of a tensor from this rank's part [rows/R, ...], in rank order.

    Its gradient is the owner's share of the gradient of the mean of the ranks' losses.
    """
    transport = transport_for(ranks, group)
    assert isinstance(transport, CollectiveTransport)
    _gather_together(transport, local)
    out = local.new_empty(rows, *local.shape[1:])
    transport.all_gather(out, local, "all ranks' experts")
    return out


def _gather_together(transport: CollectiveTransport, local: Tensor) -> None:
    """Raise TopologyError on all ranks where some exchange counts meanwhile. On GPUs with symmetric memory counts are exchanged
    without a look at them by the host; there such ranks wait for each other until the deadline.
    """
    shared = common(transport.group)
    facts, where = {RUNS: GATHERS}, "reading experts' weights"
    if shared.agreed == 0:
        shared.state(Statement(facts), where, deadline_of(transport.group.group_name))
    elif not shared.alone and not (local.is_cuda and isinstance(transport, SymmetricTransport)):
        if not (local.is_cuda and torch.cuda.is_current_stream_capturing()):
            say_and_do(transport, facts, where)


@unshard.register_fake
def _(local: Tensor, rows: int, ranks: int, group: str) -> Tensor:
    return local.new_empty(rows, *local.shape[1:])


@torch.library.custom_op("ultraep::reshard_grad", mutates_args=())
def reshard_grad(grad: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's part [rows/R, ...] of the mean over ranks of `grad` [rows, ...]."""
    transport = transport_for(ranks, group)
    assert isinstance(transport, CollectiveTransport)
    begin_backward(transport, GATHERS, "gradients of experts' weights", grad.is_cuda)
    parts = [p.contiguous() for p in grad.chunk(ranks)]
    # gloo has no reduce_scatter for every build: exchange the parts, then add them in rank order.
    counts = [p.shape[0] for p in parts], [parts[0].shape[0]] * ranks
    arrived = transport.all_to_all(torch.cat(parts), *counts, "gradients of all ranks' experts")
    wide = arrived.view(ranks, -1, *grad.shape[1:]).to(torch.promote_types(grad.dtype, torch.float32))
    return (wide.sum(0) / ranks).to(grad.dtype)


@reshard_grad.register_fake
def _(grad: Tensor, ranks: int, group: str) -> Tensor:
    return grad.new_empty(grad.shape[0] // ranks, *grad.shape[1:])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, ctx.ranks, ctx.group = inputs


unshard.register_autograd(
    lambda ctx, grad: (reshard_grad(grad.contiguous(), ctx.ranks, ctx.group), None, None, None), setup_context=_setup
)
only_first_derivatives(unshard, reshard_grad)
