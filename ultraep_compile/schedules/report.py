"""A schedule with its numbers as one JSON object, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule, schedule_from_fields
from ultraep_compile.schedules.bounds import capped_bound, ideal, lower_bound
from ultraep_compile.schedules.problem import Problem
from ultraep_compile.schedules.simulate import Peaks, Timeline, bubbles, peaks, simulate

FORMAT, VERSION = "ultraep-schedule", 1


@dataclass(frozen=True, slots=True)
class Report:
    """A played schedule beside what the problem allows; times in the costs' unit."""

    timeline: Timeline
    peak: Peaks
    ideal: float
    lower_bound: float
    lower_bound_capped: float | None

    @property
    def schedule(self) -> Schedule:
        return self.timeline.schedule

    @property
    def makespan(self) -> float:
        return self.timeline.makespan


def report(
    schedule: Schedule, problem: Problem | None = None, base: str = "1f1b", memory: float | None = None
) -> Report:
    """Play a schedule. `problem` is the one that was asked for (a baseline may have changed its own: re-split
    stages, recomputation); `memory` the encoder microbatches per rank for the capped bound (None: what the
    schedule holds)."""
    problem = problem or schedule.problem
    timeline, peak = simulate(schedule), peaks(schedule)
    split = any(op.kind == "I" for ops in schedule.ranks for op in ops)
    capped = None
    memory = memory if memory is not None else schedule.caps.encoder
    same = (
        schedule.problem.stage_share == problem.stage_share
        and schedule.problem.stage_rank == problem.stage_rank
    )
    if memory is not None and problem.has_encoder and same and not split:
        capped = capped_bound(problem, memory, peak.llm)
    return Report(timeline, peak, ideal(problem, base), lower_bound(problem, split), capped)


def report_json(result: Report) -> dict[str, Any]:
    """The JSON object of the `schedule` command."""
    schedule, timeline, peak = result.schedule, result.timeline, result.peak
    ranks = []
    for ops, starts, ends in zip(schedule.ranks, timeline.start, timeline.end, strict=True):
        row = []
        for op, start, end in zip(ops, starts, ends, strict=True):
            work = {"items": [list(pair) for pair in op.items]} if op.items else {"microbatch": op.microbatch}
            row.append({"op": op.kind, "stage": op.stage, **work, "start": start, "end": end})
        ranks.append(row)
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": schedule.method,
        "note": schedule.note,
        "makespan": result.makespan,
        "ideal": result.ideal,
        "lower_bound": result.lower_bound,
        "lower_bound_capped": result.lower_bound_capped,
        "bubble": timeline.bubble,
        "bubbles": bubbles(timeline),
        "peak": {
            "encoder": list(peak.encoder),
            "encoder_load": list(peak.encoder_load),
            "generator": list(peak.generator),
            "llm": list(peak.llm),
        },
        "caps": asdict(schedule.caps),
        "problem": asdict(schedule.problem),
        "ranks": ranks,
    }


def schedule_of_report(value: Mapping[str, Any]) -> Schedule:
    """The schedule in a JSON object made by report_json."""
    if not isinstance(value, Mapping) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise ScheduleError(f"Not a schedule file of this version (format {FORMAT!r}, version {VERSION}).")
    ranks = tuple(
        tuple(
            Op(x["op"], x["stage"], x.get("microbatch", -1), tuple((j, i) for j, i in x.get("items", ())))
            for x in row
        )
        for row in value["ranks"]
    )
    return schedule_from_fields(value, ranks)
