"""The search for copies: which expert goes where, with how many tokens, so that no rank exceeds tau.

Ranks above the threshold `tau` export their hottest experts to ranks below it. Two rules make few slots go
far: a copy goes to the rank that it fills best (the smallest slack that takes all of it, else the largest
slack), and when it takes the last slot of its target it fills the target up, even beyond what its source
must shed. The source is then below `tau` itself, and a later copy fills it: an overloaded rank may import.
Without that, three ranks with loads 10, 7, 1 and one slot each end at 7 instead of 6.

Only the loop over copies is sequential. At 64 ranks a step costs 3 us in plain integers, and 80 us in numpy
calls over a batch of 20 thresholds and methods: candidates are therefore run one by one, and few of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.planner.placement import Copies


class Method(NamedTuple):
    """A variant of the search. `near` and `near_full` give up some fit for tokens that need not travel."""

    largest_first: bool = False  # the most overloaded rank exports next, else the least overloaded one
    near: int = 0  # targets whose slack is this close to the best fit (1/1000 of tau) compete by local demand
    near_full: int = 0  # the same when no target takes the whole copy (1/1000 of the largest slack)
    best_fit: bool = True  # else every copy goes to the rank with the largest slack
    always_fill: bool = False  # every copy fills its target up, not only one that takes the last slot


class Found(NamedTuple):
    """A successful search."""

    exports: list[tuple[int, int, int, int]]  # (source rank, place of the expert there, target rank, tokens)
    local: int  # tokens that stay on their rank because of the copies, less those that leave because of them


class Problem:
    """Loads in the form that the search reads: plain integers, the experts of a rank hottest first."""

    def __init__(self, counts_RE: NDArray, slots: int) -> None:
        ranks, experts = counts_RE.shape
        self.ranks, self.masters, self.slots = ranks, experts // ranks, slots
        self.loads_RM = counts_RE.sum(0).reshape(ranks, self.masters)
        expert_RM = np.argsort(-self.loads_RM, 1, kind="stable")
        self.hottest = np.take_along_axis(self.loads_RM, expert_RM, 1).tolist()
        expert_RM += np.arange(0, experts, self.masters)[:, None]
        self.expert = expert_RM.tolist()  # [rank][place] -> logical expert
        self.loads = [sum(row) for row in self.hottest]
        self.total, self.worst = sum(self.loads), max(self.loads)
        self.mean = -(-self.total // ranks)  # rounded up: no plan does better
        self._counts_ER = counts_RE.T
        self._demand: dict[int, list[int]] = {}

    def demand(self, rank: int, place: int) -> list[int]:
        """Tokens of every source rank for the `place`-th hottest expert of `rank`."""
        expert = self.expert[rank][place]
        if expert not in self._demand:
            self._demand[expert] = self._counts_ER[expert].tolist()
        return self._demand[expert]

    def copies(self, found: Found) -> Copies:
        """The exports as arrays."""
        flat = [
            (self.expert[source][place], target, tokens) for source, place, target, tokens in found.exports
        ]
        return Copies.of(*np.array(flat, np.int64).reshape(-1, 3).T)


def find_copies(problem: Problem, tau: int, method: Method) -> Found | None:
    """Copies after which no rank holds more than `tau` tokens, or None when this method finds none.

    An expert reaches a target at most once without a check: a copy that neither fills its target nor
    satisfies its source takes all that is left of the expert.
    """
    ranks, sign = problem.ranks, -1 if method.largest_first else 1
    near = tau * method.near // 1000
    # slack * ranks + rank, an integer for each rank below tau
    below = [(tau - load) * ranks + r for r, load in enumerate(problem.loads) if load < tau]
    below = sorted(below) if problem.slots else []
    above = [(sign * load, r) for r, load in enumerate(problem.loads) if load > tau]
    heapify(above)
    free = [problem.slots] * ranks
    left: dict[int, list[int]] = {}
    exports: list[tuple[int, int, int, int]] = []
    local = 0
    while above:
        if not below:
            return None
        key, source = above[0]
        need = sign * key - tau
        if source not in left:
            left[source] = problem.hottest[source][:]
        available = max(left[source])
        place = left[source].index(available)
        want = min(need, available)
        demand = problem.demand(source, place)

        at = _choose(below, want, ranks, demand, near, method)
        slack, target = divmod(below.pop(at), ranks)
        tokens = min(want, slack)
        if method.always_fill or free[target] == 1:  # the source itself has free slots: it never imported
            tokens = min(available, slack)
        exports.append((source, place, target, tokens))
        local += min(tokens, demand[target])
        left[source][place] -= tokens
        free[target] -= 1
        if tokens < slack and free[target]:
            insort(below, (slack - tokens) * ranks + target)
        if tokens < need:
            heapreplace(above, (sign * (tau + need - tokens), source))
        else:
            heappop(above)
            if tokens > need:
                insort(below, (tokens - need) * ranks + source)
    for source, place in {export[:2] for export in exports}:
        local -= max(problem.demand(source, place)[source] - left[source][place], 0)
    return Found(exports, local)


def _choose(below: list[int], want: int, ranks: int, demand: list[int], near: int, method: Method) -> int:
    """Where in `below` the target for `want` tokens is; of ranks that fit about equally well, the most
    local."""
    tight = bisect_left(below, want * ranks)
    if method.best_fit and tight < len(below):
        end = bisect_left(below, (below[tight] // ranks + near + 1) * ranks, tight) if near else tight + 1
        rivals = below[tight:end]  # the tightest of equals
        step, at = 1, tight
    else:
        at, step = len(below) - 1, -1
        slack = below[at] // ranks
        first = (
            bisect_left(below, (slack - slack * method.near_full // 1000) * ranks) if method.near_full else at
        )
        rivals = below[first:][::-1]  # the emptiest of equals
    if len(rivals) == 1:
        return at
    local = [demand[key % ranks] for key in rivals]
    return at + step * local.index(max(local))
