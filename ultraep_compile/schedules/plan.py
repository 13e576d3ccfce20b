"""One call for every method: name it, or let the nested rule's free choices be tried and the fastest
taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from ultraep_compile.errors import ScheduleError, nearest
from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.baselines import colocated, encoder_first, flush, recompute, uneven
from ultraep_compile.schedules.bounds import lower_bound
from ultraep_compile.schedules.collection import without_collection
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.disttrain import disttrain
from ultraep_compile.schedules.fit import fit
from ultraep_compile.schedules.improve import improve
from ultraep_compile.schedules.nested import Rule, base_run, counts_whole, generator_group, least_memory, nest
from ultraep_compile.schedules.optimus import optimus
from ultraep_compile.schedules.problem import Caps, Problem
from ultraep_compile.schedules.simulate import peaks
from ultraep_compile.schedules.validate import check_memory
from ultraep_compile.schedules.work import (
    encoder_groups,
    even_order,
    is_uneven,
    renamed,
    reordered,
    tidal_order,
)

BASELINES: dict[str, Callable[[Problem, str], Schedule]] = {
    "colocated": colocated,
    "uneven": uneven,
    "encoder-first": encoder_first,
    "flush": flush,
    "optimus": optimus,
    "disttrain": disttrain,
    "recompute": recompute,
}
Order = tuple[int, ...]  # microbatches as they enter the pipeline; empty: in order of number
_UNEVEN = 1.8  # times c mean microbatches: held by a rank for uneven items before it counts against a plan
_MERGE = 1.25
METHODS = ("nested", *BASELINES)
_CLOSE = 6  # schedules slightly above the memory that are brought within it
_SHARE = 800_000  # operations in all schedules that are tried of one problem
_EFFORT = 200_000  # operations played in a local search
_LARGE = 8192  # ranks times microbatches
_RIVALS = ("encoder-first", "optimus", "flush", "colocated")  # that keep the problem as it is


def plan(
    problem: Problem,
    method: str = "nested",
    base: str = "1f1b",
    memory: float | None = None,
    generator_group: int = 0,
    thorough: bool = True,
) -> Schedule:
    """The schedule of a problem by a method. `memory`: encoder microbatches that a rank may hold (nested
    only; None: the fewest). Equal problems give equal schedules, so that every rank can plan for itself.
    `thorough`: search for the best use of the memory given; else only where the rule alone finds nothing."""
    if method not in METHODS:
        raise ScheduleError(f"There is no method {method!r}. {nearest(method, METHODS)}")
    if method == "nested":
        return plan_nested(problem, Rule(base=base, memory=memory, generator_group=generator_group), thorough)
    return BASELINES[method](problem, base)


def plan_many(problems: Iterable[Problem], **choices) -> list[Schedule]:
    """A schedule for each pipeline of a job. Pipelines whose LLM costs agree share the base schedule."""
    return [plan(problem, **choices) for problem in problems]


@without_collection
def plan_nested(problem: Problem, rule: Rule, thorough: bool = True) -> Schedule:
    """The best of a few nested schedules within rule.memory: the fastest; where items make memory uneven, the
    one that holds least beyond 1.8 c mean microbatches among those that are as fast as unlimited memory would
    be."""
    if not problem.has_encoder and not problem.has_generator:
        return nest(problem, rule)
    generator_group(problem, rule)
    tried = _Tried(problem, rule)
    for candidate, order in _candidates(problem, rule):
        tried.attempt(candidate, order)
    for q in _smaller_groups(problem, rule):
        if tried.attempts and not thorough:
            break
        for candidate, order in _candidates(problem, replace(rule, generator_group=q)):
            tried.attempt(candidate, order)
    if not tried.attempts and _says_no(problem, rule, tried.limit):
        raise tried.refused[0]
    if problem.has_encoder:
        if tried.attempts:
            _vary_depths(problem, rule, tried)
        elif tried.least < math.inf:
            _hold_less(problem, rule, tried, thorough)
        if rule.memory is not None and tried.attempts and thorough:
            _hold_more(problem, rule, tried)
    if tried.attempts and not _is_plain(problem, rule) and tried.best().makespan > _colocated_work(problem):
        _beat_colocation(problem, rule, tried)
    if thorough or not tried.attempts:
        _compete(problem, rule, tried)
    if thorough and tried.attempts and tried.limit is not None:
        _search(problem, tried)
    best = tried.best()
    return renamed(best.schedule, best.order) if best.order else best.schedule


def _smaller_groups(problem: Problem, rule: Rule) -> list[int]:
    """Generator groups below P, for an LLM memory in which P microbatches cannot wait."""
    if not problem.has_generator or rule.generator_group or problem.caps.llm is None or rule.base == "dualpipev":
        return []
    return [q for q in range(problem.ranks - 1, 0, -1) if problem.ranks % q == 0]


def _says_no(problem: Problem, rule: Rule, limit: float | None) -> bool:
    """Whether no nested schedule can be meant: too few microbatches, or a memory that is too small for whole groups."""
    if problem.microbatches < problem.ranks:
        return True
    if not problem.has_encoder or limit is None or not counts_whole(problem):
        return False
    needs = (least_memory(reordered(problem, order) if order else problem, r) for r, order in _candidates(problem, rule))
    return limit < min(needs)


def _vary_depths(problem: Problem, rule: Rule, tried: _Tried) -> None:
    """How many groups go into the warm-up bubble, and how many into the cool-down bubble: the two ends hardly
    interact, so one is varied after the other. On 1F1B with the least memory, full depth at both ends is the
    best wherever it beats the ideal."""
    best = tried.best()
    least = least_memory(tried.problem_in(best.order), best.rule)
    most = max(least, int(rule.memory or 0))
    if rule.base == "1f1b" and most == least and best.makespan <= tried.ideal:
        return
    for drain in sorted({0, least - 1, *(range(most) if rule.memory else ())}):
        if drain != least - 1 and not tried.enough_tried:
            tried.attempt(replace(best.rule, fill=least - 1, drain=drain), best.order)
    best = tried.best()
    drain = least - 1 if best.rule.drain is None else best.rule.drain
    for fill in sorted({0, *range(least, most)}):
        if (fill or best.makespan > tried.ideal) and not tried.enough_tried:
            tried.attempt(replace(best.rule, fill=fill, drain=drain), best.order)


def _hold_less(problem: Problem, rule: Rule, tried: _Tried, thorough: bool) -> None:
    """Items in uneven amounts, of which c groups exceed the memory: groups of equal work, dealt by what the ranks still
    hold, in ever smaller portions."""
    p = problem.ranks
    for order in (tuple(even_order(problem)), tuple(tidal_order(problem))):
        for size in sorted({p, p // 2, p // 4, 1} - {0}, reverse=True):
            for family, ahead in (("time", 1), ("wave", 0)):
                for fill in (None, 0):
                    if tried.enough_tried:
                        return
                    tight = replace(rule, family=family, ahead=ahead, encoder_group=size, level=True, fill=fill)
                    tried.attempt(tight, order)
                    if tried.attempts and not thorough:
                        return
        if tried.attempts:
            return


def _hold_more(problem: Problem, rule: Rule, tried: _Tried) -> None:
    """Groups of several times P microbatches, as far as the memory goes: more work to choose from evens out what the
    ranks get at a cut."""
    p = problem.ranks
    if not is_uneven(problem):
        return
    most = min(int(rule.memory or 0), -(-problem.microbatches // p))
    orders = (tuple(even_order(problem)), tuple(tidal_order(problem)), ())
    for n in range(most, 1, -1):
        for order in orders:
            for fill in (0, 1) if n < most else (0,):
                if tried.enough_tried:
                    return
                tried.attempt(replace(rule, family="time", ahead=1, encoder_group=n * p, fill=fill), order)


def _compete(problem: Problem, rule: Rule, tried: _Tried) -> None:
    """What others do, where it fits into the memory that is there."""
    limit, llm, rivals = tried.limit, problem.caps.llm, _RIVALS
    if limit is None and llm is None:  # least memory is wanted
        rivals = () if _is_plain(problem, rule) or any(e.items for e in problem.encoders) else _RIVALS[:1]
    elif problem.ranks * problem.microbatches > _LARGE:
        rivals = tuple(method for method in rivals if method != "optimus")  # whose own planning takes minutes
    if tried.attempts:
        promise = tried.best().schedule.caps
        limit = promise.encoder if limit is None else limit
        llm = promise.llm if llm is None else llm
    caps = Caps(limit, problem.caps.generator, llm)
    for method in rivals:
        if tried.enough_tried:
            return
        try:
            made = BASELINES[method](problem, rule.base)
        except ScheduleError:
            continue
        held = _held(made)
        if _within(replace(held, encoder=None), caps):
            tried.add(rule, (), replace(made, method="nested", caps=held, note=f"as {method}: {made.note}"), limit)
    if limit is None:
        return
    for close in sorted(tried.over)[:_CLOSE]:
        if tried.enough_tried or (tried.attempts and close.makespan >= tried.best().makespan):
            return
        made = fit(close.schedule, limit)
        try:
            tried.add(close.rule, close.order, replace(made, caps=_held(made), note=f"{made.note}, fitted"), limit)
        except ScheduleError as error:  # what waits for memory waits for itself
            tried.refused.append(error)


def _search(problem: Problem, tried: _Tried) -> None:
    """Local search from the best, as long as a small problem takes."""
    best = tried.best()
    count = sum(map(len, best.schedule.ranks))
    if count > _EFFORT // 20:
        return
    bound = lower_bound(best.schedule.problem, any(op.kind == "I" for op in best.schedule.ranks[0]))
    caps = Caps(tried.limit, best.schedule.caps.generator, best.schedule.caps.llm)
    better = improve(replace(best.schedule, caps=caps), bound * (1 + 1e-6), _EFFORT // count)
    if better.ranks != best.schedule.ranks:
        tried.add(best.rule, best.order, replace(better, caps=_held(better), note=f"{better.note}, searched"))


def _held(schedule: Schedule) -> Caps:
    peak = peaks(schedule)
    return Caps(max(peak.encoder), max(peak.generator), peak.llm)


def _within(held: Caps, limits: Caps) -> bool:
    pairs = [(held.encoder, limits.encoder), (held.generator, limits.generator)]
    pairs += zip(held.llm or (), limits.llm or (), strict=False)
    return all(limit is None or (amount or 0.0) <= limit + 1e-6 for amount, limit in pairs)


class _Attempt(NamedTuple):
    """A nested schedule and what it is judged by."""

    makespan: float
    encoder: float
    turn: int
    rule: Rule
    order: Order
    schedule: Schedule  # of the reordered problem


class _Tried:
    """The attempts at one problem so far."""

    def __init__(self, problem: Problem, rule: Rule) -> None:
        self.problems: dict[Order, Problem] = {(): problem}
        self.attempts: list[_Attempt] = []
        self.refused: list[ScheduleError] = []
        self.limit = min((x for x in (rule.memory, problem.caps.encoder) if x is not None), default=None)
        self.least = math.inf  # held by an attempt that held too much
        self.spent = 0  # operations in schedules tried
        self.over: list[_Attempt] = []  # those that held too much
        work = problem.encoder_work() + problem.generator_work()
        self.ideal = max(base_run(problem.llm_only(), rule.base).end) + work / problem.ranks
        self.enough = 0.0  # makespan below which less memory counts more than less time
        self.budget = 0.0
        if any(e.items for e in problem.encoders) and rule.memory is None:
            self.enough = self.ideal * (1 + 1e-9)
            self.budget = _UNEVEN * least_memory(problem, replace(rule, family="time", ahead=1), every=True)

    def problem_in(self, order: Order) -> Problem:
        """The problem with its microbatches in entry order."""
        if order not in self.problems:
            self.problems[order] = reordered(self.problems[()], order)
        return self.problems[order]

    def attempt(self, rule: Rule, order: Order = ()) -> None:
        try:
            self.add(rule, order, nest(self.problem_in(order), rule))
        except ScheduleError as error:
            self.refused.append(error)

    def add(self, rule: Rule, order: Order, schedule: Schedule, limit: float | None = None) -> None:
        self.spent += sum(map(len, schedule.ranks))
        turn, held = len(self.attempts), schedule.caps.encoder or 0.0
        limit = self.limit if limit is None else limit
        if limit is not None and held > limit + 1e-6:
            self.least = min(self.least, held)
            self.over.append(_Attempt(_makespan(schedule), held, len(self.over), rule, order, schedule))
            return
        self.attempts.append(_Attempt(_makespan(schedule), held, turn, rule, order, schedule))

    @property
    def enough_tried(self) -> bool:
        """Whether a large problem has taken its share of planning time, a larger one while no schedule fits. Counted,
        not measured: every rank stops at the same attempt."""
        return self.spent > (_SHARE if self.attempts else 4 * _SHARE)

    def best(self) -> _Attempt:
        if not self.attempts and self.least < math.inf:
            raise ScheduleError(
                f"An encoder memory of {self.limit:g} microbatches per rank is too small for these items: the least that"
                f" was found to do is {self.least:.3g}. Give at least {math.ceil(self.least)}, or use smaller microbatches."
            )
        if not self.attempts:
            raise self.refused[0]
        return min(self.attempts, key=self.key)

    def key(self, attempt: _Attempt) -> tuple[float, ...]:
        over = max(0.0, attempt.encoder - self.budget) if self.enough else 0.0
        return (attempt.makespan > self.enough > 0, round(over, 3), *attempt[:3])


def _beat_colocation(problem: Problem, rule: Rule, tried: _Tried) -> None:
    """Never lose to co-location, which happens where there is little work in odd shapes: try more rules, then
    move single operations, then stay co-located if that holds no more than promised."""
    plain = colocated(problem, rule.base)
    target = _makespan(plain)
    tried.enough = min(tried.enough, target)
    for candidate, order in _more_candidates(problem, rule):
        if tried.best().makespan <= target:
            return
        tried.attempt(candidate, order)
    groups = float(least_memory(problem, tried.best().rule, every=True)) if problem.has_encoder else 0.0
    for start in sorted(tried.attempts, key=tried.key)[:8]:
        if tried.best().makespan <= target:
            return
        # a whole microbatch per group held, where this problem's happen to be less
        caps = replace(start.schedule.caps, encoder=max(groups, start.encoder) or None)
        tried.add(start.rule, start.order, improve(replace(start.schedule, caps=caps), target))
    caps = tried.attempts[-1].schedule.caps
    if tried.best().makespan > target and _holds_no_more(plain, caps):
        tried.add(rule, (), replace(plain, method="nested", caps=caps, note=plain.note + ", nothing moved"))


def _colocated_work(problem: Problem) -> float:
    """What co-location gives to the first or last stage's rank: it cannot be faster."""
    llm = problem.llm_work() / sum(problem.stage_share)
    ends = (
        (problem.stage_rank[0], problem.encoder_work()),
        (problem.stage_rank[-1], problem.generator_work()),
    )
    return max(llm * sum(problem.stage_share[s] for s in problem.rank_stages(r)) + work for r, work in ends)


def _makespan(schedule: Schedule) -> float:
    """Rounded, so that rounding errors decide nothing."""
    return float(f"{max(Graph(schedule.problem, schedule.ranks).replay()[1]):.9g}")


def _candidates(problem: Problem, rule: Rule) -> Iterator[tuple[Rule, Order]]:
    """Cut families and entry orders worth trying.

    Wave cuts are exact where every rank has the same work per group; time cuts one forward ahead let any rank
    feed any microbatch. Interleaved bases take a group's microbatches in one burst and so profit from cuts
    further ahead once messages have latency."""
    uneven = is_uneven(problem)
    items = any(e.items for e in problem.encoders) or any(g.items for g in problem.generators)
    families = [("wave", 0), ("time", 1)]
    if items:
        families = [("time", 1)]
    elif not uneven and rule.generator_group in (0, problem.ranks) and rule.base != "dualpipev":
        families = [("wave", 0)]
    if problem.latency and problem.stages > problem.ranks:
        families += [("time", 1), ("time", problem.ranks)]
    orders: list[Order] = [()]
    if uneven:
        orders = [tuple(tidal_order(problem))] if items else [(), tuple(tidal_order(problem))]
    for family, ahead in dict.fromkeys(families):
        for order in orders if family == "wave" else orders[-1:]:
            changed = replace(rule, family=family, ahead=ahead)
            yield changed, order
            if items and uneven:
                entering = reordered(problem, order)
                if encoder_groups(entering, _MERGE) != encoder_groups(entering):
                    yield replace(changed, merge=_MERGE), order


def _is_plain(problem: Problem, rule: Rule) -> bool:
    """Whether the rule cannot lose to co-location: equal costs, or a generator group that was asked for."""
    if problem.has_generator:
        return bool(rule.generator_group)
    if rule.base != "1f1b":
        return False
    return not is_uneven(problem) and not any(e.items or e.feeds != (0,) for e in problem.encoders)


def _holds_no_more(schedule: Schedule, caps: Caps) -> bool:
    try:
        check_memory(schedule, caps)
    except ScheduleError:
        return False
    return True


def _more_candidates(problem: Problem, rule: Rule) -> Iterator[tuple[Rule, Order]]:
    """Everything else."""
    orders: list[Order] = [()]
    if problem.has_encoder:
        orders += [tuple(tidal_order(problem)), tuple(even_order(problem))]
    inlines = (True, False) if problem.has_generator and not rule.generator_group else (False,)
    wholes = (False, True) if any(e.items for e in problem.encoders) else (False,)
    for inline, whole, order in product(inlines, wholes, orders):
        for family, ahead in (("wave", 0), ("time", 1), ("wave", 1), ("time", 0), ("time", problem.ranks)):
            for fill in (None, 0):
                changed = replace(rule, family=family, ahead=ahead, fill=fill, inline=inline, whole=whole)
                yield changed, order
