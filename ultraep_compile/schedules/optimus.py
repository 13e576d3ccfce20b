"""Bubble filling around a fixed LLM timeline, after Optimus (arXiv 2408.03505), for encoders only.

The LLM's schedule is not touched. It starts late by the smallest prelude with which every encoder forward
finds an idle gap, on any rank, before its microbatch enters the first stage; every encoder backward takes the
first gap on its rank after its gradient has come. Encoder memory is unlimited. A favour to the baseline:
every rank has a full encoder replica (the published system shards it), and planning time is not counted."""

from __future__ import annotations

from collections.abc import Sequence

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.base import base_order
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.problem import Caps, Problem

_SLACK = 1e-9
_FOREVER = 1e300

Gaps = list[list[tuple[float, float]]]
Placed = list[tuple[float, int, Op]]  # start, rank, operation


def optimus(problem: Problem, base: str = "1f1b") -> Schedule:
    """The LLM's fixed schedule with encoder work in its gaps."""
    if problem.has_generator:
        raise ScheduleError(
            "The method optimus fills bubbles with encoder work only. Leave out the generator."
        )
    orders = base_order(base, problem.ranks, problem.stages // problem.ranks, problem.microbatches)
    graph = Graph(problem.llm_only(), orders)
    start, end = graph.replay()
    low, high = 0.0, sum(sum(e.forward) for e in problem.encoders) + problem.latency
    placed = _place(problem, graph, start, end, high)
    for _ in range(24):
        middle = (low + high) / 2
        found = _place(problem, graph, start, end, middle)
        if found is None:
            low = middle
        else:
            placed, high = found, middle
    if placed is None:
        raise ScheduleError("No prelude makes room for the encoders. Give finite costs.")
    timed = [[(start[i] + high, i, graph.ops[i]) for i in _span(graph, r)] for r in range(problem.ranks)]
    for n, (at, r, op) in enumerate(placed):
        timed[r].append((at, n - len(placed), op))
    ranks = tuple(tuple(op for *_, op in sorted(row, key=lambda x: x[:2])) for row in timed)
    return Schedule(problem, ranks, "optimus", Caps(), f"base {base}, prelude {high:.4g}")


def _span(graph: Graph, rank: int) -> range:
    return range(graph.first[rank], graph.first[rank + 1])


def _gaps(graph: Graph, start: Sequence[float], end: Sequence[float], prelude: float) -> Gaps:
    gaps: Gaps = []
    for r in range(len(graph.first) - 1):
        now, row = 0.0, []
        for i in _span(graph, r):
            if start[i] + prelude - now > _SLACK:
                row.append((now, start[i] + prelude))
            now = end[i] + prelude
        gaps.append([*row, (now, _FOREVER)])
    return gaps


def _place(
    problem: Problem, graph: Graph, start: Sequence[float], end: Sequence[float], prelude: float
) -> Placed | None:
    """All encoder operations in gaps, or None if a forward finds none in time."""
    gaps = _gaps(graph, start, end, prelude)
    home, placed = {}, []
    for j in range(problem.microbatches):
        for e, encoder in enumerate(problem.encoders):
            if encoder.forward[j] <= 0:
                continue
            due = {s: start[graph.index["F", s, j, ()]] + prelude for s in encoder.feeds}
            best = None
            for r in range(problem.ranks):
                latest = min(t - problem.latency * (problem.stage_rank[s] != r) for s, t in due.items())
                found = _first_gap(gaps[r], 0.0, encoder.forward[j])
                if found[1] + encoder.forward[j] <= latest + _SLACK and (best is None or found[1] < best[1]):
                    best = (r, found[1], found[0])
            if best is None:
                return None
            r, at, gap = best
            _take(gaps[r], gap, at, encoder.forward[j])
            home[e, j] = r
            placed.append((at, r, Op("EF", e, j)))
    for j in range(problem.microbatches):
        for e, encoder in enumerate(problem.encoders):
            if encoder.frozen or (e, j) not in home:
                continue
            r = home[e, j]
            ready = 0.0
            for s in encoder.feeds:
                i = graph.backward(s, j)
                ready = max(ready, end[i] + prelude + problem.latency * (graph.rank[i] != r))
            gap, at = _first_gap(gaps[r], ready, encoder.backward[j])
            _take(gaps[r], gap, at, encoder.backward[j])
            placed.append((at, r, Op("EB", e, j)))
    return placed


def _first_gap(row: list[tuple[float, float]], earliest: float, cost: float) -> tuple[int, float]:
    for n, (a, b) in enumerate(row):
        at = max(a, earliest)
        if at + cost <= b + _SLACK:
            return n, at
    raise AssertionError("the last gap has no end")


def _take(row: list[tuple[float, float]], n: int, at: float, cost: float) -> None:
    a, b = row[n]
    row[n : n + 1] = [
        gap for gap in ((a, at), (at + cost, b)) if gap[1] - gap[0] > _SLACK or gap[1] == _FOREVER
    ]
