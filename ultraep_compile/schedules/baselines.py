"""What others do, under the same interface: each method takes a problem and gives a schedule of it.

Encoder memory per rank, in microbatches: colocated and uneven P, encoder-first M/P, flush 1, recompute 1
(inputs only). Re-split LLMs are cut continuously, as if layers were infinitely thin: a favour to the
baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule, replace_microbatches
from ultraep_compile.schedules.base import base_order
from ultraep_compile.schedules.problem import Caps, Problem
from ultraep_compile.schedules.work import backward_of, encoder_slots, generator_slots, groups_of, is_uneven


def colocated(problem: Problem, base: str = "1f1b") -> Schedule:
    """Encoders on the first stage's rank, generators on the last's, around each of their microbatches."""
    last = problem.stages - 1
    ranks = []
    for order in base_order(base, problem.ranks, _virtual(problem), problem.microbatches):
        ops: list[Op] = []
        for op in order:
            j = op.microbatch
            if op.kind == "F" and op.stage == 0:
                ops += [
                    Op("EF", e, j) for e, encoder in enumerate(problem.encoders) if encoder.forward[j] > 0
                ]
            if op.kind in ("B", "I") and op.stage == last:
                ops += [
                    Op("G", g, j) for g, generator in enumerate(problem.generators) if generator.cost[j] > 0
                ]
            ops.append(op)
            if op.kind in ("B", "I") and op.stage == 0:
                forward = [
                    Op("EF", e, j) for e, encoder in enumerate(problem.encoders) if encoder.forward[j] > 0
                ]
                ops += backward_of(forward, problem)
        ranks.append(tuple(ops))
    return Schedule(problem, tuple(ranks), "colocated", Caps(), f"base {base}")


def uneven(problem: Problem, base: str = "1f1b") -> Schedule:
    """Co-located, with the LLM's layers moved away from the ranks that host encoders and generators."""
    p, m = problem.ranks, problem.microbatches
    fixed = [0.0] * p
    fixed[problem.stage_rank[0]] += problem.encoder_work() / m
    fixed[problem.stage_rank[-1]] += problem.generator_work() / m
    llm = _fill_up(fixed, problem.llm_work() / m)
    unit = problem.llm_work() / m / sum(problem.stage_share)
    now = [sum(problem.stage_share[s] for s in problem.rank_stages(r)) for r in range(p)]
    share = tuple(
        x * llm[r] / unit / now[r] for x, r in zip(problem.stage_share, problem.stage_rank, strict=True)
    )
    schedule = colocated(replace(problem, stage_share=share), base)
    shares = ", ".join(f"{x / sum(llm):.3f}" for x in llm)
    return replace(schedule, method="uneven", note=f"base {base}, LLM shares {shares}")


def _fill_up(fixed: Sequence[float], amount: float) -> list[float]:
    """Pour `amount` over the fixed loads so that the highest level is as low as it can be."""
    low, level, used = sorted(fixed), 0.0, 0.0
    for n, height in enumerate(low, 1):
        used += height
        level = (amount + used) / n
        if n == len(low) or level <= low[n]:
            break
    return [max(0.0, level - height) for height in fixed]


def encoder_first(problem: Problem, base: str = "1f1b") -> Schedule:
    """All encoder forwards, the LLM, all encoder backwards; memory without limit. With a generator: all LLM
    forwards, all generator work, all LLM backwards."""
    ranks = _phases(problem, tuple(range(problem.microbatches)), base)
    return Schedule(problem, tuple(map(tuple, ranks)), "encoder-first", Caps(), f"base {base}")


def flush(problem: Problem, base: str = "1f1b", groups: int = 1) -> Schedule:
    """Encoder-first on `groups` x P microbatches at a time, the pipeline running empty in between: the plain
    way to an encoder memory that does not grow with the number of microbatches."""
    size = groups * problem.ranks
    if problem.microbatches < problem.ranks:
        raise ScheduleError(
            f"{problem.microbatches} microbatches do not fill one group of {problem.ranks}. Give at least"
            f" {problem.ranks} microbatches or fewer stages."
        )
    ranks: list[list[Op]] = [[] for _ in range(problem.ranks)]
    for chunk in groups_of(tuple(range(problem.microbatches)), size):
        for ops, more in zip(ranks, _phases(problem, tuple(chunk), base), strict=True):
            ops += more
    return Schedule(
        problem, tuple(map(tuple, ranks)), "flush", Caps(), f"base {base}, {size} microbatches at a time"
    )


def recompute(problem: Problem, base: str = "1f1b") -> Schedule:
    """Encoder-first keeping encoder inputs only: every encoder backward runs its forward again."""
    schedule = encoder_first(with_recompute(problem, encoder=True), base)
    return replace(schedule, method="recompute")


def with_recompute(problem: Problem, encoder: bool = False, llm: bool = False) -> Problem:
    """The problem with activations of encoders, of the LLM, or of both recomputed in the backward, at its
    cost."""
    encoders = problem.encoders
    if encoder:
        encoders = tuple(
            e
            if e.frozen or e.recompute
            else replace(
                e, backward=tuple(a + b for a, b in zip(e.forward, e.backward, strict=True)), recompute=True
            )
            for e in problem.encoders
        )
    if not llm or problem.llm_recompute:
        return replace(problem, encoders=encoders)
    backward = tuple(a + b for a, b in zip(problem.llm_forward, problem.llm_backward, strict=True))
    return replace(problem, encoders=encoders, llm_backward=backward, llm_recompute=True)


def _phases(problem: Problem, chunk: tuple[int, ...], base: str) -> list[list[Op]]:
    groups = groups_of(chunk, problem.ranks)
    slots = encoder_slots(problem, groups, aligned=not is_uneven(problem))
    if is_uneven(problem) and not any(e.items for e in problem.encoders):
        slots = _spread_over_ranks(problem, chunk)
    forward = [[op for row in slots for op in row[r]] for r in range(problem.ranks)]
    orders = base_order(
        "gpipe" if problem.has_generator else base, problem.ranks, _virtual(problem), len(chunk)
    )
    made = generator_slots(problem, groups, aligned=True)
    ranks = []
    for r, order in enumerate(orders):
        llm = replace_microbatches(order, chunk)
        if problem.has_generator:
            first = next(i for i, op in enumerate(llm) if op.kind == "B")
            llm[first:first] = [op for row in made for op in row[r]]
        ranks.append(forward[r] + llm + backward_of(forward[r], problem))
    return ranks


def _spread_over_ranks(problem: Problem, chunk: Sequence[int]) -> list[list[list[Op]]]:
    """Whole microbatches of the whole chunk, dearest first to the least loaded rank."""
    load = [0.0] * problem.ranks
    ranks: list[list[Op]] = [[] for _ in load]
    work = [
        (e.forward[j] + sum(e.backward[j : j + 1]), i, j)
        for i, e in enumerate(problem.encoders)
        for j in chunk
    ]
    for cost, i, j in sorted((w for w in work if w[0] > 0), reverse=True):
        r = load.index(min(load))
        load[r] += cost
        ranks[r].append(Op("EF", i, j))
    return [[sorted(ops, key=lambda op: op.microbatch) for ops in ranks]]


def _virtual(problem: Problem) -> int:
    return problem.stages // problem.ranks
