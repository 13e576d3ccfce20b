"""Which rank runs which encoder and generator work of a group: hosts of whole microbatches, balanced items.

A group is P consecutive microbatches with such work, in the order in which they enter the pipeline.
`slots[g][r]` lists the operations of rank r for group g.

Worked example, P = 2, two microbatches with image costs (6, 1) and (4, 3): whole microbatches give loads 7
and 7; had they been (6, 3) and (1, 1), 9 and 2, where items give 6 and 5."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace

from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.problem import Encoder, Problem

Slots = list[list[list[Op]]]
_MOST_JOINED = 4  # groups


def groups_of(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """The microbatches in entry order, cut into groups; the last may be shorter."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def encoder_groups(problem: Problem, merge: float = 0.0, size: int = 0) -> list[Sequence[int]]:
    """The microbatches that have encoder work, in groups of `size` (0: P); the last may be shorter.

    `merge`: groups are joined with the next one while one item makes the busiest rank wait for more than
    `merge` times the mean of the ranks (0: never). A dear item then meets enough other work to even out."""
    busy = [j for j in _all(problem) if any(e.forward[j] > 0 for e in problem.encoders)]
    groups = groups_of(busy, size or problem.ranks)
    if not merge:
        return groups
    joined: list[Sequence[int]] = []
    for group in groups:
        if (
            joined
            and len(joined[-1]) < _MOST_JOINED * problem.ranks
            and _imbalance(problem, joined[-1]) > merge
        ):
            joined[-1] = [*joined[-1], *group]
        else:
            joined.append(group)
    return joined


def _imbalance(problem: Problem, group: Sequence[int]) -> float:
    """Busiest rank over mean, with a group's items dealt dearest first."""
    items = [
        -_whole_cost(e)(j) * share
        for e in problem.encoders
        for j in group
        for share in (e.items[j] if e.items else (1.0,))
    ]
    load = [0.0] * problem.ranks
    for negative in sorted(items):
        heapq.heapreplace(load, load[0] - negative)
    return max(load) * problem.ranks / sum(load) if any(load) else 1.0


def encoder_slots(
    problem: Problem, groups: list[Sequence[int]], aligned: bool, whole: bool = False, level: int = 0
) -> Slots:
    """Forward operations of all encoders. `aligned`: the i-th microbatch of a group on rank i, as a wave cut
    needs, else microbatches are spread by cost. Items are spread by cost, unless `whole`; with `level` so that
    the rank's sum over that many groups before, too, is even: what it holds rather than what it does at once."""
    slots: Slots = [[[] for _ in range(problem.ranks)] for _ in groups]
    added: list[list[float]] = []  # by each group to the ranks
    for g, group in enumerate(groups):
        load = [0.0] * problem.ranks
        for row in added[max(0, g - level) : g]:
            load = [x + y for x, y in zip(load, row, strict=True)]
        start = list(load)
        for e, encoder in enumerate(problem.encoders):
            busy = [j for j in group if encoder.forward[j] > 0]
            cost = _whole_cost(encoder)
            if encoder.items and not whole:
                _balance_items(slots[g], load, "EF", e, busy, encoder.items, cost)
            elif aligned:
                for i, j in enumerate(group):
                    if encoder.forward[j] > 0:
                        slots[g][i % problem.ranks].append(Op("EF", e, j))
            else:
                _spread_whole(slots[g], load, "EF", e, busy, cost)
        added.append([after - x for after, x in zip(load, start, strict=True)])
    return slots


def generator_slots(problem: Problem, groups: list[Sequence[int]], aligned: bool) -> Slots:
    """The same for generators. Aligned hosts run backwards: the i-th microbatch on rank P-1-i, because the
    backward wave that takes the gradients starts on the last rank."""
    slots: Slots = [[[] for _ in range(problem.ranks)] for _ in groups]
    for g, group in enumerate(groups):
        load = [0.0] * problem.ranks
        for k, generator in enumerate(problem.generators):
            busy = [j for j in group if generator.cost[j] > 0]
            cost = generator.cost.__getitem__
            if generator.items:
                _balance_items(slots[g], load, "G", k, busy, generator.items, cost)
            elif aligned:
                for i, j in enumerate(group):
                    if generator.cost[j] > 0:
                        slots[g][problem.ranks - 1 - i % problem.ranks].append(Op("G", k, j))
            else:
                _spread_whole(slots[g], load, "G", k, busy, cost)
    return slots


def is_uneven(problem: Problem) -> bool:
    """Whether aligned hosts would leave ranks with unequal encoder work."""
    return any(len(set(e.forward)) > 1 or len(set(e.backward)) > 1 for e in problem.encoders)


def tidal_order(problem: Problem) -> list[int]:
    """Entry order that puts microbatches with the dearest indivisible piece into one group, and takes light
    and heavy groups in turn. A group costs what its busiest rank costs, so dear pieces should share a group;
    a rank holds neighbouring groups at once, so heavy ones should not be neighbours. Legal because gradients
    are summed over microbatches."""

    def dearest(j: int) -> float:
        return max(
            (_whole_cost(e)(j) * max(e.items[j], default=0.0) if e.items else _whole_cost(e)(j))
            for e in units
        )

    units = problem.encoders
    groups = groups_of(sorted(_all(problem), key=lambda j: -dearest(j)), problem.ranks)
    ragged = [groups.pop()] if len(groups[-1]) < problem.ranks else []
    turns: list[Sequence[int]] = []
    while groups:
        turns.append(groups.pop())
        if groups:
            turns.append(groups.pop(0))
    return [j for group in turns + ragged for j in group]


def even_order(problem: Problem) -> list[int]:
    """Entry order whose groups of P have nearly equal encoder work: dearest microbatch first, each into the
    lightest group with room. With divisible microbatches this evens out what a rank holds from group to
    group."""
    p, m = problem.ranks, problem.microbatches
    count = -(-m // p)
    cost = [sum(e.forward[j] for e in problem.encoders) for j in _all(problem)]
    room = [p] * (count - 1) + [m - p * (count - 1)]
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, g) for g in range(count)]
    for j in sorted(_all(problem), key=lambda j: -cost[j]):
        load, g = heapq.heappop(heap)
        groups[g].append(j)
        if len(groups[g]) < room[g]:
            heapq.heappush(heap, (load + cost[j], g))
    return [j for group in groups for j in group]


def reordered(problem: Problem, order: Sequence[int]) -> Problem:
    """The problem with microbatch order[j] in place of j: what enters the pipeline j-th."""

    def pick(row: tuple) -> tuple:
        return tuple(row[j] for j in order) if row else row

    return replace(
        problem,
        llm_forward=pick(problem.llm_forward),
        llm_backward=pick(problem.llm_backward),
        encoders=tuple(
            replace(e, forward=pick(e.forward), backward=pick(e.backward), items=pick(e.items))
            for e in problem.encoders
        ),
        generators=tuple(replace(g, cost=pick(g.cost), items=pick(g.items)) for g in problem.generators),
    )


def renamed(schedule: Schedule, order: Sequence[int]) -> Schedule:
    """A schedule of reordered(problem, order) as one of the problem itself."""
    back = sorted(range(len(order)), key=order.__getitem__)
    ranks = tuple(
        tuple(
            Op(kind, s, order[j]) if not items else Op(kind, s, j, tuple((order[k], i) for k, i in items))
            for kind, s, j, items in ops
        )
        for ops in schedule.ranks
    )
    return replace(schedule, problem=reordered(schedule.problem, back), ranks=ranks)


def split_generators(problem: Problem, parts: int) -> Problem:
    """The problem with every generator that lists no items cut into `parts` equal shards per microbatch."""
    rows = ((1.0 / parts,) * parts,) * problem.microbatches
    generators = tuple(g if g.items else replace(g, items=rows) for g in problem.generators)
    return replace(problem, generators=generators)


def backward_of(ops: Sequence[Op], problem: Problem) -> list[Op]:
    """The encoder backwards that belong to these encoder forwards; frozen encoders have none."""
    return [op._replace(kind="EB") for op in ops if not problem.encoders[op.stage].frozen]


def _all(problem: Problem) -> range:
    return range(problem.microbatches)


def _whole_cost(encoder: Encoder) -> Callable[[int], float]:
    backward = encoder.backward or (0.0,) * len(encoder.forward)
    return lambda j: encoder.forward[j] + backward[j]


def _balance_items(
    ranks: list[list[Op]],
    load: list[float],
    kind: str,
    unit: int,
    busy: Sequence[int],
    items: tuple[tuple[float, ...], ...],
    cost: Callable[[int], float],
) -> None:
    """Longest processing time first: the dearest item to the least loaded rank, again and again."""
    heap = [(x, r) for r, x in enumerate(load)]
    heapq.heapify(heap)
    mine: list[list[tuple[int, int]]] = [[] for _ in ranks]
    pool = [(-cost(j) * share, j, i) for j in busy for i, share in enumerate(items[j])]
    for negative, j, i in sorted(pool):
        x, r = heap[0]
        heapq.heapreplace(heap, (x - negative, r))
        mine[r].append((j, i))
    for x, r in heap:
        load[r] = x
        if mine[r]:
            ranks[r].append(Op(kind, unit, -1, tuple(sorted(mine[r]))))


def _spread_whole(
    ranks: list[list[Op]],
    load: list[float],
    kind: str,
    unit: int,
    busy: Sequence[int],
    cost: Callable[[int], float],
) -> None:
    """Dearest microbatch to the least loaded rank, but of each P microbatches one to a rank."""
    free = set(range(len(ranks)))
    for j in sorted(busy, key=lambda j: -cost(j)):
        free = free or set(range(len(ranks)))
        r = min(free, key=lambda r: (load[r], r))
        free.discard(r)
        load[r] += cost(j)
        ranks[r].append(Op(kind, unit, j))
