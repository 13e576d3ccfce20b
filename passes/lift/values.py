"""What the lifting interpreter knows of a tensor: its role, and what each of its dims runs over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from ultraep_compile.passes.lift.sizes import Size


class Refusal(Exception):
    """This site cannot be lifted; the text says what was met and what was expected."""


class Dim(Enum):
    """What a dim runs over, with a prime that stands for its size when an op is probed."""

    TOKEN = 100003
    CHOICE = 100019
    PAIR = 100043
    """T*K pairs, token by token."""
    SORTED = 100049
    """The same pairs in the order of their experts."""
    EXPERT = 100057


DIM_OF_SIZE = {dim.value: dim for dim in Dim}
ROW_DIMS = frozenset({Dim.TOKEN, Dim.CHOICE, Dim.PAIR, Dim.SORTED})
Dims = tuple[Dim | None, ...]


class Kind(Enum):
    IDS = "expert ids"
    ORDER = "sort order"
    """SORTED -> PAIR: which pair stands at a place of the sorted order."""
    UNORDER = "inverse of the sort order"
    TOKEN_OF = "token of a sorted pair"
    BLANK = "uninitialised tensor"
    COUNTS = "rows per expert"
    OFFSETS = "group offsets"
    MASK = "constant mask"
    """A predicate that holds for all legal ids, or for none."""
    PARAM = "per-expert parameter"
    TAKEN = "per-expert parameter taken by id"
    ROWS = "row data"


STRUCTURE_ONLY = frozenset({Kind.IDS, Kind.ORDER, Kind.UNORDER, Kind.TOKEN_OF, Kind.MASK})
"""Kinds that have no node in the lifted graph."""


@dataclass(frozen=True, slots=True)
class Value:
    """An abstract tensor. `node` computes it in the lifted graph, where PAIR and SORTED are one and the same."""

    kind: Kind
    dims: Dims
    sizes: tuple[Size, ...]
    dtype: torch.dtype
    node: fx.Node | None = None
    uses: frozenset = frozenset()
    """Of "rows", "weight" and the anchors: what it was computed from."""
    truth: bool = False
    """Of a MASK: whether it holds."""
    storage: object = field(default_factory=object, compare=False)
    """Shared by values that may alias."""

    def but(self, **changes) -> Value:
        return dataclasses.replace(self, **changes)

    def meta(self) -> torch.Tensor:
        """A storage-less stand-in in which each labelled dim has its own prime size."""
        return torch.empty(self.probe_sizes(), dtype=self.dtype, device="meta")

    def probe_sizes(self) -> tuple[int, ...]:
        sizes = tuple(dim.value if dim else size for dim, size in zip(self.dims, self.sizes, strict=True))
        if not all(isinstance(size, int) for size in sizes):
            raise Refusal(f"a size {self.sizes} that is symbolic but no number of tokens")
        return sizes  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Call:
    """A node as the rules see it: operands that are tracked are `Value`s, others stay nodes or constants."""

    node: fx.Node
    name: str
    target: Callable[..., Any] | str | None
    in_place: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def describe(value: object) -> str:
    """For messages: `row data [pair, 32]`."""
    if not isinstance(value, Value):
        return "an outside tensor" if isinstance(value, fx.Node) else repr(value)
    dims = ", ".join(d.name.lower() if d else str(s) for d, s in zip(value.dims, value.sizes, strict=True))
    return f"{value.kind.value} [{dims}]"


def flat(arg: Any) -> list[Any]:
    """The leaves of nested tuples and lists."""
    if isinstance(arg, (tuple, list)):
        return [v for a in arg for v in flat(a)]
    return [arg]
