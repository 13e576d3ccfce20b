"""Local search: encoder and generator work that lies on the critical path moves to other times and other ranks, within
the promised memory."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.fit import joined, origins, parts
from ultraep_compile.schedules.holdings import encoder_amount, generator_amount

_SHIFTS = (1, -1, 2, -2, 3, -3, 5, -5, 8, -8, 13, -13)
_RANKS = 3  # that a piece may move to
_GAIN = 1e-9
_DRIFT = 0.01  # weight of the mean end of all operations against the makespan: shows the way over plateaus


def improve(schedule: Schedule, target: float, tries: int = 400) -> Schedule:
    """A schedule no slower than the given one; stops at makespan `target`, after `tries` attempts, or when no
    single move helps. Deterministic."""
    search = _Search(schedule)
    search.run(target, tries)
    return search.best()


class _Search:
    """Operations as numbers that keep their predecessors wherever they are moved."""

    def __init__(self, schedule: Schedule) -> None:
        divided = [[part for op in ops for part in parts(op)] for ops in schedule.ranks]
        graph = Graph(schedule.problem, divided)
        self.origin = origins(op for ops in schedule.ranks for op in ops)
        self.schedule, self.graph, self.problem = schedule, graph, schedule.problem
        self.rank = list(graph.rank)
        self.orders = [list(range(a, b)) for a, b in zip(graph.first, graph.first[1:], strict=False)]
        self.llm = [op.kind in "FBIW" for op in graph.ops]
        self.twin = {i: graph.index[op._replace(kind="EF")] for i, op in enumerate(graph.ops) if op.kind == "EB"}
        self.twin |= {forward: i for i, forward in self.twin.items()}
        self.successors = graph.successors()
        means = [e.mean_forward for e in self.problem.encoders]
        made = [g.mean_cost for g in self.problem.generators]
        self.takes: dict[int, float] = {}  # what an encoder forward holds until its backward
        self.needs: dict[int, float] = {}  # what an operation holds while it runs, only
        for i, op in enumerate(graph.ops):
            if op.kind == "G":
                self.needs[i] = generator_amount(self.problem.generators[op.stage], op, made[op.stage])
            elif op.kind in ("EF", "EB"):
                encoder = self.problem.encoders[op.stage]
                amount = encoder_amount(encoder, op, means[op.stage])
                if encoder.frozen or encoder.recompute:
                    self.needs[i] = amount
                else:
                    self.takes[i] = amount if op.kind == "EF" else -amount
        played = self.play()
        assert played is not None, "the schedule that is given runs"
        self.start, self.end = played
        self.makespan = max(self.end)
        self.score = self._score()
        self.first = self.makespan
        self.found = (self.makespan, [list(row) for row in self.orders])

    def run(self, target: float, tries: int) -> None:
        while self.makespan > target and tries > 0:
            for move in self._moves():
                tries -= 1
                if self._take(move):
                    break
                if tries <= 0:
                    return
            else:
                return
            if self.makespan < self.found[0] * (1 - _GAIN):
                self.found = (self.makespan, [list(row) for row in self.orders])

    def best(self) -> Schedule:
        makespan, orders = self.found
        if makespan >= self.first * (1 - _GAIN):
            return self.schedule
        ops = self.graph.ops
        ranks = tuple(tuple(joined([ops[i] for i in row], self.origin)) for row in orders)
        better = replace(self.schedule, ranks=ranks)
        return better if max(Graph(self.problem, ranks).replay()[1]) < self.first else self.schedule

    def _score(self) -> float:
        return self.makespan + _DRIFT * sum(self.end) / len(self.end)

    def _moves(self) -> Iterator[dict[int, list[int]]]:
        """New orders of one or two ranks, most promising first."""
        path = [i for i in self._path() if not self.llm[i]]
        place = {i: n for row in self.orders for n, i in enumerate(row)}
        starts = [[self.start[i] for i in row] for row in self.orders]
        idle = [self.makespan - sum(self.graph.duration[i] for i in row) for row in self.orders]
        roomy = sorted(range(len(idle)), key=lambda r: (-idle[r], r))
        for i in sorted(path, key=lambda i: -self.graph.duration[i]):
            r = self.rank[i]
            for other in [x for x in roomy if x != r][:_RANKS]:
                yield from self._relocated(i, other, starts)
            for shift in _SHIFTS:
                row = list(self.orders[r])
                to = place[i] + shift
                if 0 <= to < len(row):
                    row.insert(to, row.pop(place[i]))
                    yield {r: row}

    def _relocated(self, i: int, other: int, starts: list[list[float]]) -> Iterator[dict[int, list[int]]]:
        """A forward with its backward (or a generator's work) on another rank: each into the first gap there that holds
        it in its window, else where it would be in time."""
        r = self.rank[i]
        pieces = sorted({i, self.twin.get(i, i)}, key=lambda x: self.graph.ops[x].kind == "EB")
        old = [x for x in self.orders[r] if x not in pieces]
        for late in (False, True):
            new, row = list(self.orders[other]), starts[other]
            added = 0
            for x in pieces:
                new.insert(self._gap(x, other, row, late) + added, x)
                added += 1
            yield {r: old, other: new}

    def _gap(self, x: int, other: int, row: list[float], late: bool) -> int:
        """A position on another rank for an operation: the first (or last) gap in its window that is long enough."""
        hop, cost, end = self.problem.latency, self.graph.duration[x], self.end
        ready = max((end[p] + hop * (self.rank[p] != other) for p in self.graph.preds[x] if self.llm[p]), default=0.0)
        due = min((self.start[s] for s in self.successors[x] if self.llm[s]), default=self.makespan)
        order = self.orders[other]
        low, high = bisect_left(row, ready), bisect_left(row, due)
        places = range(low, high + 1)
        for n in reversed(places) if late else places:
            free = end[order[n - 1]] if n else 0.0
            stop = row[n] if n < len(row) else self.makespan
            if min(stop, due) - max(free, ready) >= cost:
                return n
        return high if late else low

    def _take(self, move: dict[int, list[int]]) -> bool:
        """Try a move, and keep it if it helps."""
        if not all(self._fits(r, row) for r, row in move.items()):
            return False
        before = {r: self.orders[r] for r in move}
        hosts = [(i, self.rank[i]) for row in before.values() for i in row]
        for r, row in move.items():
            self.orders[r] = row
            for i in row:
                self.rank[i] = r
        played = self.play()
        if played is not None:
            old = self.start, self.end, self.makespan, self.score
            self.start, self.end = played
            self.makespan = max(self.end)
            self.score = self._score()
            if self.score < old[3] * (1 - _GAIN) and self.makespan <= old[2] * (1 + _GAIN):
                return True
            self.start, self.end, self.makespan, self.score = old
        for r, row in before.items():
            self.orders[r] = row
        for i, r in hosts:
            self.rank[i] = r
        return False

    def _fits(self, rank: int, row: list[int]) -> bool:
        """Whether a rank stays within its memory, and backwards behind their forwards."""
        caps, ops = self.schedule.caps, self.graph.ops
        held = [0.0] * len(self.problem.encoders)
        ran: set[int] = set()
        for i in row:
            if self.llm[i]:
                continue
            op = ops[i]
            if op.kind == "EB" and self.twin[i] not in ran:
                return False
            ran.add(i)
            limit = caps.generator if op.kind == "G" else caps.encoder
            amount = self.takes.get(i, 0.0)
            if amount:
                held[op.stage] += amount
            now = held[op.stage] if amount else self.needs.get(i, 0.0)
            if limit is not None and amount >= 0 and now > limit + 1e-6:
                return False
        return True

    def play(self) -> tuple[list[float], list[float]] | None:
        """Start and end of each operation, or None if the order cannot run."""
        duration, preds, rank, hop = self.graph.duration, self.graph.preds, self.rank, self.problem.latency
        start, end = [0.0] * len(duration), [-1.0] * len(duration)
        at, free = [0] * len(self.orders), [0.0] * len(self.orders)
        waiting: dict[int, list[int]] = {}
        ready = deque(range(len(at)))
        while ready:
            r = ready.popleft()
            row, n, now = self.orders[r], at[r], free[r]
            stop = len(row)
            while n < stop:
                i = row[n]
                for p in preds[i]:
                    e = end[p]
                    if e < 0:
                        waiting.setdefault(p, []).append(r)
                        break
                    if rank[p] != r:
                        e += hop
                    if e > now:
                        now = e
                else:
                    start[i] = now
                    now = end[i] = now + duration[i]
                    free[r] = now
                    if i in waiting:
                        ready.extend(waiting.pop(i))
                    n += 1
                    continue
                break
            at[r] = n
        return None if waiting else (start, end)

    def _path(self) -> list[int]:
        """One longest path, last operation first."""
        before = {i: row[n - 1] if n else -1 for row in self.orders for n, i in enumerate(row)}
        start, end, rank, hop = self.start, self.end, self.rank, self.problem.latency
        i = end.index(self.makespan)
        path = []
        while i >= 0:
            path.append(i)
            late = [p for p in self.graph.preds[i] if end[p] + (rank[p] != rank[i]) * hop >= start[i]]
            waits = before[i] < 0 or end[before[i]] < start[i]
            i = (late[0] if late else -1) if waits else before[i]
        return path
