"""What the watch takes from a step: the inputs of one layer, kept by `ultraep::expert_load` while the layer is asked for.

And `ultraep::mark`, which tells the passes where a lifted layer begins and ends in a graph; it does nothing, and they erase it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_here = threading.local()
_asked = 0
"""How many threads ask for a layer: read at every step, so a plain number."""


@contextlib.contextmanager
def asking(site: str) -> Iterator[dict[str, Any]]:
    """Keep what the layer is given while the block runs, under `tensors` in what is yielded."""
    global _asked
    _here.site, _here.found = site, {}
    _asked += 1
    try:
        yield _here.found
    finally:
        _asked -= 1
        _here.site = None


def look(site: str, seen: Sequence[Tensor] | None) -> None:
    """Called by the layer's first op, in forward."""
    if _asked and seen is not None and getattr(_here, "site", None) == site and "tensors" not in _here.found:
        _here.found["tensors"] = [t.detach().clone() for t in seen]


@torch.library.custom_op("ultraep::mark", mutates_args=())
def mark(tensors: Sequence[Tensor], begins: bool) -> None:
    """A lifted layer begins with these inputs, or ends with these outputs."""


@mark.register_fake
def _(tensors: Sequence[Tensor], begins: bool) -> None:
    return None
