"""What ranks must have alike when a step begins: digests of it, compared in one exchange."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.exchange import line_of
from ultraep_compile.ops.alike import ordered_digest

Facts = dict[str, int]
"""What it is about -> 63 bits that are equal where it is."""
Shared = tuple[tuple[int, ...], Facts]
"""Ranks that must have facts alike, and this rank's, if it is one of them."""


def digest_of(*values: Any) -> int:
    """63 bits of the text of values."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 1


def batch_facts(batch: Any) -> Facts:
    """A digest of every value in a batch, under its path: of tensors on their own device, with one wait for all of them."""
    facts: Facts = {}
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for path, value in _values(batch, ""):
        if hasattr(value, "__array_interface__") and value.dtype.kind in "biuf":
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor):
            told = isinstance(value, (bool, int, float, str, bytes, type(None)))
            facts[path] = digest_of(type(value).__qualname__, value if told else "")
            continue
        facts[path] = digest_of(tuple(value.shape), str(value.dtype))
        if value.layout is torch.strided and not value.is_meta:
            sums.setdefault(value.device, {})[path] = ordered_digest(value)
    for found in sums.values():
        numbers = torch.stack(list(found.values())).tolist()
        facts |= {path: digest_of(facts[path], n) for path, n in zip(found, numbers, strict=True)}
    return facts


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a nest of mappings, sequences and dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _values(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _values(part, f"{path}[{index}]")
    else:
        yield path, value


def disagreements(shared: Sequence[Shared], group: dist.ProcessGroup) -> list[tuple[str, list[int]]]:
    """(what, ranks that have it otherwise than the first rank that shares it), equal on every rank. Collective.

    One digest for each entry of `shared` goes round; only where they differ are the facts themselves exchanged.

    Args:
        shared: every rank of the group lists the same ranks in the same order.

    Raises: PeerTimeoutError: some rank did not come in time.
    """
    line = line_of(group)
    rows = line.gather_objects([digest_of(sorted(facts.items())) for _, facts in shared], "the beginning of a step")
    odd = [n for n, (ranks, _) in enumerate(shared) if len({rows[r][n] for r in ranks}) > 1]
    if not odd:
        return []
    told = line.gather_objects([facts for _, facts in shared], "what ranks have alike")
    found = []
    for n in odd:
        first, *others = shared[n][0]
        for what in dict.fromkeys(w for r in shared[n][0] for w in told[r][n]):
            wanted = told[first][n].get(what)
            if differing := [r for r in others if told[r][n].get(what) != wanted]:
                found.append((what, differing))
    return found


def listed(names: Sequence[str], most: int = 4) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
