"""What no schedule can beat.

The LLM's stages are pinned to their ranks; encoder and generator work may run anywhere.
"""

from __future__ import annotations

import heapq

from ultraep_compile.schedules.base import base_order
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.problem import Items, Problem


def ideal(problem: Problem, base: str = "1f1b") -> float:
    """Makespan with unlimited memory, phase after phase: the base schedule of the LLM alone plus an even
    share of all encoder and generator work. For 1F1B with equal costs: (M+P-1) S + (encoder and generator
    work) / P."""
    llm = problem.llm_only()
    orders = base_order(base, llm.ranks, llm.stages // llm.ranks, llm.microbatches)
    _, end = Graph(llm, orders).replay()
    return max(end) + (problem.encoder_work() + problem.generator_work()) / problem.ranks


def lower_bound(problem: Problem, split: bool = False) -> float:
    """A makespan that any schedule needs; `split`: also one that cuts backwards into input and weight part.

    The larger of: all work / P; per rank its LLM work, plus the shortest way to its first operation and from
    its last one to the end; the longest chain of one microbatch."""
    work = problem.llm_work() + problem.encoder_work() + problem.generator_work()
    best = work / problem.ranks
    part, stages = problem.input_share if split else 1.0, problem.stages
    for j in range(problem.microbatches):
        chain = (
            _arrival(problem, j, stages) + _generator_way(problem, j) + _departure(problem, j, stages, part)
        )
        best = max(best, chain)
    return max(best, max(_rank_bound(problem, r, split) for r in range(problem.ranks)))


def _rank_bound(problem: Problem, rank: int, split: bool) -> float:
    """Head: the forwards that lead to the rank's first stage. Tail: the backwards that follow."""
    stages = problem.rank_stages(rank)
    if not stages:
        return 0.0
    share, jobs = problem.stage_share, range(problem.microbatches)
    s0, part = stages[0], problem.input_share if split else 1.0
    hops = sum(a != b for a, b in zip(problem.stage_rank[:s0], problem.stage_rank[1 : s0 + 1], strict=True))
    head = min(_arrival(problem, j, s0) for j in jobs) + hops * problem.latency
    tail = min(_departure(problem, j, s0, part) for j in jobs) + hops * problem.latency
    mine = sum(share[s] for s in stages)
    forward, backward = mine * sum(problem.llm_forward), mine * sum(problem.llm_backward)
    way = head + forward + part * backward + tail
    return max(way, head + forward + backward) if split else way


def capped_bound(problem: Problem, memory: float, llm: tuple[float, ...], whole: bool = True) -> float:
    """A makespan that any schedule needs whose ranks hold at most `memory` microbatches of each encoder and
    llm[r] stage activations, microbatches passing every stage in one order and backwards whole.

    Until its first backward a rank can run llm[r] stage forwards and `memory` encoder forwards, but that
    backward cannot start before a microbatch has gone through encoder, all forwards and the later backwards;
    the difference is idle time. The same holds mirrored after its last forward. Where all microbatches cost
    the same and cannot be divided, a rank runs a whole number of them, which (unless `whole` is off) lifts
    the mean over ranks to the best whole-number distribution."""
    bound = lower_bound(problem)
    if not problem.has_encoder or problem.llm_recompute or any(e.recompute for e in problem.encoders):
        return bound
    loads = [_rank_idle(problem, r, memory, llm[r]) + _rank_llm(problem, r) for r in range(problem.ranks)]
    extra = problem.encoder_work() + problem.generator_work()
    bound = max(bound, (sum(loads) + extra) / problem.ranks)
    unit = _indivisible(problem) if whole else 0.0
    if unit:
        heap = [(load + unit, load + unit) for load in loads]
        heapq.heapify(heap)
        last = 0.0
        for _ in range(problem.microbatches):
            last = heap[0][0]
            heapq.heapreplace(heap, (last + unit, last + unit))
        bound = max(bound, last)
    return bound


def _rank_llm(problem: Problem, rank: int) -> float:
    mine = sum(problem.stage_share[s] for s in problem.rank_stages(rank))
    return mine * (sum(problem.llm_forward) + sum(problem.llm_backward))


def _rank_idle(problem: Problem, rank: int, memory: float, llm: float) -> float:
    """Idle time that a rank cannot avoid before its first backward and after its last forward."""
    stages = problem.rank_stages(rank)
    if not stages or problem.microbatches < 2:
        return 0.0
    share, jobs, last = problem.stage_share, range(problem.microbatches), stages[-1]
    later = sum(share[last + 1 :])
    llm = min(llm, sum(share[s] for s in stages) * problem.microbatches)
    into = min(
        _arrival(problem, j, problem.stages) + _generator_way(problem, j) + later * problem.llm_backward[j]
        for j in jobs
    )
    out = min(later * problem.llm_forward[j] + _departure(problem, j, problem.stages) for j in jobs)
    generated = problem.generator_work()  # may fill either gap
    fill_into = llm * max(problem.llm_forward) + generated
    fill_out = llm * max(problem.llm_backward) + generated
    for encoder in problem.encoders:
        if encoder.frozen or min(encoder.feeds) > last:  # not held back by this rank's first backward
            fill_into += sum(encoder.forward) + sum(encoder.backward)
            fill_out += sum(encoder.forward) + sum(encoder.backward)
        elif encoder.items:
            fill_into += memory * encoder.mean_forward
            fill_out += (
                memory
                * encoder.mean_forward
                * max(b / f for f, b in zip(encoder.forward, encoder.backward, strict=True) if f)
            )
        else:
            fill_into += memory * max(encoder.forward)
            fill_out += memory * max(encoder.backward)
    return max(0.0, into - fill_into) + max(0.0, out - fill_out)


def _indivisible(problem: Problem) -> float:
    """The cost of an encoder microbatch where all are equal and whole, with one encoder and no generator;
    else 0."""
    if len(problem.encoders) != 1 or problem.has_generator or problem.encoders[0].items:
        return 0.0
    encoder = problem.encoders[0]
    if len(set(encoder.forward)) > 1 or len(set(encoder.backward)) > 1:
        return 0.0
    return encoder.forward[0] + (encoder.backward[0] if encoder.backward else 0.0)


def _longest_part(costs: tuple[float, ...], items: Items, j: int) -> float:
    """The longest piece into which the work on microbatch j can be cut."""
    return costs[j] * (max(items[j]) if items and items[j] else 1.0) if costs else 0.0


def _arrival(problem: Problem, j: int, stage: int) -> float:
    """The earliest time at which microbatch j can have passed all stages before `stage`, encoders
    included."""
    share, cost = problem.stage_share, problem.llm_forward[j]
    ways = [sum(share[:stage]) * cost]
    for e in problem.encoders:
        if min(e.feeds) <= stage:
            ways.append(_longest_part(e.forward, e.items, j) + sum(share[min(e.feeds) : stage]) * cost)
    return max(ways)


def _departure(problem: Problem, j: int, stage: int, part: float = 1.0) -> float:
    """The least time from the end of microbatch j's backward on `stage` to the end of all that follows it."""
    share, cost = problem.stage_share, problem.llm_backward[j] * part
    ways = [sum(share[:stage]) * cost]
    for e in problem.encoders:
        if min(e.feeds) <= stage:
            ways.append(_longest_part(e.backward, e.items, j) + sum(share[min(e.feeds) : stage]) * cost)
    return max(ways)


def _generator_way(problem: Problem, j: int) -> float:
    """Generator time between microbatch j's last forward and first backward: builders cut a microbatch into
    at most P shards, and samples not at all."""
    ways = (
        g.cost[j] * (max(g.items[j]) if g.items and g.items[j] else 1.0 / problem.ranks)
        for g in problem.generators
    )
    return max(ways, default=0.0)
