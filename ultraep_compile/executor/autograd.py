"""The one place that touches torch's private pipelining API: a backward cut into its input and its weight part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight


def whole_backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Gradients of leaves and parameters."""
    if outputs:
        torch.autograd.backward(list(outputs), list(grads))


def input_backward(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], leaves: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Gradients of leaves alone; what `weight_backward` needs for the rest."""
    _, groups = stage_backward_input(list(outputs), list(grads), list(leaves), iter(parameters))
    return groups


def weight_backward(parameters: Sequence[nn.Parameter], groups: list[dict[str, Any]]) -> None:
    """Add the parameters' gradients to what is there."""
    stage_backward_weight(iter(parameters), [g for g in groups if g.get("grads") is not None])


def can_split(modules: Iterable[nn.Module]) -> bool:
    """Whether a graph made by these modules may be walked twice. Compiled code has one node for everything, and FSDP frees
    the weights in between: their backward runs whole in its input part."""
    return not any(
        isinstance(m, FSDPModule) or m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules
    )
