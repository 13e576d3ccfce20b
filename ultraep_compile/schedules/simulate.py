"""Run a schedule on paper: start and end of every operation, idle time by cause, memory over time.

What a rank holds depends on the order of its own operations alone, never on timing, so peaks need no
simulation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.holdings import memory_steps

CAUSES: tuple[str, ...] = ("warm-up", "cool-down", "encoder", "generator", "forward", "backward")


@dataclass(frozen=True, slots=True)
class Timeline:
    """Start and end of every operation, [P][operations of the rank], in the costs' unit."""

    schedule: Schedule
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]
    makespan: float

    @property
    def bubble(self) -> float:
        """Idle share of ranks x makespan, 0..1."""
        busy = sum(sum(e) - sum(s) for s, e in zip(self.start, self.end, strict=True))
        area = len(self.start) * self.makespan
        return max(0.0, 1.0 - busy / area) if area else 0.0


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that each rank holds at once, [P] each."""

    encoder: tuple[float, ...]  # microbatches of one encoder (items: mean microbatches, by cost)
    encoder_load: tuple[float, ...]  # mean microbatches of one encoder, each weighted by its forward cost
    generator: tuple[float, ...]  # microbatches of one generator
    llm: tuple[float, ...]  # stage activations; a virtual stage counts its share


def simulate(schedule: Schedule, noise: float = 0.0, seed: int = 0) -> Timeline:
    """Play the schedule. With `noise` every operation takes a normally distributed factor of its cost (mean
    1, standard deviation `noise`, at least 0.05): the order stays, as on a real machine."""
    graph = Graph(schedule.problem, schedule.ranks)
    duration = graph.duration
    if noise:
        draw = random.Random(seed)
        duration = [d * max(0.05, draw.gauss(1.0, noise)) for d in duration]
    return timeline_of(schedule, graph, duration)


def timeline_of(schedule: Schedule, graph: Graph, duration: Sequence[float] | None = None) -> Timeline:
    start, end = graph.replay(duration)
    cuts = list(zip(graph.first, graph.first[1:], strict=False))
    return Timeline(
        schedule,
        tuple(tuple(start[a:b]) for a, b in cuts),
        tuple(tuple(end[a:b]) for a, b in cuts),
        max(end, default=0.0),
    )


def bubbles(timeline: Timeline) -> list[dict[str, float]]:
    """Idle time of each rank by what it waited for.

    warm-up: before its first operation; cool-down: after its last one; else the kind of operation whose
    output came last (encoder, generator, forward, backward), the hop's latency included."""
    schedule = timeline.schedule
    graph = Graph(schedule.problem, schedule.ranks)
    cause = {"EF": "encoder", "G": "generator", "F": "forward"}
    ends = [e for row in timeline.end for e in row]
    starts = [s for row in timeline.start for s in row]
    out = []
    for first, stop in zip(graph.first, graph.first[1:], strict=False):
        idle: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        now = 0.0
        for i in range(first, stop):
            if (gap := starts[i] - now) > 0:
                why = "warm-up"
                if i > first and graph.preds[i]:
                    late = max(
                        graph.preds[i],
                        key=lambda p: ends[p] + (graph.rank[p] != graph.rank[i]) * schedule.problem.latency,
                    )
                    why = cause.get(graph.ops[late].kind, "backward")
                idle[why] += gap
            now = ends[i]
        idle["cool-down"] += timeline.makespan - now
        out.append(idle)
    return out


def peaks(schedule: Schedule) -> Peaks:
    """The highest point of each rank's memory curves."""
    problem = schedule.problem
    tops = {what: [0.0] * len(schedule.ranks) for what in ("count", "load", "generator", "llm")}
    for r, ops in enumerate(schedule.ranks):
        held: dict[tuple[str, int], float] = {}
        for op, takes, gives in memory_steps(problem, ops):
            unit = 0 if op.kind in ("F", "B", "I", "W") else op.stage
            for what, amount in takes:
                now = held[what, unit] = held.get((what, unit), 0.0) + amount
                tops[what][r] = max(tops[what][r], round(now, 9))
            for what, amount in gives:
                held[what, unit] -= amount
    return Peaks(tuple(tops["count"]), tuple(tops["load"]), tuple(tops["generator"]), tuple(tops["llm"]))
