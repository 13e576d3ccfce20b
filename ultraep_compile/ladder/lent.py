"""Values for modules on the meta device, lent for as long as they are run to be looked at.

A model that fits nowhere whole is built there, sharded, and filled by a checkpoint. What `prepare` learns from running it
does not depend on its weights, so random ones do; of a whole model, no more at once than what is being called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Place = tuple[dict[str, Any], str, Tensor]
"""A module's parameters or buffers, a name, and the tensor on the meta device that belongs there."""


def is_meta(model: nn.Module) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def lent(*modules: nn.Module) -> Iterator[None]:
    """Random values for all tensors of these modules that have none; tied ones stay tied."""
    places = _lend(inner for module in modules for inner in module.modules())
    try:
        yield
    finally:
        _take_back(places)


@contextlib.contextmanager
def lent_when_called(model: nn.Module) -> Iterator[None]:
    """The same for every module while its forward runs, which may also read what its children hold themselves."""
    if not is_meta(model):
        yield
        return
    open_loans: list[list[Place]] = []

    def before(module: nn.Module, args: tuple) -> None:
        open_loans.append(_lend((module, *module.children())))

    def after(module: nn.Module, args: tuple, out: Any) -> None:
        _take_back(open_loans.pop())

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while open_loans:
            _take_back(open_loans.pop())


def filled(tree: Any) -> Any:
    """A copy of nested arguments with values for what is on the meta device."""
    generator = torch.Generator().manual_seed(0)
    return pytree.tree_map_only(Tensor, lambda t: _values(t, generator) if t.is_meta else t, tree)


def _lend(modules: Any) -> list[Place]:
    places: list[Place] = []
    made: dict[Tensor, Tensor] = {}
    generator = torch.Generator().manual_seed(0)  # one for all: equal experts could not be told apart
    for module in modules:
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    values = _values(tensor, generator)
                    made[tensor] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
                places.append((holder, name, tensor))
    for holder, name, tensor in places:
        holder[name] = made[tensor]
    return places


def _take_back(places: list[Place]) -> None:
    for holder, name, tensor in places:
        holder[name] = tensor


def _values(like: Tensor, generator: torch.Generator) -> Tensor:
    """Of the size that weights, scales and quantised weights have; other integers are 0."""
    if like.is_complex() or like.is_floating_point():
        normal = torch.randn(like.shape, generator=generator, dtype=like.dtype if like.is_complex() else torch.float32)
        return (normal * like.shape[-1] ** -0.5 if like.dim() > 1 else 1 + 0.1 * normal).to(like.dtype)
    if like.dim() > 1 and like.element_size() == 1 and like.dtype != torch.bool:
        return torch.randint(0, 8, like.shape, generator=generator, dtype=like.dtype)
    return torch.zeros(like.shape, dtype=like.dtype)
