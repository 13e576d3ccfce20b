"""What really runs in a step, a call of a compiled model: noted by what runs, judged by `ultraep_compile.steps`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Step:
    """One call in progress."""

    outer: Step | None
    balanced: list[str] = field(default_factory=list)
    """Layers that ran balanced, in order."""
    own: list[Any] = field(default_factory=list)
    """Modules of lifted layers whose own forward ran in eager mode, though a compiled model called them."""


_here = threading.local()


def current() -> Step | None:
    """The step that this thread is in."""
    return getattr(_here, "step", None)


def enter() -> Step:
    _here.step = Step(current())
    return _here.step


def leave(step: Step) -> None:
    """What an inner compiled model ran, the outer one ran, too."""
    _here.step = step.outer
    if step.outer is not None:
        step.outer.balanced += step.balanced
        step.outer.own += step.own


def ran_balanced(layers: Iterable[str]) -> None:
    step = current()
    if step is not None:
        step.balanced += layers


def ran_own(module: Any) -> None:
    step = current()
    if step is not None:
        step.own.append(module)
