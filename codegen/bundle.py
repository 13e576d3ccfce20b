"""What travels with an expert: any number of tensors of any size, and the pool regions that slots of them need.

Symbols: R ranks, M masters per rank, S slots per rank; slot q = rank * S + slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ultraep_compile.errors import TopologyError
from ultraep_compile.symmetric import Region, counters

TILE = 4096  # elements that a program holds in registers at a time
CHUNK_BYTES = 128 * 1024  # about this much is passed on, or announced, at once


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one expert."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bundle:
    """All tensors of an expert, over ranks with masters and slots; a pool may hold several, told apart by `name`."""

    name: str
    ranks: int
    masters: int
    slots: int
    parts: tuple[Part, ...]
    chunk_bytes: int = field(default=CHUNK_BYTES)

    @classmethod
    def of(cls, name: str, ranks: int, slots: int, masters: Sequence[Tensor], hosted: int = 1, **more: int) -> Bundle:
        """From the tensors [hosted * M, ...] that hold the masters of this process's ranks."""
        leading = {t.shape[0] for t in masters}
        if len(leading) != 1 or (count := leading.pop()) % hosted:
            raise TopologyError(
                f"The tensors of bundle {name!r} hold {[t.shape[0] for t in masters]} experts over {hosted} ranks: "
                "give every tensor the same number of experts, a multiple of the ranks."
            )
        parts = tuple(Part(tuple(t.shape[1:]), t.dtype) for t in masters)
        return cls(name, ranks, count // hosted, slots, parts, **more)

    @property
    def total_slots(self) -> int:
        return self.ranks * self.slots

    def region_of(self, part: int) -> str:
        """The pool region [S, ...] that holds this rank's slots of one tensor."""
        return f"{self.name}.{part}"

    def slot_regions(self) -> dict[str, Region]:
        return {self.region_of(i): Region((self.slots, *p.shape), p.dtype) for i, p in enumerate(self.parts)}

    def route_regions(self) -> dict[str, Region]:
        """Lists that the routes kernel writes for the streaming kernels, in own memory; see codegen/routes.py."""
        return {
            f"{self.name}.route": Region((route_words(self),), torch.int32),
            f"{self.name}.targets": Region((2, max(1, self.total_slots)), torch.int64),
        }

    def replicate_regions(self) -> dict[str, Region]:
        """All regions of `codegen.replicate` for this bundle."""
        chunks = sum(chunks_of(p.nbytes, self.chunk_bytes) for p in self.parts)
        return {
            **self.slot_regions(),
            **self.route_regions(),
            f"{self.name}.chunks": Region((self.slots, chunks), torch.int32),
            f"{self.name}.arrived": Region((self.slots, len(self.parts)), torch.int32),
            f"{self.name}.free": counters(self.ranks),
        }

    def reduce_regions(self) -> dict[str, Region]:
        """All regions of `codegen.reduce` for this bundle of gradients."""
        return {
            **self.slot_regions(),
            **self.route_regions(),
            f"{self.name}.complete": counters(self.ranks),
            f"{self.name}.read": counters(self.ranks),
        }


def element_bytes(alignment: int) -> int:
    """Bytes of the integer type that a tensor is copied as: the widest that its addresses allow, at most 4."""
    return min(4, alignment)


def alignment_of(nbytes: int, *addresses: int) -> int:
    """The power of two, at most 16, that divides the size of an expert and every given address."""
    return math.gcd(16, nbytes, *addresses)


def chunks_of(nbytes: int, chunk_bytes: int) -> int:
    """Chunks of one tensor of an expert: the same on all ranks, whatever the alignment of their parameters."""
    return -(-nbytes // chunk_size(chunk_bytes))


def chunk_size(chunk_bytes: int) -> int:
    """Bytes of a chunk: `chunk_bytes` rounded up to whole tiles of the widest elements."""
    return -(-chunk_bytes // (4 * TILE)) * 4 * TILE


# positions in a route region: counters, then two lists (experts to push, slots to pass on) of sources and slots
EPOCH, ACTIVE = 0, 1  # ACTIVE + stage
SCRATCH_WORDS = 8


@dataclass(frozen=True, slots=True)
class RouteLayout:
    """Where the lists of one stage start in a route region, in int32 words."""

    source: int
    """Source (local expert or slot) of each active position."""
    first: int
    """Where the position's targets start in the list of slots."""
    fan: int
    """How many targets it has."""
    slot: int
    """Local slot of every target."""


def route_layout(bundle: Bundle, stage: int) -> RouteLayout:
    """stage 0: this rank's experts to slots; stage 1: this rank's slots to other slots."""
    sources = (bundle.masters, bundle.slots)
    start = SCRATCH_WORDS + (3 * sources[0] + bundle.total_slots) * stage
    n = sources[stage]
    return RouteLayout(start, start + n, start + 2 * n, start + 3 * n)


def route_words(bundle: Bundle) -> int:
    """Both stages' lists, then the sender of every slot and scratch for the tree, one word a slot each."""
    return sender_offset(bundle) + 3 * bundle.total_slots + bundle.ranks


def sender_offset(bundle: Bundle) -> int:
    last = route_layout(bundle, 1)
    return last.slot + bundle.total_slots
