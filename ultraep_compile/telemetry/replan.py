"""What the same loads would have become with other numbers of slots: planned again on a sample of records."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ultraep_compile.telemetry.trace import LayerTrace, Trace


def other_slots(
    trace: Trace, slots: tuple[int, ...] = (0, 1, 2, 4), sample: int = 64, limit_s: float = 15.0
) -> list[dict[str, Any]]:
    """One row per number of slots, over the same records for all.

    Keys: `slots`, `records`, `p50`, `p99` and `bound` (imbalance; the bound's median), `replicas` per
    record, `remote` (share of rows that leave their rank), `plan_seconds` (median on this machine),
    `slot_bytes` per rank (None if the size of an expert is unknown). Numbers of slots that some layer
    cannot have are left out; planning stops at `limit_s` seconds, with fewer records.
    """
    deadline = time.monotonic() + limit_s
    possible = min((layer.experts - layer.masters for layer in trace), default=0)
    wanted = sorted({*slots, *(layer.slots for layer in trace)})
    found: dict[int, list[tuple[float, ...]]] = {count: [] for count in wanted if count <= possible}
    for layer, n in _sample(trace, sample):
        if time.monotonic() > deadline:
            break
        counts_RE = torch.from_numpy(layer.counts_nRE[n])
        for count, row in found.items():
            row.append(_plan_once(counts_RE, count))
    sizes = [layer.facts.get("expert_bytes") for layer in trace]
    largest = max((size for size in sizes if size is not None), default=None) if all(sizes) else None
    return [_summary_row(count, row, largest) for count, row in found.items() if row]


def _sample(trace: Trace, sample: int) -> list[tuple[LayerTrace, int]]:
    """At most about `sample` records with full matrices, even over layers and over time."""
    layers = [layer for layer in trace if len(layer.detail_n)]
    if not layers:
        return []
    layers = layers[:: -(-len(layers) // sample)]
    each = max(1, sample // len(layers))
    return [
        (layer, int(n))
        for layer in layers
        for n in np.unique(np.linspace(0, len(layer.detail_n) - 1, each).round().astype(int))
    ]


def _plan_once(counts_RE: torch.Tensor, slots: int) -> tuple[float, ...]:
    from ultraep_compile import planner

    start = time.perf_counter()
    plan = planner.make_plan(counts_RE, slots)
    seconds = time.perf_counter() - start
    rows = max(1, int(counts_RE.sum()))
    return (
        planner.imbalance(planner.loads_after(plan)),
        planner.lower_bound(counts_RE, slots),
        planner.replica_count(plan),
        int(planner.remote_tokens(plan).sum()) / rows,
        seconds,
    )


def _summary_row(slots: int, row: list[tuple[float, ...]], expert_bytes: int | None) -> dict[str, Any]:
    imbalance, bound, replicas, remote, seconds = (np.array(column) for column in zip(*row, strict=True))
    return {
        "slots": slots,
        "records": len(row),
        "p50": float(np.percentile(imbalance, 50)),
        "p99": float(np.percentile(imbalance, 99)),
        "bound": float(np.percentile(bound, 50)),
        "replicas": float(replicas.mean()),
        "remote": float(remote.mean()),
        "plan_seconds": float(np.median(seconds)),
        "slot_bytes": None if expert_bytes is None else slots * expert_bytes,
    }
