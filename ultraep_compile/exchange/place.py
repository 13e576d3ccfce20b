"""Where this process is in its program, for messages and for ranks that compare notes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Place:
    """A point of a step. What is unknown is empty.

    Example: Place("layers.3.moe", "backward", 2) prints "layer layers.3.moe, backward, microbatch 2".
    """

    layer: str = ""
    phase: str = ""
    """forward, backward, optimizer, save, and the like."""
    microbatch: int = 0

    def __str__(self) -> str:
        if not (self.layer or self.phase):
            return "between steps"
        layer = [f"layer {self.layer}"] if self.layer else []
        return ", ".join([*layer, *filter(None, [self.phase]), f"microbatch {self.microbatch}"])


_here = Place()  # of the process, not of a thread: autograd runs backward on threads of its own


def here() -> Place:
    """The place that the process is at."""
    return _here


@contextlib.contextmanager
def at(layer: str | None = None, phase: str | None = None, microbatch: int | None = None) -> Iterator[None]:
    """The process is there while the block runs; what is None stays as it is."""
    global _here
    before, given = _here, {"layer": layer, "phase": phase, "microbatch": microbatch}
    _here = replace(before, **{name: value for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        _here = before
