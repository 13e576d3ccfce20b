"""The best schedule of a tiny problem, by looking at all of them: the oracle for builders and bounds."""

from __future__ import annotations

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.problem import Caps, Problem

_LARGEST = 26  # operations
_EPS = 1e-9


def exhaustive(
    problem: Problem, caps: Caps, best: float = float("inf"), hosts: tuple[int, ...] = ()
) -> Schedule | None:
    """The fastest schedule within `caps` and below makespan `best`, or None if there is none.

    Encoder and generator work is whole, microbatch j's on rank hosts[j] (default j mod P); backwards are
    whole; microbatches pass every stage in order of number. Search: operations are appended in the order of
    their starts, each as early as its rank, inputs and memory allow; branches that cannot beat the best one
    found are cut."""
    p, m = problem.ranks, problem.microbatches
    hosts = hosts or tuple(j % p for j in range(m))
    ranks: list[list[Op]] = [[] for _ in range(p)]
    for j in range(m):
        for s, r in enumerate(problem.stage_rank):
            ranks[r] += (Op("F", s, j), Op("B", s, j))
        for e, encoder in enumerate(problem.encoders):
            if encoder.forward[j] > 0:
                ranks[hosts[j]].append(Op("EF", e, j))
                if not encoder.frozen:
                    ranks[hosts[j]].append(Op("EB", e, j))
        for g, generator in enumerate(problem.generators):
            if generator.cost[j] > 0:
                ranks[p - 1 - hosts[j]].append(Op("G", g, j))
    if sum(map(len, ranks)) > _LARGEST:
        raise ScheduleError(
            f"Exhaustive search ends at {_LARGEST} operations. Use fewer ranks or microbatches."
        )
    found = _Search(problem, Graph(problem, ranks), caps, best)
    found.extend(0.0, -1)
    if found.order is None:
        return None
    orders: list[list[Op]] = [[] for _ in range(p)]
    for i in found.order:
        orders[found.graph.rank[i]].append(found.graph.ops[i])
    return Schedule(problem, tuple(map(tuple, orders)), "exhaustive", caps)


class _Search:
    """Depth-first branch and bound over operations in order of start."""

    def __init__(self, problem: Problem, graph: Graph, caps: Caps, best: float) -> None:
        self.problem, self.graph, self.caps, self.best = problem, graph, caps, best
        self.order: tuple[int, ...] | None = None
        self.taken: list[int] = []
        self.freed: list[float] = []  # when the rank of each taken operation was free before it
        self.end: dict[int, float] = {}
        self.free = [0.0] * problem.ranks
        self.work = [0.0] * problem.ranks
        for i, r in enumerate(graph.rank):
            self.work[r] += graph.duration[i]
        self.tail = self._tails()
        self.held = [{"EF": 0.0, "F": 0.0} for _ in self.free]
        self.seen: dict[frozenset[int], list[tuple[float, ...]]] = {}

    def _tails(self) -> list[float]:
        """For each operation the least time from its start to the end of everything that depends on it."""
        successors = self.graph.successors()
        tails = [0.0] * len(successors)
        for _ in successors:
            for i, after in enumerate(successors):
                tails[i] = self.graph.duration[i] + max((tails[k] for k in after), default=0.0)
        return tails

    def extend(self, now: float, last: int) -> None:
        graph = self.graph
        if len(self.taken) == len(graph.ops):
            makespan = max(self.end.values())
            if makespan < self.best - _EPS:
                self.best, self.order = makespan, tuple(self.taken)
            return
        if (
            any(f + w >= self.best - _EPS for f, w in zip(self.free, self.work, strict=True))
            or self._dominated()
        ):
            return
        for start, i in sorted(self._choices()):
            if (start, i) < (now, last) and start < now - _EPS:
                continue
            if start + self.tail[i] >= self.best - _EPS:
                continue
            self._take(i, start)
            self.extend(max(now, start), i)
            self._undo(i)

    def _choices(self) -> list[tuple[float, int]]:
        graph, out = self.graph, []
        for i, op in enumerate(graph.ops):
            if i in self.end or not all(p in self.end for p in graph.preds[i]):
                continue
            if op.microbatch and op.kind in ("F", "B"):  # in order of number
                before = graph.index[op.kind, op.stage, op.microbatch - 1, ()]
                if before not in self.end:
                    continue
            r = graph.rank[i]
            if (
                op.kind == "EF"
                and self.caps.encoder is not None
                and self.held[r]["EF"] + 1 > self.caps.encoder
            ):
                continue
            llm = self.caps.llm[r] if self.caps.llm else float("inf")
            if op.kind == "F" and self.held[r]["F"] + self.problem.stage_share[op.stage] > llm + _EPS:
                continue
            latency = self.problem.latency
            ready = max((self.end[p] + latency * (graph.rank[p] != r) for p in graph.preds[i]), default=0.0)
            out.append((max(ready, self.free[r]), i))
        return out

    def _take(self, i: int, start: float) -> None:
        r, cost = self.graph.rank[i], self.graph.duration[i]
        self.taken.append(i)
        self.end[i] = start + cost
        self.freed.append(self.free[r])
        self.free[r] = start + cost
        self.work[r] -= cost
        self._hold(i, 1)

    def _undo(self, i: int) -> None:
        r = self.graph.rank[i]
        self._hold(i, -1)
        self.work[r] += self.graph.duration[i]
        self.free[r] = self.freed.pop()
        del self.end[self.taken.pop()]

    def _hold(self, i: int, sign: int) -> None:
        op, held = self.graph.ops[i], self.held[self.graph.rank[i]]
        if op.kind in ("EF", "EB"):
            frozen = self.problem.encoders[op.stage].frozen
            held["EF"] += 0 if frozen else sign if op.kind == "EF" else -sign
        elif op.kind in ("F", "B"):
            held["F"] += self.problem.stage_share[op.stage] * (sign if op.kind == "F" else -sign)

    def _dominated(self) -> bool:
        """Whether the same operations were done before with every rank free, and every output there, no
        later."""
        key = frozenset(self.end)
        state = (*self.free, *(self.end[i] for i in sorted(key) if self.graph.ops[i].kind != "EB"))
        known = self.seen.setdefault(key, [])
        if any(all(a <= b + _EPS for a, b in zip(old, state, strict=True)) for old in known):
            return True
        known.append(state)
        return False
