"""Where cuts fall on each rank, and the bookkeeping of what is inserted where."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.base import Orders
from ultraep_compile.schedules.dependencies import Graph, durations
from ultraep_compile.schedules.holdings import memory_steps
from ultraep_compile.schedules.problem import Problem

if TYPE_CHECKING:
    from ultraep_compile.schedules.nested import BaseRun

_SLACK = 1e-9


def wave_cuts(graph: Graph, references: Sequence[int]) -> list[list[int]]:
    """For each reference operation the position, on each rank, of the first operation that is or depends on
    it.

    Each reference must depend on the one before, so that one backward sweep over the operations serves them
    all."""
    successors = graph.successors()
    first, rank = graph.first, graph.rank
    cut = list(first[1:])  # in operation numbers
    result = []
    for reference in reversed(references):
        stack = [reference]
        while stack:
            i = stack.pop()
            r = rank[i]
            if i < cut[r]:
                for k in range(i, cut[r]):
                    stack += successors[k]
                cut[r] = i
        result.append([c - first[r] for r, c in enumerate(cut)])
    return result[::-1]


def time_cuts(graph: Graph, start: Sequence[float], times: Sequence[float]) -> list[list[int]]:
    """For each time the position, on each rank, of the first operation that starts at it or later."""
    rows = [start[a:b] for a, b in zip(graph.first, graph.first[1:], strict=False)]
    return [[bisect_left(row, t - _SLACK) for row in rows] for t in times]


class Blocks:
    """What to insert before which position of each rank's list."""

    __slots__ = ("lengths", "ranks")

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.ranks: list[dict[int, list[Op]]] = [{} for _ in lengths]

    def add(self, rank: int, position: int, ops: Sequence[Op]) -> None:
        if ops:
            self.ranks[rank].setdefault(position, []).extend(ops)

    def encoder_peak(self, problem: Problem) -> float:
        """The most that a rank holds at once, in microbatches of one encoder."""
        worst = 0.0
        for inserted in self.ranks:
            held = [0.0] * len(problem.encoders)
            for op, takes, gives in memory_steps(problem, [op for at in sorted(inserted) for op in inserted[at]]):
                held[op.stage] += sum(amount for what, amount in takes if what == "count")
                worst = max(worst, held[op.stage])
                held[op.stage] -= sum(amount for what, amount in gives if what == "count")
        return round(worst, 9)

    def merge(self, orders: Orders) -> tuple[tuple[Op, ...], ...]:
        merged = []
        for inserted, order in zip(self.ranks, orders, strict=True):
            ops, at = [], 0
            for position in sorted(inserted):
                ops += order[at:position]
                ops += inserted[position]
                at = position
            merged.append(tuple(ops + order[at:]))
        return tuple(merged)


class Windows:
    """The bubbles of warm-up and cool-down, and who fills them.

    A rank has two windows in the warm-up, before its first operation and before its first backward, and two
    in the cool-down, the gaps after its last forward (used from their beginning) and the time after its last
    operation. Work goes to the roomier one."""

    __slots__ = ("early_room", "late_room", "problem", "run")

    def __init__(self, run: BaseRun, problem: Problem) -> None:
        self.run = run
        start, end, graph = run.start, run.end, run.graph
        total = max(end)
        self.early_room: list[dict[int, float]] = []
        self.late_room: list[dict[int, float]] = []
        for r, ops in enumerate(run.orders):
            a = graph.first[r]
            back = next(i for i, op in enumerate(ops) if op.kind in "BI")
            self.early_room.append({0: start[a]})
            if back:
                self.early_room[r][back] = start[a + back] - end[a + back - 1]
            tail = max(i for i, op in enumerate(ops) if op.kind == "F") + 1
            gaps = sum(start[a + i] - end[a + i - 1] for i in range(tail, len(ops)))
            self.late_room.append({len(ops): total - end[a + len(ops) - 1], tail: gaps})
        self.problem = problem

    def early(self, rank: int, forward: Sequence[Op], cut: int) -> int:
        """The position for a group's forward: a warm-up window that holds it, else its cut."""
        room, cost = self.early_room[rank], sum(durations(self.problem, forward))
        best = max(room, key=room.__getitem__)
        if room[best] < cost - _SLACK and best > cut:
            return cut
        room[best] -= cost
        return min(best, cut)

    def late(self, rank: int, backward: Sequence[Op], ready: int) -> int:
        """The position for a group's backward, which needs the gradient that operation `ready` gives."""
        run, room = self.run, self.late_room[rank]
        length = len(run.orders[rank])
        tail = min(room)
        if tail < length:
            first = run.graph.first[rank]
            if run.graph.rank[ready] == rank:
                in_time = ready < first + tail
            else:
                in_time = run.end[ready] <= run.start[first + tail] + _SLACK
            choice = [at for at in room if at == length or in_time]
        else:
            choice = [length]
        best = max(choice, key=room.__getitem__)
        room[best] -= sum(durations(self.problem, backward))
        return best
