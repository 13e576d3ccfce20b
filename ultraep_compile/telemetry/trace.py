"""What a trace holds: loads of every MoE layer, microbatch by microbatch, before and after balancing.

Symbols: N records of a layer, n of them with full detail, R ranks, E experts, S slots per rank, M = E/R,
P = R*(M+S) physical experts. Loads count routed rows, i.e. tokens times top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
UNKNOWN = -1  # in realised_NP and rounds_N: nobody reported it


@dataclass(slots=True)
class LayerTrace:
    """All records of one MoE layer.

    `expert_load_NE` is what the router asked of each expert, `source_load_NR` the rows that each rank
    routed, `slot_expert_NRS` the expert in each slot (-1 = empty), `quota_NP` the rows planned for each
    physical expert, `realised_NP` those it really got (-1 = not reported) and `kept_N2` the rows that do
    not leave their rank, without and with balancing. `seconds` holds the duration of each phase (NaN = not
    reported). `counts_nRE` and `shares_nRP` are the full matrices of the records `detail_n`, with the
    source rank first.
    """

    name: str
    ranks: int
    experts: int
    slots: int
    microbatch_N: IntArray
    expert_load_NE: IntArray
    source_load_NR: IntArray
    slot_expert_NRS: IntArray
    quota_NP: IntArray
    realised_NP: IntArray
    kept_N2: IntArray
    rounds_N: IntArray
    detail_n: IntArray
    counts_nRE: IntArray
    shares_nRP: IntArray
    seconds: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)  # top_k, expert_bytes, row_bytes, flops_per_row
    seen: int = 0  # microbatches that passed through the layer, recorded or not

    def __len__(self) -> int:
        """N, the number of records."""
        return len(self.microbatch_N)

    @property
    def masters(self) -> int:
        """M, master experts per rank."""
        return self.experts // self.ranks

    @property
    def before_NR(self) -> IntArray:
        """Rows per rank if every row went to its expert's master."""
        return self.expert_load_NE.reshape(len(self), self.ranks, self.masters).sum(-1)

    @property
    def after_NR(self) -> IntArray:
        """Rows per rank as planned."""
        return self.quota_NP.reshape(len(self), self.ranks, -1).sum(-1)

    @property
    def realised_NR(self) -> IntArray:
        """Rows per rank as they really arrived, -1 where a physical expert of the rank did not report."""
        realised = self.realised_NP.reshape(len(self), self.ranks, -1)
        return np.where((realised < 0).any(-1), UNKNOWN, realised.sum(-1))

    @property
    def slot_quota_NRS(self) -> IntArray:
        """Rows planned for each slot."""
        return self.quota_NP.reshape(len(self), self.ranks, -1)[:, :, self.masters :]

    @property
    def replicas_N(self) -> IntArray:
        """Filled slots of each record, i.e. copies of experts that travelled."""
        return (self.slot_expert_NRS >= 0).sum((1, 2))

    @property
    def leaving_N2(self) -> IntArray:
        """Rows that leave their rank, without and with balancing."""
        return self.source_load_NR.sum(-1, keepdims=True) - self.kept_N2

    def traffic(self) -> tuple[IntArray, IntArray]:
        """Rows from rank to rank [R, R], source first, without and with balancing; summed over the detail."""
        n = len(self.detail_n)
        before = self.counts_nRE.reshape(n, self.ranks, self.ranks, -1).sum((0, -1))
        after = self.shares_nRP.reshape(n, self.ranks, self.ranks, -1).sum((0, -1))
        return before, after


@dataclass(slots=True)
class Trace:
    """A recorded run: its layers in the order of their first record, and what is known of the recording.

    `info` is JSON: `seen`, `thinned`, `dropped` (records), `stride`, `detail_stride` (every how many
    microbatches are kept), `title`, `notes`, `torch`, `started` (seconds since 1970).
    """

    layers: list[LayerTrace] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Records over all layers."""
        return sum(len(layer) for layer in self.layers)

    def __iter__(self) -> Iterator[LayerTrace]:
        return iter(self.layers)

    @property
    def ranks(self) -> int:
        """R, the largest over the layers; 0 when the trace is empty."""
        return max((layer.ranks for layer in self.layers), default=0)


def imbalance_N(loads_NR: NDArray[Any]) -> NDArray[np.float64]:
    """max/mean over ranks of each record, 1.0 where there are no rows; as `planner.imbalance`."""
    total_N = loads_NR.sum(-1)
    return np.where(total_N > 0, loads_NR.max(-1) * loads_NR.shape[-1] / np.maximum(total_N, 1), 1.0)


def layer_shapes(
    ranks: int, experts: int, slots: int, n_records: int, n_detail: int
) -> dict[str, tuple[int, ...]]:
    """The shape that each array of a layer must have."""
    physical = experts + ranks * slots
    return {
        "microbatch_N": (n_records,),
        "expert_load_NE": (n_records, experts),
        "source_load_NR": (n_records, ranks),
        "slot_expert_NRS": (n_records, ranks, slots),
        "quota_NP": (n_records, physical),
        "realised_NP": (n_records, physical),
        "kept_N2": (n_records, 2),
        "rounds_N": (n_records,),
        "detail_n": (n_detail,),
        "counts_nRE": (n_detail, ranks, experts),
        "shares_nRP": (n_detail, ranks, physical),
    }
