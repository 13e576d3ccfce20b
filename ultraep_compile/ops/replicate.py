"""Hot experts' weights into spare slots, and their gradients back: `ultraep::replicate`, `ultraep::grad_reduce`."""

from __future__ import annotations

import torch
from torch import Tensor

from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.transport import transport_for


@torch.library.custom_op("ultraep::replicate", mutates_args=())
def replicate(masters: Tensor, slot_expert_RS: Tensor, experts: int, group: str) -> Tensor:
    """Copies of the experts that the plan put into the slots hosted by this process.

    Args:
        masters: [E, ...] with virtual ranks; this rank's [M, ...] with a process group.
        slot_expert_RS: int32 [R, S], -1 = empty.
    Returns: [R*S, ...] with virtual ranks, [S, ...] with a group; empty slots are zero.
    """
    ranks, slots = slot_expert_RS.shape
    layout = ExpertLayout(experts, ranks, slots)
    transport = transport_for(ranks, group)
    filled = transport.fill_slots(masters, slot_expert_RS, layout)
    own = slot_expert_RS[transport.hosted.start : transport.hosted.stop].flatten() >= 0
    return torch.where(own.view(-1, *[1] * (masters.dim() - 1)), filled, filled.new_zeros(()))


@replicate.register_fake
def _(masters, slot_expert_RS, experts, group):
    ranks, slots = slot_expert_RS.shape
    return masters.new_empty(slots if group else ranks * slots, *masters.shape[1:])


@torch.library.custom_op("ultraep::grad_reduce", mutates_args=())
def grad_reduce(grad_slots: Tensor, slot_expert_RS: Tensor, experts: int, group: str) -> Tensor:
    """Sum of the slots' gradients at their masters, in slot order, accumulated in fp32: the adjoint of `replicate`."""
    ranks, slots = slot_expert_RS.shape
    layout = ExpertLayout(experts, ranks, slots)
    zero = grad_slots.new_zeros(layout.masters if group else experts, *grad_slots.shape[1:])
    return transport_for(ranks, group).reduce_slots(zero, grad_slots, slot_expert_RS, layout)


@grad_reduce.register_fake
def _(grad_slots, slot_expert_RS, experts, group):
    masters = experts // slot_expert_RS.shape[0] if group else experts
    return grad_slots.new_empty(masters, *grad_slots.shape[1:])


def _setup(ctx, inputs, output):
    _, slot_expert_RS, ctx.experts, ctx.group = inputs
    ctx.save_for_backward(slot_expert_RS)


def _replicate_backward(ctx, grad):
    return grad_reduce(grad.contiguous(), ctx.saved_tensors[0], ctx.experts, ctx.group), None, None, None


def _grad_reduce_backward(ctx, grad):
    return replicate(grad.contiguous(), ctx.saved_tensors[0], ctx.experts, ctx.group), None, None, None


replicate.register_autograd(_replicate_backward, setup_context=_setup)
grad_reduce.register_autograd(_grad_reduce_backward, setup_context=_setup)
