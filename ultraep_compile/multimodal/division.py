"""Divide a batch: samples into microbatches, and the inputs of encoders into items.

Inputs of an encoder need not have a row per sample: images of all samples may be packed in one tensor, some samples have
several and some have none. Which sample an item belongs to follows from the placeholders in its tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.anatomy import Group, Stream

SAMPLE = "sample_of_microbatch"
"""Input of a generator that works on one sample: (its number in the microbatch, samples there)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the items of an encoder lie in one input: item i has rows starts[i] to starts[i + 1]."""

    key: str
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """Items of an encoder in a batch."""

    rows: tuple[Rows, ...]
    first: tuple[int, ...]
    """Sample s has items first[s] to first[s + 1]."""
    filler: tuple[bool, ...]
    """Samples whose items are padding: no placeholder waits for them."""

    def of(self, samples: range) -> range:
        if all(self.filler[s] for s in samples):
            return range(0)
        return range(self.first[samples.start], self.first[samples.stop])

    def take(self, batch: Mapping[str, Any], items: range) -> dict[str, Any]:
        """Inputs of some items; none at all for no item."""
        if not items:
            return {}
        return {r.key: batch[r.key][r.starts[items.start] : r.starts[items.stop]] for r in self.rows}


class Division:
    """A batch with its samples and items.

    Raises:
        PartsError: it is not clear which sample an item belongs to, or a modality is missing.
    """

    def __init__(self, batch: Mapping[str, Any], groups: Sequence[Group], sample_key: str) -> None:
        if not isinstance(batch.get(sample_key), Tensor):
            raise PartsError(f"the batch has no {sample_key!r}, whose rows are its samples; it has {sorted(batch)}")
        self.batch, self.groups = batch, groups
        self.samples = len(batch[sample_key])
        self.items = {g.name: [self._items(g.name, s) for s in g.streams] for g in groups}
        self.by_item = {r.key for streams in self.items.values() for items in streams if items for r in items.rows}

    def _items(self, encoder: str, stream: Stream) -> Items | None:
        """None for a stream without inputs in this batch."""
        given = [k for k in stream.keys if isinstance(self.batch.get(k), Tensor)]
        marks = self._marks(stream)
        if not given:
            if stream.required or (marks and sum(marks)):
                why = (
                    f"{sum(marks)} placeholder tokens wait for features of"
                    if marks and sum(marks)
                    else "the model does not run without"
                )
                raise PartsError(f"missing modality: {why} {encoder}, but the batch has no {' or '.join(stream.keys)}")
            return None
        lengths = {k: len(self.batch[k]) for k in given}
        count = min(lengths.values())
        weights = {k: self._weights(encoder, given, count, n) for k, n in lengths.items() if n != count}
        belongs = self._belongs(encoder, stream, marks, count, list(weights.values()))
        rows = tuple(Rows(k, tuple(itertools.accumulate(weights.get(k, [1] * count), initial=0))) for k in given)
        filler = [bool(marks) and not m and not stream.required for m in marks or belongs]
        return Items(rows, tuple(itertools.accumulate(belongs, initial=0)), tuple(filler))

    def _marks(self, stream: Stream) -> list[int]:
        """Placeholders in each sample."""
        if stream.placeholder is None or not isinstance(self.batch.get(stream.placeholder[0]), Tensor):
            return []
        ids = self.batch[stream.placeholder[0]]
        return torch.isin(ids, torch.tensor(stream.placeholder[1], device=ids.device)).sum(-1).tolist()

    def _weights(self, encoder: str, given: list[str], count: int, rows: int) -> list[int]:
        """Rows of each item in a packed input: some product or entry of a table with a row per item that adds up."""
        for key in given:
            table = self.batch[key]
            if len(table) == count and not table.is_floating_point():
                flat = table.reshape(count, -1).long()
                for weights in (flat.prod(-1), flat.sum(-1), *flat.unbind(-1)):
                    total = int(weights.sum())
                    if total and rows % total == 0:
                        return (weights * (rows // total)).tolist()
        raise PartsError(
            f"cannot tell the items of {encoder} apart: {', '.join(f'{k} has {len(self.batch[k])} rows' for k in given)}, and no "
            "input says how many rows an item has. Give the sizes as the model's processor does, one row per item."
        )

    def _belongs(
        self, encoder: str, stream: Stream, marks: list[int], count: int, packed: list[list[int]]
    ) -> list[int]:
        """Items of each sample."""
        if count == self.samples and self._filled_up(stream, marks):
            return [1] * count
        if marks and sum(marks):
            for weights in (*packed, [1] * count):
                found = _fill(weights, marks)
                if found is not None:
                    return found
            runs = self._runs(stream)
            if sum(runs) == count:
                return runs
        if count == self.samples:
            return [1] * count
        raise PartsError(
            f"cannot split the batch: {count} items of {encoder} for {self.samples} samples"
            + (f" with {marks} placeholder tokens" if marks else "")
            + ". Give one item per sample, items of equal size, or tokens between the items of a sample."
        )

    def _filled_up(self, stream: Stream, marks: list[int]) -> bool:
        """Samples without placeholders have rows all the same, of nothing."""
        rows = [
            self.batch[k]
            for k in stream.keys
            if isinstance(self.batch.get(k), Tensor) and self.batch[k].is_floating_point()
        ]
        return 0 in marks and not any(bool(row[s].any()) for row in rows for s, m in enumerate(marks) if not m)

    def _runs(self, stream: Stream) -> list[int]:
        """Unbroken runs of placeholders in each sample."""
        assert stream.placeholder is not None
        ids = self.batch[stream.placeholder[0]]
        here = torch.isin(ids, torch.tensor(stream.placeholder[1], device=ids.device))
        start = here.clone()
        start[:, 1:] &= ~here[:, :-1]
        return start.sum(-1).tolist()

    def inputs(self, samples: range) -> dict[str, Any]:
        """The batch of some samples. What has no row per sample stays whole: flags, tables."""
        found: dict[str, Any] = {}
        for key, value in self.batch.items():
            if key not in self.by_item:
                found[key] = self._of_samples(value, samples)
        for items in itertools.chain.from_iterable(self.items.values()):
            if items is not None:
                found |= items.take(self.batch, items.of(samples))
        return found

    def _of_samples(self, value: Any, samples: range) -> Any:
        part = slice(samples.start, samples.stop)
        if isinstance(value, Tensor):
            if value.dim() and len(value) == self.samples:
                return value[part]
            if value.dim() > 1 and value.shape[1] == self.samples:  # rotary positions [3, samples, length]
                return value[:, part]
            return value
        return value[part] if isinstance(value, (list, tuple)) and len(value) == self.samples else value

    def encoder_items(self, group: Group, samples: range) -> list[dict[str, Any]]:
        """What the encoder is to run on for some samples, piece by piece: stream after stream, as in the model."""
        streams = [i for i in self.items[group.name] if i is not None and i.of(samples)]
        padded = any(i.filler[s] and i.first[s] < i.first[s + 1] for i in streams for s in samples)
        if padded or group.item == "microbatch":  # what an encoder makes of padding shows only beside the rest
            inputs = self.inputs(samples)
            return [{k: v for k, v in inputs.items() if k not in self.by_item or k in group.keys}] if streams else []
        pieces = []
        for items in streams:
            for sample in samples:
                mine = items.of(range(sample, sample + 1))
                beside = {k: v for k, v in self.inputs(range(sample, sample + 1)).items() if k not in self.by_item}
                for piece in [range(i, i + 1) for i in mine] if group.item == "row" else [mine]:
                    pieces += [{**beside, **items.take(self.batch, piece)}] if piece else []
        return pieces

    def generator_items(self, samples: range) -> list[dict[str, Any]]:
        """What a generator is to run on, sample by sample."""
        each = [self.inputs(range(s, s + 1)) for s in samples]
        return [{**inputs, SAMPLE: (i, len(each))} for i, inputs in enumerate(each)]


def _fill(weights: Sequence[int], marks: Sequence[int]) -> list[int] | None:
    """How many items fill each sample, in order, if an item makes placeholders in proportion to its weight; None if they do not.

    _fill([16, 64, 16], [20, 0, 4]) == [2, 0, 1]
    """
    total, marked = sum(weights), sum(marks)
    if any(w * marked % total for w in weights):
        return None
    left: Iterator[int] = iter(weights)
    counts = []
    for mark in marks:
        need, count = mark * total, 0
        while need > 0:
            need -= next(left, need + 1) * marked
            count += 1
        if need < 0:
            return None
        counts.append(count)
    return counts


def even(total: int, parts: int) -> list[range]:
    """Contiguous ranges whose lengths differ by one at most. even(7, 3): lengths 3, 2, 2."""
    edges = [total * i // parts for i in range(parts + 1)]
    sizes = sorted((b - a for a, b in itertools.pairwise(edges)), reverse=True)
    starts = list(itertools.accumulate(sizes, initial=0))
    return [range(a, b) for a, b in itertools.pairwise(starts)]
