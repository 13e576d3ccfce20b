"""Tensors of which this process has the shape only, and which nobody can take for zeros.

What stands around a part (embeddings, heads and features of other stages) runs for the shapes that it makes, though weights
and features may not be here. What is made of them is absent, too. It may be dropped, and is, since layers before the
part hand on what they are given; whoever looks at its values, or returns it, is told whose they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.reads import FILLED, looked_at, name_of, written


class Absent(Tensor):
    """A shape that operations take for a tensor. Takes no memory."""

    sources: frozenset[str]
    """What it is made of that is not here."""

    @staticmethod
    def __new__(cls, shape: Iterable[int], dtype: torch.dtype, device: torch.device, sources: Iterable[str]) -> Absent:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # pyright: ignore
        made.sources = frozenset(sources)
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Absent({list(self.shape)}, {self.dtype}, of {sorted(self.sources)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        absent = [x for x in leaves if isinstance(x, Absent)]
        if seen := [x for x in looked_at(func, args, kwargs) if isinstance(x, Absent)]:
            must_be_here(seen, f"looks at ({name_of(func)})")
        sources = frozenset().union(*(x.sources for x in absent))
        if targets := written(func, args, kwargs):
            for target in targets:
                _spoil(target, sources)
            return targets[0] if len(targets) == 1 else tuple(targets)
        args, kwargs = pytree.tree_unflatten([_zeros(x) if isinstance(x, Absent) else x for x in leaves], spec)
        output = func(*args, **kwargs)
        if name_of(func) in FILLED:
            return output
        return pytree.tree_map_only(Tensor, lambda x: Absent(x.shape, x.dtype, x.device, sources), output)


def _zeros(absent: Absent) -> Tensor:
    return torch.zeros((), dtype=absent.dtype, device=absent.device).expand(absent.shape)


def _spoil(target: Tensor, sources: frozenset[str]) -> None:
    """Something absent is written into a tensor: an absent one stays so, another one has no value any more."""
    if isinstance(target, Absent):
        target.sources |= sources
    elif target.is_floating_point() or target.is_complex():
        target.fill_(float("nan"))
        for spoilt in _open:
            spoilt.sources |= sources
    else:
        raise PartsError(_needed(sources, "writes into whole numbers"))


class Spoilt:
    """What was written, though absent, into tensors that are here. They are NaN now."""

    def __init__(self) -> None:
        self.sources: frozenset[str] = frozenset()

    def must_not_show_in(self, values: Any) -> None:
        """Raise PartsError if values are NaN and something was spoilt."""
        if self.sources and any(bool(x.isnan().any()) for x in pytree.tree_leaves(values) if isinstance(x, Tensor)):
            raise PartsError(_needed(self.sources, "returns"))


_open: list[Spoilt] = []


@contextlib.contextmanager
def nothing_spoilt() -> Iterator[Spoilt]:
    """Notes what is spoilt meanwhile."""
    _open.append(Spoilt())
    try:
        yield _open[-1]
    finally:
        _open.pop()


def must_be_here(values: Any, doing: str) -> None:
    """Raise PartsError if some value is absent."""
    absent = [x for x in pytree.tree_leaves(values) if isinstance(x, Absent)]
    if absent:
        raise PartsError(_needed(frozenset().union(*(x.sources for x in absent)), doing))


def _needed(sources: frozenset[str], doing: str) -> str:
    named = sorted(sources)
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return (
        f"the forward {doing} what it makes of {', '.join(named[:4])}{more}, which this rank does not hold, since no part that it runs "
        "used that with the example batch. Call pipeline() with an example batch, and in a mode (train or eval), that uses it as this "
        "one does."
    )
