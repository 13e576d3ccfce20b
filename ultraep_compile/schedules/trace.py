"""Timelines as a trace file for ui.perfetto.dev (Chrome trace events)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultraep_compile.schedules.memory import memory_curves
from ultraep_compile.schedules.report import Report

_NAMES = {
    "F": "LLM forward",
    "B": "LLM backward",
    "I": "LLM backward, input part",
    "W": "LLM backward, weight part",
    "EF": "encoder forward",
    "EB": "encoder backward",
    "G": "generator",
}


def perfetto(reports: Sequence[Report], unit: float = 1e3) -> dict[str, Any]:
    """One process per schedule, one track per rank, counters for memory. `unit`: microseconds of trace time
    per unit of cost."""
    events: list[dict[str, Any]] = []
    for pid, report in enumerate(reports):
        schedule, timeline = report.schedule, report.timeline
        events.append(_meta("process_name", pid, 0, schedule.method))
        for r, (ops, starts, ends) in enumerate(
            zip(schedule.ranks, timeline.start, timeline.end, strict=True)
        ):
            events.append(_meta("thread_name", pid, r, f"rank {r}"))
            for op, start, end in zip(ops, starts, ends, strict=True):
                events.append(
                    {
                        "ph": "X",
                        "pid": pid,
                        "tid": r,
                        "name": str(op),
                        "cat": _NAMES[op.kind],
                        "ts": start * unit,
                        "dur": (end - start) * unit,
                        "args": {
                            "kind": _NAMES[op.kind],
                            "stage": op.stage,
                            "microbatches": list(op.microbatches),
                        },
                    }
                )
        for r, curves in enumerate(memory_curves(timeline)):
            for what, points in curves.items():
                events += [
                    {
                        "ph": "C",
                        "pid": pid,
                        "name": f"rank {r} {what}",
                        "ts": t * unit,
                        "args": {"held": held},
                    }
                    for t, held in points
                ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": {"name": value}}
