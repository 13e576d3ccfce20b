"""Who must wait for whom: the dependency graph of a schedule, as plain lists for speed.

Data edges of microbatch j (-> may cross ranks):
  EF(j) -> F(s, j)                for every stage s that the encoder feeds
  F(s, j) -> F(s+1, j)
  F(S-1, j) -> G(j) -> B(S-1, j)  or F(S-1, j) -> B(S-1, j) without a generator
  B(s+1, j) -> B(s, j)            where a split backward hands on its input part: I(s+1, j)
  I(s, j) -> W(s, j)
  B(s, j) -> EB(j)                for every stage s that the encoder feeds
Each rank runs its operations in the order of its list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.problem import Problem


class Graph:
    """Operations numbered rank after rank in list order, with their costs and predecessors."""

    __slots__ = ("_successors", "duration", "first", "index", "ops", "preds", "problem", "rank")

    def __init__(self, problem: Problem, ranks: Sequence[Sequence[Op]]) -> None:
        self.problem = problem
        self.ops: list[Op] = [op for ops in ranks for op in ops]
        self.rank = [r for r, ops in enumerate(ranks) for _ in ops]
        self.first = [0]  # the operations of rank r are first[r] .. first[r+1]-1
        for ops in ranks:
            self.first.append(self.first[-1] + len(ops))
        self.index: dict[tuple, int] = {op: i for i, op in enumerate(self.ops)}
        self.duration = durations(problem, self.ops)
        self.preds = self._predecessors()
        self._successors: list[list[int]] = []  # made when first asked for

    def with_costs(self, problem: Problem) -> Graph:
        """The graph of the same operations at the costs of another problem."""
        other = copy(self)
        other.problem, other.duration = problem, durations(problem, self.ops)
        return other

    def _predecessors(self) -> list[list[int]]:
        """For each operation the numbers of those whose output it needs."""
        problem, index = self.problem, self.index
        last = problem.stages - 1
        encoded = _holders(self.ops, "EF")
        generated = _holders(self.ops, "G")
        fed: list[list[int]] = [[] for _ in range(problem.stages)]
        for e, encoder in enumerate(problem.encoders):
            for s in encoder.feeds:
                fed[s].append(e)
        preds: list[list[int]] = []
        append = preds.append
        try:
            for kind, s, j, items in self.ops:
                if kind == "F":
                    need = [index["F", s - 1, j, ()]] if s else []
                    for e in fed[s]:
                        need += encoded.get((e, j), ())
                elif kind == "B" or kind == "I":
                    if s < last:
                        need = [self.backward(s + 1, j)]
                    else:
                        need = [i for g in range(len(problem.generators)) for i in generated.get((g, j), ())]
                        need = need or [index["F", s, j, ()]]
                elif kind == "W":
                    need = [index["I", s, j, ()]]
                elif kind == "G":
                    need = [index["F", last, k, ()] for k in _microbatches(j, items)]
                elif kind == "EB":
                    need = [index["EF", s, j, items]]
                    for k in _microbatches(j, items):
                        need += [self.backward(stage, k) for stage in problem.encoders[s].feeds]
                else:
                    need = []
                append(need)
        except KeyError as error:
            missing = Op(*error.args[0])
            raise ScheduleError(f"{self.ops[len(preds)]} needs {missing}, which no rank runs.") from None
        return preds

    def backward(self, stage: int, microbatch: int) -> int:
        """The operation that gives a stage's input gradient: its whole backward or the input part."""
        i = self.index.get(("B", stage, microbatch, ()))
        return self.index["I", stage, microbatch, ()] if i is None else i

    def successors(self) -> list[list[int]]:
        """For each operation those that need its output (list order not included)."""
        if not self._successors:
            self._successors = [[] for _ in self.ops]
            for i, need in enumerate(self.preds):
                for p in need:
                    self._successors[p].append(i)
        return self._successors

    def replay(self, duration: Sequence[float] | None = None) -> tuple[list[float], list[float]]:
        """Start and end of each operation when every rank starts its next one as soon as its inputs are
        there."""
        duration = self.duration if duration is None else duration
        start, end = [0.0] * len(self.ops), [-1.0] * len(self.ops)
        rank, preds, latency = self.rank, self.preds, self.problem.latency
        at = self.first[:-1]
        free = [0.0] * len(at)
        waiting: dict[int, list[int]] = {}  # operation -> ranks whose next operation needs it
        ready = deque(range(len(at)))
        while ready:
            r = ready.popleft()
            i, stop, now = at[r], self.first[r + 1], free[r]
            while i < stop:
                for p in preds[i]:
                    e = end[p]
                    if e < 0:
                        waiting.setdefault(p, []).append(r)
                        break
                    if rank[p] != r:
                        e += latency
                    if e > now:
                        now = e
                else:
                    start[i] = now
                    now = end[i] = now + duration[i]
                    free[r] = now
                    if i in waiting:
                        ready.extend(waiting.pop(i))
                    i += 1
                    continue
                break
            at[r] = i
        if waiting:
            stuck = [f"rank {r} at {self.ops[at[r]]}" for r in range(len(at)) if at[r] < self.first[r + 1]]
            raise ScheduleError(
                f"Deadlock: {', '.join(stuck)}. Each waits for an operation that comes later."
            )
        return start, end

    def linear_order(self) -> list[int]:
        """For each operation its turn in one order that respects all edges, list order included."""
        turn, count = [-1] * len(self.ops), 0
        at = self.first[:-1]
        ready = deque(range(len(at)))
        waiting: dict[int, list[int]] = {}
        while ready:
            r = ready.popleft()
            while at[r] < self.first[r + 1]:
                i = at[r]
                missing = next((p for p in self.preds[i] if turn[p] < 0), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(r)
                    break
                turn[i] = count
                count += 1
                at[r] += 1
                ready.extend(waiting.pop(i, ()))
        return turn


def durations(problem: Problem, ops: Sequence[Op]) -> list[float]:
    """The cost of each operation."""
    forward, backward, share = problem.llm_forward, problem.llm_backward, problem.stage_share
    part = {"B": 1.0, "I": problem.input_share, "W": 1.0 - problem.input_share}
    encoders, generators = problem.encoders, problem.generators
    out = []
    for kind, s, j, items in ops:
        if kind == "F":
            out.append(share[s] * forward[j])
        elif kind in part:
            out.append(share[s] * backward[j] * part[kind])
        else:
            if kind == "G":
                cost, shares = generators[s].cost, generators[s].items
            else:
                cost = encoders[s].forward if kind == "EF" else encoders[s].backward
                shares = encoders[s].items
            if items:
                out.append(sum(cost[k] * shares[k][i] for k, i in items))
            else:
                out.append(cost[j])
    return out


def _holders(ops: Sequence[Op], kind: str) -> dict[tuple[int, int], list[int]]:
    """(encoder or generator, microbatch) -> the operations of that kind that work on it."""
    holders: dict[tuple[int, int], list[int]] = {}
    for i, op in enumerate(ops):
        if op[0] == kind:
            for j in op.microbatches:
                holders.setdefault((op[1], j), []).append(i)
    return holders


def _microbatches(j: int, items: tuple[tuple[int, int], ...]) -> Iterable[int]:
    return dict.fromkeys(k for k, _ in items) if items else (j,)
