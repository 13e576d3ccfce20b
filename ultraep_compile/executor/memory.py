"""Bytes of activations that autograd keeps on a rank, counted as they are saved and let go."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

KINDS = ("encoder", "llm", "generator")


@dataclass(slots=True)
class Meter:
    """What forwards have saved for their backwards: storages, each once per microbatch, without parameters.

    Off, it costs nothing. Saved inside an activation checkpoint: what the checkpoint itself keeps is not seen."""

    on: bool = False
    parameters: set[int] = field(default_factory=set)  # storage addresses
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    held: dict[tuple[str, Hashable], int] = field(default_factory=dict)

    def start(self) -> None:
        """Forget the peaks of the step before."""
        self.peak = dict(self.now)

    @contextlib.contextmanager
    def holding(self, kind: str, key: Hashable) -> Iterator[None]:
        """Count what is saved inside the block under `key`, until it is released."""
        if not self.on:
            yield
            return
        seen: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in seen and address not in self.parameters:
                seen.add(address)
                self._add(kind, key, storage.nbytes())
            return tensor.detach()  # the tensor itself would make a cycle where it is the node's own output

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _add(self, kind: str, key: Hashable, size: int) -> None:
        self.held[kind, key] = self.held.get((kind, key), 0) + size
        self.now[kind] += size
        self.peak[kind] = max(self.peak[kind], self.now[kind])

    def release(self, kind: str, key: Hashable) -> None:
        """The backward of `key` is done."""
        self.now[kind] -= self.held.pop((kind, key), 0)
