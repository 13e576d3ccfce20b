"""Gradient clipping where some parameters are sharded and some are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for plain parameters beside sharded ones, on one mesh or several.

    torch's own function refuses such a mixture. The norm is that of the whole model's gradient, equal on all ranks;
    every rank must call this.

    Returns: the norm before clipping, a plain 0-d tensor.
    Raises: RuntimeError for a norm that is not finite, if asked for.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            by_mesh[p.grad.device_mesh if isinstance(p.grad, DTensor) else None].append(p.grad)
    norms = [_plain(torch.nn.utils.get_total_norm(grads, norm_type)) for grads in by_mesh.values()]
    total = torch.nn.utils.get_total_norm(norms, norm_type, error_if_nonfinite)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grad in (g for grads in by_mesh.values() for g in grads):
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.device))
    return total


def _plain(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
