"""Small sums that all transports share."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

Gradients = list[Tensor | None]
SUMMED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels add up."""


def or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def accumulate(total: Gradients, new: Gradients) -> Gradients:
    """Sums of the rounds' gradients; None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(total, new, strict=True)] if total else new


def unshared(grads: list[Tensor]) -> list[Tensor]:
    """The same gradients, each with memory of its own, to be changed in place: those of a and b in x @ (a + b) are one tensor."""
    seen: set[int] = set()
    out = []
    for grad in grads:
        out.append(grad.clone() if grad.data_ptr() in seen else grad)
        seen.add(grad.data_ptr())
    return out


def adds_on_arrival(rows: Tensor) -> bool:
    """Do kernels sum such rows?"""
    return rows.is_cuda and rows.dtype in SUMMED and find_spec("triton") is not None


def sum_over_choices(pairs: Tensor, choices: int) -> Tensor:
    """[T*K, D] -> [T, D]; contiguous. Where there are kernels in top-k order: the bits of rows added as they come."""
    if adds_on_arrival(pairs):
        from ultraep_compile.codegen.dispatch import sum_choices

        return sum_choices(pairs, choices)
    return pairs.view(-1, choices, *pairs.shape[1:]).sum(1)
