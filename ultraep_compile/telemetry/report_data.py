"""The data inside the report: packed arrays and plain numbers, bounded for any trace.

Small arrays of every record (imbalance, shares, replicas) are always there. Loads per rank over time and
the split by expert are thinned evenly when the trace is large; the split by expert always has the worst
records too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ultraep_compile.telemetry.replan import other_slots
from ultraep_compile.telemetry.summary import all_columns, even_choice, summarize
from ultraep_compile.telemetry.trace import LayerTrace, Trace

SERIES_BYTES = 4_500_000  # loads per rank over time, over all layers
DETAIL_BYTES = 3_000_000  # loads per expert and copy
TRAFFIC_VALUES = 800_000  # entries of rank-to-rank matrices
SCATTER_POINTS = 20_000  # planned against realised
CURVE_POINTS = 4_000  # of one extra curve
WORST = 4  # records per layer that are always shown by expert, for each of before and after

Curves = Mapping[str, tuple[ArrayLike, ArrayLike]]


def pack(values: ArrayLike) -> dict[str, Any]:
    """An array as type, shape and base64 of little-endian numbers; integers in as few bytes as they need."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        kind = "f4"
    else:
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        fits = [k for k in ("u1", "i1", "u2", "i2", "u4", "i4") if _holds(k, low, high)]
        kind = fits[0] if fits else "f8"
    data = np.ascontiguousarray(array, dtype=f"<{kind}").tobytes()
    return {"t": kind, "s": list(array.shape), "d": base64.b64encode(data).decode()}


def report_data(
    trace: Trace, title: str, curves: Curves | None = None, notes: Iterable[str] = ()
) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON."""
    columns = all_columns(trace)
    summary = summarize(trace, columns).as_dict()
    per_layer = summary.pop("per_layer")
    count = max(1, len(trace.layers))
    layers = []
    for layer, column, numbers in zip(trace, columns, per_layer, strict=True):
        layers.append(
            {
                "name": layer.name,
                "ranks": layer.ranks,
                "experts": layer.experts,
                "slots": layer.slots,
                "seen": layer.seen,
                "facts": layer.facts,
                "summary": numbers["loads"],
                "microbatch": pack(layer.microbatch_N),
                "records": {name: pack(values) for name, values in column.items() if name != "seconds"},
                "series": _series(layer, SERIES_BYTES // count),
                "detail": _detail(layer, column, DETAIL_BYTES // count),
                "traffic": _traffic(layer, TRAFFIC_VALUES // count),
                "realised": _realised(layer, SCATTER_POINTS // count),
                "seconds": {phase: _percentiles(values) for phase, values in layer.seconds.items()},
                "rounds": int(layer.rounds_N.max(initial=-1)),
            }
        )
    return {
        "title": title,
        "notes": [str(note) for note in notes],
        "summary": summary,
        "info": {
            key: trace.info.get(key) for key in ("seen", "thinned", "dropped", "stride", "torch", "started")
        },
        "layers": layers,
        "slots": other_slots(trace),
        "curves": [_curve(str(name), *xy) for name, xy in (curves or {}).items()],
    }


def _holds(kind: str, low: int, high: int) -> bool:
    limits = np.iinfo(kind)
    return low >= limits.min and high <= limits.max


def _width(*arrays: NDArray[np.int64]) -> int:
    """Bytes that `pack` will take for one of these loads."""
    return 2 if max(array.max(initial=0) for array in arrays) < 1 << 16 else 4


def _series(layer: LayerTrace, budget: int) -> dict[str, Any]:
    """Loads per rank over time, without and with balancing."""
    before_NR, after_NR = layer.before_NR, layer.after_NR
    index = even_choice(len(layer), budget // (2 * layer.ranks * _width(before_NR, after_NR)))
    return {"index": pack(index), "before": pack(before_NR[index]), "after": pack(after_NR[index])}


def _detail(layer: LayerTrace, column: dict[str, NDArray[Any]], budget: int) -> dict[str, Any]:
    """Loads of every expert and copy; an even choice of records and the worst ones."""
    numbers = layer.experts + layer.quota_NP.shape[1] + layer.ranks * (layer.slots + 1)
    each = numbers * _width(layer.expert_load_NE)
    index = even_choice(len(layer), max(WORST, budget // each - 2 * WORST))
    if len(index) < len(layer):
        worst = [np.argsort(-column[name], kind="stable")[:WORST] for name in ("before", "after")]
        index = np.unique(np.concatenate([index, *worst]))
    return {
        "index": pack(index),
        "load": pack(layer.expert_load_NE[index]),
        "quota": pack(layer.quota_NP[index]),
        "slot": pack(layer.slot_expert_NRS[index]),
        "realised": pack(layer.realised_NR[index]),
    }


def _traffic(layer: LayerTrace, budget: int) -> dict[str, Any] | None:
    """Mean rows per microbatch from rank to rank; None without full matrices or with too many ranks."""
    n = len(layer.detail_n)
    if n == 0 or 2 * layer.ranks**2 > budget:
        return None
    before_RR, after_RR = (matrix / n for matrix in layer.traffic())
    if max(before_RR.max(), after_RR.max()) > 1000:
        before_RR, after_RR = before_RR.round().astype(np.int64), after_RR.round().astype(np.int64)
    return {"records": n, "before": pack(before_RR), "after": pack(after_RR)}


def _realised(layer: LayerTrace, budget: int) -> dict[str, Any] | None:
    """How realised loads differ from planned ones, and a sample of both per rank; None if never reported."""
    known_NP = layer.realised_NP >= 0
    if not known_NP.any():
        return None
    off_NP = np.where(known_NP, np.abs(layer.realised_NP - layer.quota_NP), 0)
    complete = np.flatnonzero(known_NP.all(1))
    chosen = complete[even_choice(len(complete), max(1, budget // layer.ranks))]
    return {
        "records": int(known_NP.any(1).sum()),
        "equal": int((known_NP.any(1) & (off_NP.max(1) == 0)).sum()),
        "largest": int(off_NP.max()),
        "index": pack(chosen),
        "planned": pack(layer.after_NR[chosen]),
        "realised": pack(layer.realised_NR[chosen]),
    }


def _percentiles(seconds_N: NDArray[np.float32]) -> dict[str, Any] | None:
    known = seconds_N[~np.isnan(seconds_N)].astype(np.float64)
    if not len(known):
        return None
    p50, p99 = np.percentile(known, [50, 99])
    return {"records": len(known), "p50": float(p50), "p99": float(p99), "mean": float(known.mean())}


def _curve(name: str, x: ArrayLike, y: ArrayLike) -> dict[str, Any]:
    """One extra curve; `group: name` puts curves of a group into one chart. Not finite becomes a gap."""
    group, colon, label = name.partition(": ")
    xs, ys = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    if xs.shape != ys.shape:
        raise ValueError(f"the curve {name!r} has {xs.size} x and {ys.size} y; pass lists of one length")
    chosen = even_choice(len(xs), CURVE_POINTS)
    points = [[None if not np.isfinite(v) else float(v) for v in values[chosen]] for values in (xs, ys)]
    return {"group": group if colon else "", "name": label if colon else name, "x": points[0], "y": points[1]}
