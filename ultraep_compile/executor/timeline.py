"""The measured step beside the one that the simulator foretells from the same operations' mean times."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultraep_compile.executor.costs import Rates, make_problem, measured_rates, measured_work
from ultraep_compile.multimodal.parts import Microbatch, Parts
from ultraep_compile.schedules import Schedule, report
from ultraep_compile.schedules.simulate import Timeline, simulate
from ultraep_compile.schedules.trace import perfetto


def machine() -> float:
    """A number that processes share if they share a monotonic clock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = f"{platform.node()}".encode()
    return float(int.from_bytes(hashlib.blake2b(boot, digest_size=4).digest(), "little"))


def timeline_of(schedule: Schedule, times: Sequence[Sequence[Sequence[float]]]) -> Timeline:
    """A timeline from each rank's row: (clock at the origin, machine), then (start, end) of its operations in seconds since
    the origin. Rows may be longer. On one machine the clocks are one; else every rank's origin counts as the same moment."""
    here = len({row[0][1] for row in times}) == 1
    begin = min(row[0][0] for row in times)
    late = [row[0][0] - begin if here else 0.0 for row in times]
    rows = [row[1 : 1 + len(ops)] for row, ops in zip(times, schedule.ranks, strict=True)]
    start = tuple(tuple(a + shift for a, _ in row) for row, shift in zip(rows, late, strict=True))
    end = tuple(tuple(b + shift for _, b in row) for row, shift in zip(rows, late, strict=True))
    return Timeline(schedule, start, end, max((t for row in end for t in row), default=0.0))


def work_of(measured: Timeline, parts: Parts, microbatches: Sequence[Microbatch]) -> list[float]:
    """Times and sizes of everything that ran, over all ranks; see `measured_work`."""
    rows = zip(measured.schedule.ranks, measured.start, measured.end, strict=True)
    tables = [measured_work(parts, microbatches, list(zip(*row, strict=True))) for row in rows]
    return [sum(column) for column in zip(*tables, strict=True)]


def rates_of(measured: Timeline, parts: Parts, microbatches: Sequence[Microbatch], rates: Rates) -> Rates:
    """Seconds per size of everything that ran."""
    return measured_rates(rates, work_of(measured, parts, microbatches))


def foretold(
    measured: Timeline, parts: Parts, microbatches: Sequence[Microbatch], rates: Rates, split: bool
) -> Timeline:
    """What the simulator says about the schedule that ran, each operation at the mean rate of its kind."""
    old = measured.schedule.problem
    problem = make_problem(parts, microbatches, rates_of(measured, parts, microbatches, rates), old.stage_rank, split)
    encoders = tuple(
        replace(new, recompute=was.recompute) for new, was in zip(problem.encoders, old.encoders, strict=True)
    )
    generators = tuple(
        replace(new, items=was.items) for new, was in zip(problem.generators, old.generators, strict=True)
    )
    return simulate(replace(measured.schedule, problem=replace(problem, encoders=encoders, generators=generators)))


def trace(measured: Timeline, predicted: Timeline) -> dict[str, Any]:
    """One file for ui.perfetto.dev: a process with the measured step, one with the predicted."""
    rows = []
    for name, timeline in (("measured", measured), ("predicted", predicted)):
        schedule = timeline.schedule
        named = replace(timeline, schedule=replace(schedule, method=f"{name}: {schedule.method}"))
        rows.append(replace(report(predicted.schedule), timeline=named))
    return perfetto(rows, unit=1e6)
