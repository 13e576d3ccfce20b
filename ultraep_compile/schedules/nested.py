"""The nested schedule: encoder and generator work cut into the LLM's own pipeline schedule.

**The cut.** Take any base schedule of the LLM and a set A of its operations that is closed upward: with an
operation it holds all that depend on it and all that follow it on its rank. Insert on every rank a block of
at most D just before the rank's first operation of A. If the blocks' inputs and outputs are in time, delaying
all of A by D is a feasible schedule. So a cut costs D once, not once per rank: all P ranks work on their
blocks at the same time. G groups of P microbatches thus cost G * (encoder work of a microbatch) = the total
encoder work / P, which is what unlimited memory would cost.

**The encoders' rule.** At the cut of group g every rank runs the backward of group g-c, then the forward of
group g. c is the number of groups after which the gradients of a group have come back at the cut, a property
of the base schedule: ceil((2P + w - 2 + k)/P) for 1F1B with generator lag w and cuts k forwards ahead. It
bounds what a rank holds, whatever the number of microbatches.

**Cut families.** wave: the operations that depend on the first forward of the group (the cut passes over the
ranks as the forward wave does; rank i must then run the i-th microbatch of the group). time: the operations
that start later than the first forward of the group less k forwards (any rank may run any part of the group).

**Fill.** The first c-1 groups after the first one are moved forward into the warm-up bubble, the last ones
back into the cool-down bubble: there they cost nothing.

**Generators** stand between the last forward and the first backward. whole: P microbatches wait (lag w = P)
and each rank runs one. split: q microbatches wait (w = q+1), each cut into P/q shards. The fused forward and
backward holds one microbatch (or shard) at a time; the price is w-1 more stage activations on each rank.
inline: a cheap generator stays on the last stage's rank, where it lengthens the backwards and nothing waits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.base import Orders, base_order
from ultraep_compile.schedules.cuts import Blocks, Windows, time_cuts, wave_cuts
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.holdings import generator_amount
from ultraep_compile.schedules.problem import Caps, Problem
from ultraep_compile.schedules.work import (
    Slots,
    backward_of,
    encoder_groups,
    encoder_slots,
    generator_slots,
    groups_of,
    split_generators,
)


@dataclass(frozen=True, slots=True)
class Rule:
    """Everything that the nested builder may choose."""

    base: str = "1f1b"
    family: str = "wave"  # or "time"
    ahead: int = 0  # k: the cut is k forwards of the first stage before the group's first one
    fill: int | None = None  # groups moved into the warm-up bubble; None: c-1 for the least possible c
    drain: int | None = None  # groups moved into the cool-down bubble; None: as many as into the warm-up
    memory: float | None = None  # c may not exceed this
    generator_group: int = 0  # q: microbatches that wait for the generator together; 0: P, or 1 on dualpipev
    inline: bool = False  # generator on the last stage's rank, where nothing waits for it (cheap generators)
    merge: float = 0.0  # join groups whose busiest rank has more than this times the mean work (0: never)
    encoder_group: int = 0  # microbatches with encoder work between two cuts; 0: P
    level: bool = False  # deal a group by what the ranks still hold of the groups before it
    whole: bool = False  # do not divide encoder microbatches into their items


DEFAULT_RULE = Rule()


@dataclass(frozen=True, slots=True)
class BaseRun:
    """A base schedule of the LLM alone, played."""

    orders: Orders
    graph: Graph
    start: list[float]
    end: list[float]
    peak: tuple[float, ...]  # [P] stage activations


def nest(problem: Problem, rule: Rule = DEFAULT_RULE) -> Schedule:
    """The nested schedule of a problem under a rule; microbatches enter in the order of their numbers."""
    p, m = problem.ranks, problem.microbatches
    if m < p and (problem.has_encoder or problem.has_generator):
        raise ScheduleError(
            f"{m} microbatches do not fill one group of {p}: a nested schedule needs as many microbatches as"
            f" stages. Give at least {p} microbatches or fewer stages."
        )
    q = generator_group(problem, rule)
    lag = _lag(problem, rule, q)
    if problem.has_generator and q < p and not rule.inline:
        problem = split_generators(problem, p // q)
    run = base_run(problem.llm_only(), rule.base, lag)
    blocks = Blocks([len(ops) for ops in run.orders])
    note, held, shard = f"base {rule.base}", None, None
    if problem.has_encoder:
        c, held = _nest_encoders(problem, rule, run, blocks)
        note += f", {rule.family} cuts {rule.ahead} ahead, encoder groups held {c}"
    if problem.has_generator and rule.inline:
        shard = _inline_generators(problem, run, blocks)
        note += ", generator on the last stage's rank"
    elif problem.has_generator:
        shard = _nest_generators(problem, rule, run, q, blocks)
        note += f", generator groups of {q}, lag {lag}"
    caps = Caps(held, shard, run.peak)
    _check_caps(problem.caps, caps)
    return Schedule(problem, blocks.merge(run.orders), "nested", caps, note)


def generator_group(problem: Problem, rule: Rule) -> int:
    """q, checked: microbatches that wait for the generator together."""
    p = problem.ranks
    if rule.base == "dualpipev" and problem.has_generator and rule.generator_group > 1:
        raise ScheduleError("dualpipev lets no microbatch wait for a generator. Use generator groups of 1.")
    q = rule.generator_group or (1 if rule.base == "dualpipev" else p)
    if q < 1 or p % q:
        raise ScheduleError(f"A generator group of {q} does not divide {p} ranks. Give a divisor of {p}.")
    return q


def _check_caps(limits: Caps, promise: Caps) -> None:
    """Raise if the schedule would hold more than the problem allows."""
    for what in ("encoder", "generator"):
        limit, need = getattr(limits, what), getattr(promise, what)
        if limit is not None and need is not None and need > limit + 1e-6:
            raise ScheduleError(
                f"The {what} memory limit of {limit:g} microbatches per rank cannot be kept: this schedule"
                f" holds {need:g}. Raise the limit, or use smaller microbatches."
            )
    for r, (limit, need) in enumerate(zip(limits.llm or (), promise.llm or (), strict=False)):
        if need > limit + 1e-6:
            raise ScheduleError(
                f"The LLM memory limit of {limit:g} stage activations on rank {r} cannot be kept: this"
                f" schedule holds {need:g}. Raise the limit, or use another base schedule or generator group."
            )


def least_memory(problem: Problem, rule: Rule = DEFAULT_RULE, every: bool = False) -> int:
    """The smallest encoder memory c, in groups, for which the rule works (on this problem's costs for time
    cuts); `every`: as if every microbatch had encoder work."""
    run = base_run(problem.llm_only(), rule.base, _lag(problem, rule, generator_group(problem, rule)))
    everyone = groups_of(range(problem.microbatches), problem.ranks)
    groups = everyone if every else encoder_groups(problem, rule.merge, rule.encoder_group)
    return _delay(problem, run, groups, _cuts(rule, run, groups))


def counts_whole(problem: Problem) -> bool:
    """Whether a rank holds whole microbatches of an encoder: c for c groups."""
    return any(not (e.items or e.frozen or e.recompute) for e in problem.encoders)


def _lag(problem: Problem, rule: Rule, q: int) -> int:
    """w: how many microbatches may wait between the last forward and its backward, the one at work
    included."""
    if not problem.has_generator or rule.base == "dualpipev" or rule.inline:
        return 1
    return q if q == problem.ranks else q + 1


@lru_cache(maxsize=16)
def base_run(problem: Problem, base: str, lag: int = 1) -> BaseRun:
    """The base schedule of an LLM-only problem, played. Kept for the next plan: pipelines of one job share
    it."""
    even = replace(problem, llm_forward=(1.0,) * problem.microbatches, llm_backward=(1.0,) * problem.microbatches)
    orders, graph, peak = _structure(even, base, lag)
    graph = graph.with_costs(problem)
    start, end = graph.replay()
    return BaseRun(orders, graph, start, end, peak)


def forget_bases() -> None:
    """Forget the base schedules that are kept for the next plan."""
    base_run.cache_clear()
    _structure.cache_clear()


@lru_cache(maxsize=16)
def _structure(problem: Problem, base: str, lag: int) -> tuple[Orders, Graph, tuple[float, ...]]:
    """What base schedules of problems that differ in costs alone have in common."""
    orders = base_order(base, problem.ranks, problem.stages // problem.ranks, problem.microbatches, lag)
    return orders, Graph(problem, orders), _llm_peak(problem, orders)


def _llm_peak(problem: Problem, orders: Orders) -> tuple[float, ...]:
    share, peaks = problem.stage_share, []
    for ops in orders:
        now = top = 0.0
        for kind, s, _, _ in ops:
            if kind == "F":
                now += share[s]
                top = max(top, now)
            elif kind in ("B", "W"):
                now -= share[s]
        peaks.append(round(top, 9))
    return tuple(peaks)


def _cuts(rule: Rule, run: BaseRun, groups: list[Sequence[int]]) -> list[list[int]]:
    """For each group the position of its cut on each rank."""
    graph, first = run.graph, run.graph.problem.stage_rank[0]
    entries = [graph.index[op] for op in run.orders[first] if op.kind == "F" and op.stage == 0]
    place = {graph.ops[i].microbatch: n for n, i in enumerate(entries)}
    references = [
        entries[max(0, place[group[0]] - (rule.ahead if g else 0))] for g, group in enumerate(groups)
    ]
    if rule.family == "wave":
        return wave_cuts(graph, references)
    return time_cuts(graph, run.start, [run.start[i] for i in references])


def _delay(problem: Problem, run: BaseRun, groups: list[Sequence[int]], cuts: list[list[int]]) -> int:
    """c: after how many cuts the gradients of a group's features are there, at the latest."""
    if all(e.frozen for e in problem.encoders):
        return 1
    stage = min(s for e in problem.encoders for s in e.feeds)
    rank = problem.stage_rank[stage]
    first = run.graph.first[rank]
    position = [run.graph.backward(stage, j) - first for j in range(problem.microbatches)]
    worst = 1
    for g, group in enumerate(groups):
        ready = max(position[j] for j in group)
        after = next((h for h in range(g + 1, len(groups)) if cuts[h][rank] > ready), len(groups))
        worst = max(worst, after - g)
    return worst


def _nest_encoders(problem: Problem, rule: Rule, run: BaseRun, blocks: Blocks) -> tuple[int, float]:
    """Insert all encoder operations; returns c, the groups that a rank holds, and what they amount to in
    microbatches."""
    p = problem.ranks
    groups = encoder_groups(problem, rule.merge, rule.encoder_group)
    cuts = _cuts(rule, run, groups)
    delay = _delay(problem, run, groups, cuts)
    aligned = rule.family == "wave" and rule.encoder_group <= p
    slots = encoder_slots(problem, groups, aligned, rule.whole, delay - 1 if rule.level else 0)
    if rule.memory is not None and rule.memory < delay and rule.encoder_group in (0, p) and counts_whole(problem):
        raise ScheduleError(
            f"An encoder memory of {rule.memory:g} microbatches per rank is too small: {rule.base} with"
            f" {rule.family} cuts gets a group's gradients back after {delay}. Give at least {delay}."
        )
    depth = delay - 1 if rule.fill is None else rule.fill
    back = depth if rule.drain is None else rule.drain
    c = max(delay, depth + 1, back + 1)
    windows = Windows(run, problem)
    returning: Slots = [[[] for _ in range(p)] for _ in range(len(groups))]  # backwards at each cut
    last: list[tuple[int, int, list[Op]]] = []  # (group, rank, backwards after the last cut)
    for g, row in enumerate(slots):
        for r, ops in enumerate(row):
            for h, due in _due(problem, run, rule, cuts, g + c, backward_of(ops, problem)):
                if h < len(groups):
                    returning[h][r] += due
                else:
                    last.append((g, r, due))
    for g in range(len(groups)):
        for r in range(p):
            at = cuts[g][r]
            blocks.add(r, at, returning[g][r])
            if 1 <= g <= depth:
                at = windows.early(r, slots[g][r], at)
            blocks.add(r, at, slots[g][r])
    for g, r, due in last:
        at = len(run.orders[r])
        if len(groups) - 1 - back <= g < len(groups) - 1:
            at = windows.late(r, due, _gradient_time(problem, run, groups[g]))
        blocks.add(r, at, due)
    return c, blocks.encoder_peak(problem)


def _due(
    problem: Problem, run: BaseRun, rule: Rule, cuts: list[list[int]], usual: int, backward: list[Op]
) -> list[tuple[int, list[Op]]]:
    """At which cut which of a rank's backwards of one group run: all c cuts after their forwards; of a group of more
    than P microbatches each as soon as its gradient is there."""
    if rule.encoder_group <= problem.ranks:
        return [(usual, backward)]
    rank = problem.stage_rank[min(s for e in problem.encoders for s in e.feeds)]
    parts: dict[int, list[Op]] = {}
    for op in backward:
        ready = _gradient_time(problem, run, op.microbatches) - run.graph.first[rank]
        h = bisect_right(cuts, ready, key=lambda cut: cut[rank])
        parts.setdefault(h, []).append(op)
    return list(parts.items())


def _gradient_time(problem: Problem, run: BaseRun, group: Sequence[int]) -> int:
    """The operation of the base schedule after which all features of the group have their gradient."""
    stage = min(s for e in problem.encoders for s in e.feeds)
    return max((run.graph.backward(stage, j) for j in group), key=run.end.__getitem__)


def _nest_generators(problem: Problem, rule: Rule, run: BaseRun, q: int, blocks: Blocks) -> float:
    """Insert all generator operations, in groups of q microbatches; returns the largest one, in
    microbatches."""
    graph, last = run.graph, problem.stages - 1
    groups = groups_of(range(problem.microbatches), q)
    wave = rule.family == "wave" and q == problem.ranks
    slots: Slots = generator_slots(problem, groups, aligned=wave)
    if wave:
        cuts = wave_cuts(graph, [graph.backward(last, group[0]) for group in groups])
    else:
        ends = [max(run.end[graph.index["F", last, j, ()]] for j in group) for group in groups]
        cuts = time_cuts(graph, run.start, ends)
    worst, units = 0.0, [(generator, generator.mean_cost) for generator in problem.generators]
    for g, cut in enumerate(cuts):
        for r, at in enumerate(cut):
            blocks.add(r, at, slots[g][r])
            for op in slots[g][r]:
                generator, mean = units[op.stage]
                worst = max(worst, generator_amount(generator, op, mean))
    return round(worst, 9)


def _inline_generators(problem: Problem, run: BaseRun, blocks: Blocks) -> float:
    """Each microbatch's generator work right before its first backward, on the rank of the last stage."""
    last = problem.stages - 1
    rank = problem.stage_rank[last]
    for j in range(problem.microbatches):
        ops = [Op("G", g, j) for g, generator in enumerate(problem.generators) if generator.cost[j] > 0]
        blocks.add(rank, run.graph.backward(last, j) - run.graph.first[rank], ops)
    return 1.0
