"""Small sums that all transports share."""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = list[Tensor | None]


def or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def accumulate(total: Gradients, new: Gradients) -> Gradients:
    """Sums of the rounds' gradients; None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(total, new, strict=True)] if total else new


def sum_over_choices(pairs: Tensor, choices: int) -> Tensor:
    """[T*K, D] -> [T, D]; contiguous."""
    return pairs.view(-1, choices, *pairs.shape[1:]).sum(1)
