"""The numbers of a trace in a few lines: what the report's tiles show and tests compare.

Imbalance is max/mean over the ranks of one record. Percentiles run over records; nothing is averaged over
layers or experts first, which would hide the imbalance of each.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ultraep_compile.telemetry.trace import LayerTrace, Trace, imbalance_N

BOUND_RECORDS = 3000  # of a trace; a bound takes about a millisecond
COLUMNS = (
    "before",  # imbalance if every row went to its expert's master
    "after",  # imbalance as planned
    "bound",  # of the imbalance, for any plan with these slots; NaN where not computed
    "replicas",  # filled slots
    "rows",
    "left_before",  # rows that leave their rank
    "left_after",
    "max_before",  # rows of the busiest rank
    "max_after",
    "seconds",  # of all phases of balancing
)


@dataclass(frozen=True, slots=True)
class Loads:
    """Percentiles and shares over the records of one layer, or of all. NaN where there is no record."""

    records: int
    before_p50: float
    """Imbalance if every row went to its expert's master."""
    before_p99: float
    after_p50: float
    """Imbalance as planned."""
    after_p99: float
    after_max: float
    lower_bound: float
    """What no plan with these slots can beat: median over records, in long traces over an even choice."""
    replicas: float
    """Filled slots per record, mean."""
    remote_before: float
    """Share of rows that leave their rank when every row goes to its expert's master."""
    remote_after: float
    busiest_rows_before: int
    """Rows of the busiest rank, summed over records: what everybody waits for."""
    busiest_rows_after: int
    balancing_seconds: float
    """Time of all recorded phases per record, mean over the records that report any."""


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer: its shape and its `Loads`."""

    name: str
    ranks: int
    experts: int
    slots: int
    seen: int
    loads: Loads


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole trace. `ranks` is the largest number of ranks of any layer."""

    records: int
    layers: int
    ranks: int
    loads: Loads
    per_layer: tuple[LayerSummary, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: NaN becomes None."""
        return _without_nan(asdict(self))


def summarize(trace: Trace, columns: list[dict[str, NDArray[Any]]] | None = None) -> Summary:
    """Sum up a trace; an empty one has zero records and NaN elsewhere.

    `columns` is what `all_columns` returned, if it is at hand.
    """
    columns = all_columns(trace) if columns is None else columns
    layers = tuple(
        LayerSummary(layer.name, layer.ranks, layer.experts, layer.slots, layer.seen, _loads(column))
        for layer, column in zip(trace, columns, strict=True)
    )
    names = columns[0] if columns else dict.fromkeys(COLUMNS, np.empty(0))
    total = _loads({name: np.concatenate([column[name] for column in columns] or [[]]) for name in names})
    return Summary(len(trace), len(trace.layers), trace.ranks, total, layers)


def lower_bound_N(layer: LayerTrace, most: int) -> NDArray[np.float64]:
    """The planner's lower bound of at most `most` records, evenly spread; NaN for the others.

    It looks at global loads only, so the source rank is made up.
    """
    from ultraep_compile.planner import lower_bound
    from ultraep_compile.planner.checks import COUNT_LIMIT

    counts_RE = torch.zeros(layer.ranks, layer.experts, dtype=torch.int64)
    bounds = np.full(len(layer), np.nan)
    for n in even_choice(len(layer), most):
        counts_RE[0] = torch.from_numpy(layer.expert_load_NE[n])
        if counts_RE[0].max() > COUNT_LIMIT:  # more than one source rank may have
            counts_RE[1:] = counts_RE[0].div(layer.ranks, rounding_mode="floor")
            counts_RE[0] -= counts_RE[1:].sum(0)
        bounds[n] = lower_bound(counts_RE, layer.slots)
        counts_RE.zero_()
    return bounds


def even_choice(n: int, most: int) -> NDArray[np.int64]:
    """Every k-th index below n, with the smallest k that gives at most `most`."""
    return np.arange(0, n, max(1, -(-n // max(1, most))))


def balancing_seconds_N(layer: LayerTrace) -> NDArray[np.float64]:
    """Sum of the reported phases of each record, NaN where none was reported."""
    if not layer.seconds:
        return np.full(len(layer), np.nan)
    phases = np.stack(list(layer.seconds.values())).astype(np.float64)
    return np.where(np.isnan(phases).all(0), np.nan, np.nansum(phases, axis=0))


def all_columns(trace: Trace) -> list[dict[str, NDArray[Any]]]:
    """`record_columns` of every layer."""
    most = max(1, BOUND_RECORDS // max(1, len(trace.layers)))
    return [record_columns(layer, most) for layer in trace]


def record_columns(layer: LayerTrace, most_bounds: int) -> dict[str, NDArray[Any]]:
    """One number per record [N] for each of `COLUMNS`."""
    before_NR, after_NR, leaving_N2 = layer.before_NR, layer.after_NR, layer.leaving_N2
    values = (
        imbalance_N(before_NR),
        imbalance_N(after_NR),
        lower_bound_N(layer, most_bounds),
        layer.replicas_N,
        before_NR.sum(-1),
        leaving_N2[:, 0],
        leaving_N2[:, 1],
        before_NR.max(-1),
        after_NR.max(-1),
        balancing_seconds_N(layer),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _loads(column: dict[str, NDArray[Any]]) -> Loads:
    n = len(column["before"])

    def percentile(name: str, q: int) -> float:
        return float(np.nanpercentile(column[name], q)) if n else math.nan

    def share(name: str) -> float:
        rows = column["rows"].sum()
        return float(column[name].sum() / rows) if rows else math.nan

    timed = column["seconds"][~np.isnan(column["seconds"])]
    return Loads(
        records=n,
        before_p50=percentile("before", 50),
        before_p99=percentile("before", 99),
        after_p50=percentile("after", 50),
        after_p99=percentile("after", 99),
        after_max=percentile("after", 100),
        lower_bound=percentile("bound", 50),
        replicas=float(column["replicas"].mean()) if n else math.nan,
        remote_before=share("left_before"),
        remote_after=share("left_after"),
        busiest_rows_before=int(column["max_before"].sum()),
        busiest_rows_after=int(column["max_after"].sum()),
        balancing_seconds=float(timed.mean()) if len(timed) else math.nan,
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
