"""Bring a schedule within an encoder memory: forwards that do not fit wait for the next backwards, which run as soon
as they can.

The LLM's order stays. Encoder operations on items are divided by microbatch for it, and what still runs side by side
is joined again. Whatever must wait costs time, not correctness; the makespan of the result decides whether it is worth
having."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.dependencies import Graph, durations
from ultraep_compile.schedules.holdings import encoder_amount

_SLACK = 1e-6


def fit(schedule: Schedule, limit: float) -> Schedule:
    """The schedule with no rank holding more than `limit` microbatches of an encoder, where that can be had by moving
    encoder operations within their ranks. Caps stay as they are; the result may be unable to run."""
    graph = Graph(schedule.problem, schedule.ranks)
    start, end = graph.replay()
    ranks = tuple(
        tuple(joined(_Rank(graph, start, end, rank, limit).reordered(), origins(ops)))
        for rank, ops in enumerate(schedule.ranks)
    )
    return replace(schedule, ranks=ranks)


class _Rank:
    """One rank's operations while they are put into a new order."""

    def __init__(self, graph: Graph, start: Sequence[float], end: Sequence[float], rank: int, limit: float) -> None:
        self.graph, self.problem, self.start, self.end, self.rank = graph, graph.problem, start, end, rank
        self.limit = limit + _SLACK
        self.means = [e.mean_forward for e in self.problem.encoders]
        self.held = [0.0] * len(self.means)
        self.keeps = [not (e.frozen or e.recompute) for e in self.problem.encoders]
        self.out: list[Op] = []
        self.waiting: list[tuple[float, Op]] = []  # forwards that did not fit, most urgent first
        self.back: list[tuple[float, Op]] = []  # backwards to come of forwards that ran, by when they can run
        self.ran: set[Op] = set()

    def reordered(self) -> list[Op]:
        first = self.graph.first[self.rank]
        for i in range(first, self.graph.first[self.rank + 1]):
            op = self.graph.ops[i]
            if op.kind == "EF":
                for part in sorted(parts(op), key=self.due):
                    self.forward(part)
            elif op.kind == "EB":
                for part in parts(op):
                    self.backward(part)
                self.admit()
            else:
                self.make_room(self.start[i], self.end[i])
                self.out.append(op)
        while self.waiting or self.back:  # what nothing made room for in time
            before = len(self.out)
            self.admit()
            if self.back and len(self.out) == before:
                self.backward(self.back[0][1])
            elif len(self.out) == before:
                self.out.append(heapq.heappop(self.waiting)[1])
        return self.out

    def due(self, op: Op) -> float:
        """When the first stage that reads an operation's features wants to start."""
        index, hop = self.graph.index, self.problem.latency
        return min(
            self.start[i] - hop * (self.graph.rank[i] != self.rank)
            for j in op.microbatches
            for s in self.problem.encoders[op.stage].feeds
            for i in (index["F", s, j, ()],)
        )

    def ready(self, op: Op) -> float:
        """When the gradients that a backward needs are there."""
        graph, hop = self.graph, self.problem.latency
        return max(
            self.end[i] + hop * (graph.rank[i] != self.rank)
            for j in op.microbatches
            for s in self.problem.encoders[op.stage].feeds
            for i in (graph.backward(s, j),)
        )

    def amount(self, op: Op) -> float:
        return encoder_amount(self.problem.encoders[op.stage], op, self.means[op.stage])

    def forward(self, op: Op) -> None:
        if not self.keeps[op.stage]:
            self.out.append(op)
            return
        urgent = self.due(op)
        behind = any(due <= urgent and other.stage == op.stage for due, other in self.waiting)
        if not behind and self.held[op.stage] + self.amount(op) <= self.limit:
            self.run(op)
        else:
            heapq.heappush(self.waiting, (urgent, op))

    def run(self, op: Op) -> None:
        self.out.append(op)
        self.held[op.stage] += self.amount(op)
        heapq.heappush(self.back, (self.ready(op), op._replace(kind="EB")))

    def backward(self, op: Op) -> None:
        """Run a backward, unless that was done before."""
        if not self.keeps[op.stage]:
            self.out.append(op)
            return
        if op in self.ran:
            return
        if all(op != known for _, known in self.back):  # its forward waits: both come later
            return
        self.ran.add(op)
        self.back = [entry for entry in self.back if entry[1] != op]
        heapq.heapify(self.back)
        self.out.append(op)
        self.held[op.stage] -= self.amount(op)

    def admit(self) -> None:
        """Run the forwards that fit by now, most urgent first."""
        left: list[tuple[float, Op]] = []
        for due, op in sorted(self.waiting):
            if self.held[op.stage] + self.amount(op) <= self.limit:
                self.run(op)
            else:
                left.append((due, op))
        self.waiting = left

    def make_room(self, now: float, end: float) -> None:
        """Before an operation of the LLM: run backwards whose gradients are there, if a waiting forward needs their
        room and is due."""
        while self.waiting:
            due, op = self.waiting[0]
            cost = durations(self.problem, [op])[0]
            free = [known for ready, known in sorted(self.back) if ready <= now + _SLACK and known.stage == op.stage]
            if due - cost >= end or not free:
                return
            while free and self.held[op.stage] + self.amount(op) > self.limit:
                self.backward(free.pop(0))
            if self.held[op.stage] + self.amount(op) > self.limit:
                return
            heapq.heappop(self.waiting)
            self.run(op)


def parts(op: Op) -> list[Op]:
    """An operation divided by microbatch."""
    if not op.items:
        return [op]
    rows: dict[int, list[tuple[int, int]]] = {}
    for j, i in op.items:
        rows.setdefault(j, []).append((j, i))
    return [op._replace(items=tuple(row)) for row in rows.values()]


def origins(ops: Iterable[Op]) -> dict[Op, Op]:
    """The operation that each of its parts came from."""
    return {part: op for op in ops for part in parts(op)}


def joined(ops: Sequence[Op], origin: Mapping[Op, Op]) -> Iterator[Op]:
    """Parts of one operation joined again where they run side by side, both forward and backward."""
    run_of: dict[Op, int] = {}
    runs: list[list[Op]] = []
    for _, group in groupby(ops, key=lambda op: (op.kind, op.stage) if op.items else op):
        row = list(group)
        run_of.update((op, len(runs)) for op in row)
        runs.append(row)

    def home(op: Op) -> tuple[Op, int, int]:
        forward, backward = op._replace(kind="EF"), op._replace(kind="EB")
        return origin[op], run_of.get(forward, -1), run_of.get(backward, -1)

    for row in runs:
        if not row[0].items:
            yield from row
            continue
        together: dict[tuple[Op, int, int], list[Op]] = {}
        for op in row:
            together.setdefault(home(op), []).append(op)
        for members in together.values():
            yield members[0]._replace(items=tuple(sorted(pair for op in members for pair in op.items)))
