"""All ranks' experts at hand, for code that is not balanced: `ultraep::unshard` gathers, its gradient returns to the owners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultraep_compile.ops.derivatives import only_first_derivatives
from ultraep_compile.ops.transport import CollectiveTransport, transport_for


@torch.library.custom_op("ultraep::unshard", mutates_args=())
def unshard(local: Tensor, rows: int, ranks: int, group: str) -> Tensor:
    """All ranks' parts [rows, ...] of a tensor from this rank's part [rows/R, ...], in rank order.

    Its gradient is the owner's share of the gradient of the mean of the ranks' losses.
    """
    transport = transport_for(ranks, group)
    assert isinstance(transport, CollectiveTransport)
    out = local.new_empty(rows, *local.shape[1:])
    transport.all_gather(out, local, "all ranks' experts")
    return out


@unshard.register_fake
def _(local: Tensor, rows: int, ranks: int, group: str) -> Tensor:
    return local.new_empty(rows, *local.shape[1:])


@torch.library.custom_op("ultraep::reshard_grad", mutates_args=())
def reshard_grad(grad: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's part [rows/R, ...] of the mean over ranks of `grad` [rows, ...]."""
    transport = transport_for(ranks, group)
    assert isinstance(transport, CollectiveTransport)
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
