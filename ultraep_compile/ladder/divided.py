"""Layers whose experts are divided over ranks: what the lifted forward, and the module's own, see of them.

The lifted forward reads this rank's part. The module's own forward reads all experts: they are gathered once a call,
whatever the routing, so that no rank waits for one that calls fewer experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultraep_compile.ops import unshard  # noqa: F401  (defines the op)
from ultraep_compile.ops.steps import ran_own

DIVISION = "_ultraep_division"


@dataclass(frozen=True, slots=True)
class Division:
    """How the experts of one module are divided. Parameters are paths inside the module."""

    ranks: int
    group: str
    lists: tuple[tuple[str, ...], ...]
    """Parameters of one role, one for each expert."""
    stacks: tuple[str, ...]
    """Parameters that hold all experts."""


def division_of(module: nn.Module) -> Division | None:
    return getattr(type(module), DIVISION, None)


def stack_experts(module: nn.Module, tensors: list[Tensor]) -> Tensor:
    """All experts' tensors of one role as one, [E, ...]; gathered where they are divided, which the backend undoes."""
    division = division_of(module)
    if division is None or not isinstance(tensors[0], DTensor):
        return torch.stack(tensors)
    parts = [t.to_local() for t in tensors]  # pyright: ignore
    mine = torch.cat([p.reshape(int(p.numel() > 0), *t.shape) for p, t in zip(parts, tensors, strict=True)])
    return torch.ops.ultraep.unshard(mine, len(tensors), division.ranks, division.group)


def own_forward(base: type[nn.Module], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward that the module's author wrote."""
    if not torch.compiler.is_compiling():
        ran_own(module)
    if division_of(module) is None:
        return base.forward(module, *args, **kwargs)
    if torch.compiler.is_compiling():
        return eager_forward(base, module, args, kwargs)  # pyright: ignore[reportCallIssue]
    with gathered(module):
        return base.forward(module, *args, **kwargs)


@torch.compiler.disable
def eager_forward(base: type[nn.Module], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The same, whoever compiles around it."""
    return own_forward(base, module, args, kwargs)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All experts in the places of this rank's, for as long as a forward runs."""
    division = division_of(module)
    assert division is not None
    whole: dict[str, Tensor] = {}
    for names in division.lists:
        whole |= dict(zip(names, stack_experts(module, [_held(module, n) for n in names]).unbind(), strict=True))
    for name in division.stacks:
        part = _held(module, name)
        assert isinstance(part, DTensor)
        whole[name] = torch.ops.ultraep.unshard(part.to_local(), part.shape[0], division.ranks, division.group)
    places = {name: _place(module, name) for name in whole}
    before = {name: holder[last] for name, (holder, last) in places.items()}
    try:
        for name, (holder, last) in places.items():
            holder[last] = whole[name]
        yield
    finally:
        for name, (holder, last) in places.items():
            holder[last] = before[name]


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The same for a look at a module: all experts are parameters of their own, with gradients that go nowhere else."""
    if division_of(module) is None:
        yield
        return
    learns = {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    with torch.no_grad(), gathered(module):
        for names in (*division_of(module).lists, division_of(module).stacks):  # pyright: ignore
            for name in names:
                holder, last = _place(module, name)
                holder[last] = nn.Parameter(holder[last].detach().clone(), requires_grad=learns[name])
        with torch.enable_grad():
            yield


def _held(module: nn.Module, path: str) -> Tensor:
    holder, name = _place(module, path)
    return holder[name]


def _place(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent)._parameters, name
