"""Another order of a layer's experts, so that other ranks are home to them: the same function, other positions.

Router rows and experts move together. `planner.homes.spread_homes` says where to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultraep_compile.errors import ShardingError
from ultraep_compile.sharding import stacked_experts

SAME = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative error of the output up to which another order of summation explains the difference."""


def permute_experts(
    layer: nn.Module,
    order_E: Tensor,
    example: Sequence[Any] | Mapping[str, Any],
    names: Sequence[str] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """Put expert `order_E[p]` in the place of expert p, in the experts and in the router; in place.

    Args:
        layer: the module that holds one MoE layer's router and its stacked experts, whole (before `shard_experts`).
        order_E: int [E], a permutation, as `spread_homes` gives it.
        example: arguments of the layer, positional or by name. It is run before and after, in eval mode: the outputs
            must be equal up to the order of summation.
        names: the tensors that have one row or block for each expert. None: every parameter and buffer of the layer
            whose first dim is E.
        optimizer: its state of these parameters moves with them.
    Returns: the names of what was moved, as in `layer.state_dict()`; tensors saved elsewhere under these names move by
        `tensor[order_E]`. `order_E.argsort()` moves all back.
    Raises: ShardingError where the layer has no stacked experts, they are sharded, or the output changed (selection in
        groups of experts, a table of experts by token, sizes that happen to equal E); the layer is then as it was.

    Example: a router [E, D] and experts [E, D, F], `order_E = [2, 0, 1]`: row and block 2 come first.
    """
    experts = _experts(layer)
    order_E = order_E.detach().cpu().long()
    if order_E.dim() != 1 or order_E.sort().values.tolist() != list(range(experts)):
        raise ShardingError(
            f"the order has shape {list(order_E.shape)} and is no permutation of the layer's {experts} experts. "
            "Pass what spread_homes returns for this layer's counts."
        )
    tensors = dict(_per_expert(layer, experts, names))
    before = _output(layer, example)
    _move(tensors, order_E, optimizer)
    after = _output(layer, example)
    error = float((after.double() - before.double()).norm() / before.double().norm().clamp_min(1e-30))
    if not error <= SAME.get(before.dtype, 1e-5):
        _move(tensors, order_E.argsort(), optimizer)
        raise ShardingError(
            f"the layer computes something else after its experts changed places (relative error {error:.1e}), so they were "
            f"put back. Moved were {', '.join(tensors)}. Pass the tensors that have one row for each expert as names=[...]; "
            "experts that a router selects in groups, or by a table, cannot change places."
        )
    return list(tensors)


def _experts(layer: nn.Module) -> int:
    """E of the only stacked experts in the layer."""
    found = [(name, experts) for name, _, experts, _ in stacked_experts(layer)]
    if len({experts for _, experts in found}) != 1:
        what = ", ".join(f"{name or 'the layer itself'} with {n}" for name, n in found) or "none"
        raise ShardingError(
            f"{type(layer).__name__} must hold one set of stacked experts; found: {what}. Pass the module of one MoE layer "
            "whose experts are parameters of shape [experts, in, out]."
        )
    return found[0][1]


def _per_expert(layer: nn.Module, experts: int, names: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    known = dict((*layer.named_parameters(), *layer.named_buffers()))
    for name in names or ():
        if name not in known or known[name].dim() == 0 or known[name].shape[0] != experts:
            raise ShardingError(f"{name!r} is no tensor of the layer with {experts} as its first dim. Known: {', '.join(known)}.")
    for name, tensor in known.items():
        if name in names if names is not None else tensor.dim() > 0 and tensor.shape[0] == experts:
            if isinstance(tensor, DTensor):
                raise ShardingError(f"{name} is sharded. Permute whole experts, before shard_experts, or a full state_dict.")
            yield name, tensor


def _move(tensors: Mapping[str, Tensor], order_E: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
            for one in (tensor, *(s for s in state.values() if isinstance(s, Tensor) and s.shape == tensor.shape)):
                one.copy_(one[order_E.to(one.device)])


def _output(layer: nn.Module, example: Sequence[Any] | Mapping[str, Any]) -> Tensor:
    """The layer's output, or the first of several, in eval mode."""
    training = [module for module in layer.modules() if module.training]
    layer.eval()
    try:
        with torch.no_grad():
            out = layer(**example) if isinstance(example, Mapping) else layer(*example)
    finally:
        for module in training:
            module.training = True
    return (out if isinstance(out, Tensor) else out[0]).clone()
