"""What a pool is made of: shapes and dtypes by name, their places in a rank's memory, and a comparison over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ultraep_compile.errors import PoolError

ALIGNMENT = 256  # bytes; any vector load and any cache line starts at a multiple of its size


@dataclass(frozen=True, slots=True)
class Region:
    """One named part of every rank's memory; the same on every rank."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def counters(ranks: int) -> Region:
    """A region for `handshake.arrive` and `handshake.await_all`: a count from each rank, then how often this rank
    has arrived and waited. These counts live on the device, so a CUDA graph that is replayed goes on counting."""
    return Region((ranks + 2,), torch.int32)


@dataclass(frozen=True, slots=True)
class Place:
    """A region and where it starts in a rank's memory, in bytes."""

    region: Region
    offset: int


def lay_out(regions: Mapping[str, Region]) -> tuple[dict[str, Place], int]:
    """Places by name, in the order of the names, and the bytes that a rank needs.

    Example: {"b": 10 bytes, "a": 4 bytes} puts a at 0 and b at 256, 512 bytes in all.
    """
    places, end = {}, 0
    for name in sorted(regions):
        region = regions[name]
        if any(not isinstance(n, int) or n < 0 for n in region.shape):
            raise PoolError(f"Region {name!r} has shape {tuple(region.shape)}: give non-negative integers.")
        places[name] = Place(region, end)
        end += -(-region.nbytes // ALIGNMENT) * ALIGNMENT
    return places, max(end, ALIGNMENT)


Specification = dict[str, dict[str, object]]
"""Fields by region name, in plain types that can be sent to other ranks."""


def describe(regions: Mapping[str, Region], **common: object) -> Specification:
    """The specification of a pool; `common` are further fields that all ranks must agree on."""
    fields = {f"region {name!r}": {"shape": tuple(r.shape), "dtype": str(r.dtype)} for name, r in regions.items()}
    return {**fields, "the pool": common}


def compare(specs: Sequence[Specification]) -> None:
    """Raise a `PoolError` that names the ranks whose specification differs from rank 0's, and in what."""
    complaints = []
    for rank, spec in enumerate(specs):
        for name in sorted(specs[0].keys() ^ spec.keys()):
            complaints.append(f"{name} is on rank {rank if name in spec else 0}, not on rank {0 if name in spec else rank}")
        for name in sorted(specs[0].keys() & spec.keys()):
            for field, other in specs[0][name].items():
                if spec[name][field] != other:
                    complaints.append(f"{field} of {name} is {spec[name][field]} on rank {rank}, {other} on rank 0")
    if complaints:
        raise PoolError(
            "The ranks ask for different symmetric memory: " + "; ".join(complaints[:8]) + ". "
            "Give every rank the same model, options and group."
        )
