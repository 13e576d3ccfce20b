"""Keep the compiler's caches honest: a pass that does nothing but carry a key of our sources and options.

AOTAutograd caches a backward by the graph it came from; the gradient formula of a custom op is no part of that graph, so
after an update of this package an old, wrong backward would be reused. A custom pass with a `uuid` is part of the key.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import ultraep_compile


@functools.cache
def source_digest() -> str:
    """Hash of every Python file of the package and of the torch version."""
    root = Path(ultraep_compile.__file__).parent
    text = hashlib.sha256(torch.__version__.encode())
    folders = [root, root / "passes", root / "codegen"]
    seen: set[Path] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if (real := path.resolve()) not in seen:
                seen.add(real)
                text.update(path.name.encode() + real.read_bytes())
    return text.hexdigest()


class CacheKeyPass(CustomGraphPass):
    """Changes nothing; its `uuid` makes a cached artefact of other sources or options a miss."""

    def __init__(self, options_digest: str) -> None:
        self.options_digest = options_digest

    def __call__(self, graph: fx.Graph) -> None:
        return None

    def uuid(self) -> str:
        return f"ultraep:{source_digest()}:{self.options_digest}"
