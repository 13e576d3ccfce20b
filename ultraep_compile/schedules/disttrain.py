"""Separate ranks for encoders, LLM and generators, after DistTrain (arXiv 2408.04275).

The P ranks are divided in the best whole-number way; the LLM is cut again, continuously, over its own ranks.
Encoder ranks run ahead as far as a fixed window of microbatches; generator ranks take microbatches as they
come, for which the LLM's schedule may lag."""

from __future__ import annotations

from dataclasses import replace

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.base import base_order
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.problem import Caps, Problem


def disttrain(problem: Problem, base: str = "1f1b") -> Schedule:
    """The best division of the ranks, by simulation; divisions whose busiest pool alone is slower are
    skipped."""
    if base != "1f1b" or problem.stages != problem.ranks:
        raise ScheduleError(
            "The method disttrain is built on 1f1b with one virtual stage per rank. Leave those out."
        )
    p = problem.ranks
    best: tuple[float, Schedule] | None = None
    encoder, generator = problem.has_encoder, problem.has_generator
    for n_e in range(1, p) if encoder else [0]:
        for n_g in range(1, p - n_e) if generator else [0]:
            n_l = p - n_e - n_g
            if n_l < 1:
                continue
            busiest = problem.llm_work() / n_l
            busiest = max(busiest, problem.encoder_work() / n_e if n_e else 0.0)
            busiest = max(busiest, problem.generator_work() / n_g if n_g else 0.0)
            if best and busiest >= best[0]:
                continue
            for lag in sorted({1, 2, n_g + 1, n_g + 2, n_l, n_l + n_g}) if n_g else [1]:
                schedule = _divide(problem, n_e, n_l, n_g, lag)
                makespan = max(Graph(schedule.problem, schedule.ranks).replay()[1])
                if best is None or makespan < best[0]:
                    best = (makespan, schedule)
    if best is None:
        raise ScheduleError(f"{p} ranks are too few to give encoder, LLM and generator ranks of their own.")
    return best[1]


def _divide(problem: Problem, n_e: int, n_l: int, n_g: int, lag: int) -> Schedule:
    p, m = problem.ranks, problem.microbatches
    feeds = tuple(sorted({0} | {s * n_l // problem.stages for e in problem.encoders for s in e.feeds}))
    encoders = tuple(
        replace(e, feeds=tuple(sorted({s * n_l // problem.stages for s in e.feeds})))
        for e in problem.encoders
    )
    changed = replace(
        problem,
        encoders=encoders,
        stage_rank=tuple(range(n_l)),
        stage_share=(sum(problem.stage_share) / n_l,) * n_l,
        caps=Caps(),
    )
    ranks = base_order("1f1b", n_l, 1, m, lag)
    window = -(-(n_l + lag) // n_e) + 1 if n_e else 0
    for i in range(n_e):
        forward, backward = [], []
        for j in range(i, m, n_e):
            units = [e for e, encoder in enumerate(encoders) if encoder.forward[j] > 0]
            forward.append([Op("EF", e, j) for e in units])
            backward.append([Op("EB", e, j) for e in units if not encoders[e].frozen])
        order = [op for ops in forward[:window] for op in ops]
        for k, ops in enumerate(backward):
            order += ops + [op for later in forward[window + k : window + k + 1] for op in later]
        ranks.append(order)
    for i in range(n_g):
        mine = range(i, m, n_g)
        ranks.append(
            [Op("G", g, j) for j in mine for g, unit in enumerate(problem.generators) if unit.cost[j] > 0]
        )
    note = f"{n_e} encoder, {n_l} LLM and {n_g} generator ranks, features into stages {feeds}, lag {lag}"
    assert len(ranks) == p
    return Schedule(changed, tuple(map(tuple, ranks)), "disttrain", Caps(), note)
