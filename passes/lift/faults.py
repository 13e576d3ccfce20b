"""Whose mistake an exception is. A model's own forward may raise what it likes, on a batch that it was not made for; anything else is a
bug of this package: it is told as such, and never becomes a reason that the layer is to blame for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ultraep_compile.passes.lift.values import Refusal

T = TypeVar("T")
_PACKAGE = Path(__file__).parents[2]


class ModelFault(Refusal):
    """The module's own forward, or its backward, raises on a probe batch."""


def run_theirs(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call what is not ours: an op as the model asked for it, a module, a forward. What it raises is the model's own."""
    return function(*args, **kwargs)


_THEIRS = frozenset({run_theirs.__name__, "invoke", "own_forward", "_gathered_forward", "spied_read", "spied_write"})
"""Functions of ours that do nothing but call what is not."""


def is_theirs(fault: BaseException) -> bool:
    """Was an exception raised in what `run_theirs` has called, not by way of ours again?"""
    ours = _frames(fault, inside=True)
    return bool(ours) and ours[-1].name in _THEIRS


def told(fault: BaseException) -> str:
    """`TYPE: text (file:line)`: the first line of an exception, and the innermost line of the model's where there is one."""
    lines = str(fault).strip().splitlines()
    outside = [
        f for f in _frames(fault, inside=False) if "/torch/" not in f.filename and not f.filename.startswith("<")
    ]
    at = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(fault).__name__}: {lines[0][:300] if lines else 'without a message'}{at}"


def internal_error(fault: BaseException) -> str:
    """The reason for a miss that is a bug of ours: `internal error TYPE at FILE:LINE: text`, the line being the innermost of ours."""
    frames = _frames(fault, inside=True)
    at = f" at {Path(frames[-1].filename).relative_to(_PACKAGE.parent)}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(fault).split())[:200]
    return f"internal error {type(fault).__name__}{at}{': ' if text else ''}{text}. This is a bug of ultraep_compile; please report it"


def _frames(fault: BaseException, *, inside: bool) -> list[traceback.FrameSummary]:
    prefix = f"{_PACKAGE}/"
    return [f for f in traceback.extract_tb(fault.__traceback__) if f.filename.startswith(prefix) == inside]
