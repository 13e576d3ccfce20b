"""The records a recorder holds, bounded: what is kept, what is thinned away, and how they become a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.telemetry.pending import Pending
from ultraep_compile.telemetry.trace import UNKNOWN, LayerTrace, Trace, layer_shapes

RECORD_OVERHEAD = 1000  # bytes of Python objects around the arrays of one record


@dataclass(slots=True)
class Record:
    """One microbatch of one layer.

    Once its copies have arrived it has either `detail`, the arrays as recorded, or the `loads` that
    `reduce_loads` makes of them.
    """

    group: int
    microbatch: int
    detail: dict[str, NDArray[Any]] | None = None
    loads: dict[str, NDArray[Any]] | None = None
    realised_P: NDArray[Any] | None = None
    rounds: int = UNKNOWN
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Group:
    """Records of a layer that agree in ranks, experts and slots."""

    name: str
    ranks: int
    experts: int
    slots: int
    seen: int = 0
    phases: dict[str, None] = field(default_factory=dict)  # in the order of their first appearance

    @property
    def physical(self) -> int:
        return self.experts + self.ranks * self.slots

    @property
    def record_bytes(self) -> int:
        """Bytes of a record without detail."""
        return RECORD_OVERHEAD + 4 * (self.experts + self.ranks * (1 + self.slots) + 2 * self.physical)

    @property
    def detail_bytes(self) -> int:
        return 4 * self.ranks * (self.experts + self.physical)


class Store:
    """Keeps microbatches whose index divides by `stride`, and their full matrices where it divides by
    `detail_stride`; both strides double whenever a bound is reached. Callers hold the
    recorder's lock."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.info: dict[str, Any] = {}
        self.dropped = 0  # records lost to a full queue or to bounds that no thinning can meet
        self._max_records, self._max_record_bytes = max_records, max_bytes // 2
        self._max_detail_bytes = max_bytes - max_bytes // 2
        self._stride = self._detail_stride = 1
        self._thinned = self._next = self._bytes = self._detail_bytes = 0
        self._groups: dict[tuple[str, int, int, int], int] = {}
        self._group_list: list[Group] = []
        self._facts: dict[str, dict[str, int]] = {}
        self._records: dict[int, Record] = {}

    def admit(self, layer: str, ranks: int, experts: int, slots: int) -> int:
        """Count one microbatch of a layer; returns a record number, or -1 if thinning leaves it out."""
        key = (layer, ranks, experts, slots)
        if key not in self._groups:
            self._groups[key] = len(self._group_list)
            self._group_list.append(Group(layer, ranks, experts, slots))
        index = self._groups[key]
        group = self._group_list[index]
        microbatch = group.seen
        group.seen += 1
        while microbatch % self._stride == 0 and self._full(group):
            if not self._thin():
                self.dropped += 1
                return -1
        if microbatch % self._stride:
            self._thinned += 1
            return -1
        number = self._next
        self._next += 1
        self._bytes += group.record_bytes
        self._records[number] = Record(index, microbatch)
        return number

    def knows(self, number: int) -> bool:
        """Whether the record is still held."""
        return number in self._records

    def forget(self, number: int) -> None:
        """Drop one record."""
        record = self._records.pop(number)
        group = self._group_list[record.group]
        self._bytes -= group.record_bytes
        if record.detail is not None:
            self._detail_bytes -= group.detail_bytes

    def describe(self, layer: str, facts: Mapping[str, int]) -> None:
        """Static facts of a layer, by the name it is recorded under."""
        self._facts.setdefault(layer, {}).update(facts)

    def is_described(self, layer: str) -> bool:
        """Whether static facts of a layer are known."""
        return layer in self._facts

    def settle(self, piece: Pending) -> None:
        """Take what has arrived from the device; nothing happens if the record was thinned away meanwhile."""
        record = self._records.get(piece.number)
        if record is None:
            return
        group, arrays = self._group_list[record.group], piece.arrays()
        if "realised_P" in arrays:
            new, old = arrays.pop("realised_P"), record.realised_P
            assert new.shape == (group.physical,), new.shape
            record.realised_P = new if old is None else np.where(new >= 0, new, old)
        if "rounds" in arrays:
            record.rounds = max(record.rounds, int(arrays.pop("rounds").max(initial=UNKNOWN)))
        if piece.rounds is not None:
            record.rounds = max(record.rounds, piece.rounds)
        for phase, seconds in piece.times().items():
            group.phases.setdefault(phase)
            record.seconds[phase] = record.seconds.get(phase, 0.0) + seconds
        if "counts_RE" in arrays:
            if self._room_for_detail(record, group):
                record.detail = arrays
                self._detail_bytes += group.detail_bytes
            else:
                record.loads = reduce_loads(group, arrays)

    def snapshot(self) -> tuple[list[tuple[Group, tuple[str, ...], list[Record]]], dict[str, Any]]:
        """Groups with phases and settled records, and the info: cheap, for `build_trace` without a lock."""
        records: list[list[Record]] = [[] for _ in self._group_list]
        for record in self._records.values():
            if record.detail is not None or record.loads is not None:
                records[record.group].append(record)
        groups = [(g, tuple(g.phases), records[i]) for i, g in enumerate(self._group_list)]
        info = self.info | {
            "seen": sum(group.seen for group in self._group_list),
            "thinned": self._thinned,
            "dropped": self.dropped,
            "stride": self._stride,
            "detail_stride": self._detail_stride,
            "facts": {name: dict(facts) for name, facts in self._facts.items()},
        }
        return groups, info

    def _full(self, group: Group) -> bool:
        too_large = self._bytes + group.record_bytes > self._max_record_bytes
        return len(self._records) >= self._max_records or too_large

    def _thin(self) -> bool:
        """Double the stride; False if no record would go: each layer has its first microbatch only."""
        if not any(record.microbatch for record in self._records.values()):
            return False
        self._stride *= 2
        self._detail_stride = max(self._detail_stride, self._stride)
        for number in [n for n, record in self._records.items() if record.microbatch % self._stride]:
            self.forget(number)
            self._thinned += 1
        return True

    def _room_for_detail(self, record: Record, group: Group) -> bool:
        """Whether this record keeps its full matrices; may take them from others by doubling the stride."""
        while record.microbatch % self._detail_stride == 0:
            if self._detail_bytes + group.detail_bytes <= self._max_detail_bytes:
                return True
            holders = [r for r in self._records.values() if r.detail is not None]
            if not any(r.microbatch for r in holders):
                return False
            self._detail_stride *= 2
            for holder in holders:
                if holder.microbatch % self._detail_stride:
                    self._drop_detail(holder)
        return False

    def _drop_detail(self, record: Record) -> None:
        if record.detail is not None:
            group = self._group_list[record.group]
            record.loads = reduce_loads(group, record.detail)  # first: a writer may be reading the record
            record.detail = None
            self._detail_bytes -= group.detail_bytes


def reduce_loads(group: Group, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The loads of one record, named as in `LayerTrace`, from its full matrices."""
    counts_RE, shares_RP = full_matrices(group, arrays)
    own, ranks = np.arange(group.ranks), group.ranks
    kept = [matrix.reshape(ranks, ranks, -1)[own, own].sum() for matrix in (counts_RE, shares_RP)]
    loads = {
        "expert_load_NE": counts_RE.sum(0),
        "source_load_NR": counts_RE.sum(1),
        "slot_expert_NRS": arrays.get("slot_expert_RS", np.full((ranks, group.slots), -1)),
        "quota_NP": shares_RP.sum(0),
        "kept_N2": np.array(kept),
    }
    small = counts_RE.sum() < 2**31 and group.experts < 2**31
    return {name: load.astype(np.int32 if small else np.int64) for name, load in loads.items()}


def full_matrices(
    group: Group, arrays: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """counts_RE and shares_RP of a record; without a plan everything goes to the masters."""
    counts_RE, shares_RP = arrays["counts_RE"].astype(np.int64), arrays.get("shares_RP")
    if shares_RP is None:
        ranks = group.ranks
        shares = np.zeros((ranks, ranks, group.physical // ranks), dtype=np.int64)
        shares[:, :, : group.experts // ranks] = counts_RE.reshape(ranks, ranks, -1)
        shares_RP = shares.reshape(ranks, -1)
    return counts_RE, shares_RP.astype(np.int64)


def build_trace(groups: list[tuple[Group, tuple[str, ...], list[Record]]], info: Mapping[str, Any]) -> Trace:
    """A trace from a snapshot; layers without a record are left out. Equal names get their shape appended."""
    info = dict(info)
    facts = info.pop("facts", {})
    names = [group.name for group, _, _ in groups]
    layers = []
    for group, phases, records in groups:
        if not records:
            continue
        records = sorted(records, key=lambda record: record.microbatch)
        details = [record.detail for record in records]  # read once: training goes on meanwhile
        detailed = [n for n, detail in enumerate(details) if detail is not None]
        matrices = [full_matrices(group, detail) for detail in details if detail is not None]
        missing = np.full(group.physical, UNKNOWN)
        realised = [record.realised_P for record in records]
        loads = [
            reduce_loads(group, detail) if detail is not None else record.loads or {}
            for record, detail in zip(records, details, strict=True)
        ]
        columns = {name: [load[name] for load in loads] for name in loads[0]} | {
            "microbatch_N": [record.microbatch for record in records],
            "realised_NP": [missing if row is None else row for row in realised],
            "rounds_N": [record.rounds for record in records],
            "detail_n": detailed,
            "counts_nRE": [counts_RE for counts_RE, _ in matrices],
            "shares_nRP": [shares_RP for _, shares_RP in matrices],
        }
        shapes = layer_shapes(group.ranks, group.experts, group.slots, len(records), len(detailed))
        arrays = {
            name: np.array(columns[name], dtype=np.int64).reshape(shape) for name, shape in shapes.items()
        }
        seconds = {
            phase: np.array([record.seconds.get(phase, np.nan) for record in records], dtype=np.float32)
            for phase in phases
        }
        name = group.name
        if names.count(name) > 1:
            name = f"{name} ({group.ranks} ranks, {group.experts} experts, {group.slots} slots)"
        layers.append(
            LayerTrace(
                name=name,
                ranks=group.ranks,
                experts=group.experts,
                slots=group.slots,
                seconds=seconds,
                facts=dict(facts.get(group.name, {})),
                seen=group.seen,
                **arrays,
            )
        )
    return Trace(layers, info)
