"""What the backend did to each graph: kept for `explain`, `dump` and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from ultraep_compile.ops.experts import ExpertSite
from ultraep_compile.passes.lift import Miss, Site
from ultraep_compile.passes.pipeline import Rewrite


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One compiled graph."""

    sites: list[Site]
    prepared: dict[str, ExpertSite]
    misses: list[Miss]
    seconds: dict[str, float]
    snapshots: list[tuple[str, str]]
    graph_module: fx.GraphModule

    @classmethod
    def of(cls, gm: fx.GraphModule, rewrite: Rewrite) -> GraphReport:
        return cls(rewrite.sites, rewrite.prepared, rewrite.misses, rewrite.seconds, rewrite.snapshots or [], gm)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One call of a compiled model: what really ran."""

    balanced: tuple[str, ...]
    """Layers that ran balanced, in order, over all graphs of the step."""
    unbalanced: tuple[str, ...]
    """Layers known to be there that did not."""
    reason: str
    """What Dynamo could not compile in this step, "" if nothing."""


@dataclass(slots=True)
class Collector:
    """Reports of the graphs compiled, and of the steps made, while it was open."""

    graphs: list[GraphReport] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    snapshots: bool = False


_open: list[Collector] = []


@contextlib.contextmanager
def collect_reports(*, snapshots: bool = False) -> Iterator[Collector]:
    """Collect what the backend reports about every graph compiled inside the block."""
    collector = Collector(snapshots=snapshots)
    _open.append(collector)
    try:
        yield collector
    finally:
        _open.remove(collector)


def add_report(report: GraphReport) -> None:
    for collector in _open:
        collector.graphs.append(report)


def add_step(report: StepReport) -> None:
    for collector in _open:
        collector.steps.append(report)


def wants_snapshots() -> bool:
    return any(c.snapshots for c in _open)
