"""The search for copies: which expert goes where, with how many tokens, so that no rank exceeds tau.

Ranks above the threshold `tau` export their hottest experts to ranks below it. Two rules make few slots go
far: a copy goes to a rank that it fills well (the smallest slack that takes all of it, else the largest
slack), and when it takes the last slot of its target it fills the target up, even beyond what its source
must shed. The source is then below `tau` itself, and a later copy fills it: an overloaded rank may import.
Without that, three ranks with loads 10, 7, 1 and one slot each end at 7 instead of 6.

Of targets that fit about equally well, the one with the most tokens of its own for the expert is taken: they
need not travel. Equals are told apart by the lower number, so that every rank, and the kernel of
`codegen/planner_kernels`, finds the same copies.

Only the loop over copies is sequential. At 64 ranks a step costs 3 us in plain integers, and 80 us in numpy
calls over a batch of thresholds and methods: candidates are therefore run one by one, and few of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heapreplace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.planner.placement import Copies

Order = Literal["smallest", "largest", "hottest"]


class Method(NamedTuple):
    """A variant of the search. `near` and `near_full` give up some fit for tokens that need not travel."""

    order: Order = "smallest"  # which rank above tau exports next: least or most load, or the hottest expert left
    near: int = 0  # targets whose slack is this close to the best fit (1/1024 of tau) compete by local demand
    near_full: int = 0  # the same when no target takes the whole copy (1/1024 of the largest slack)
    best_fit: bool = True  # else every copy goes to a rank with the largest slack
    always_fill: bool = False  # every copy fills its target up, not only one that takes the last slot


class Found(NamedTuple):
    """A successful search."""

    exports: list[tuple[int, int, int, int]]  # (source rank, its expert's local index, target rank, tokens)
    local: int  # tokens that stay on their rank because of the copies, less those that leave because of them


class Problem:
    """Loads in the form that the search reads: plain integers."""

    def __init__(self, counts_RE: NDArray, slots: int | NDArray) -> None:
        ranks, experts = counts_RE.shape
        self.ranks, self.masters = ranks, experts // ranks
        self.slots: list[int] = np.broadcast_to(slots, ranks).tolist()
        self.loads_RM = counts_RE.sum(0).reshape(ranks, self.masters)
        self.experts = self.loads_RM.tolist()
        self.loads = [sum(row) for row in self.experts]
        self.total, self.worst = sum(self.loads), max(self.loads)
        self.mean = -(-self.total // ranks)  # rounded up: no plan does better
        self._counts_ER = counts_RE.T
        self._demand: dict[int, list[int]] = {}

    def demand(self, rank: int, local: int) -> list[int]:
        """Tokens of every source rank for the expert at home at `rank`."""
        expert = rank * self.masters + local
        if expert not in self._demand:
            self._demand[expert] = self._counts_ER[expert].tolist()
        return self._demand[expert]

    def copies(self, found: Found) -> Copies:
        """The exports as arrays."""
        flat = [(source * self.masters + local, target, tokens) for source, local, target, tokens in found.exports]
        return Copies.of(*np.array(flat, np.int64).reshape(-1, 3).T)


def find_copies(problem: Problem, tau: int, method: Method) -> Found | None:
    """Copies after which no rank holds more than `tau` tokens, or None when this method finds none.

    An expert reaches a target at most once without a check: a copy that neither fills its target nor
    satisfies its source takes all that is left of the expert.
    """
    ranks, near, free = problem.ranks, tau * method.near >> 10, problem.slots[:]
    load = problem.loads[:]
    left = {r: problem.experts[r][:] for r in range(ranks) if load[r] > tau}

    def turn(rank: int) -> int:
        """The rank above tau with the lowest number is the next to export."""
        if method.order == "hottest":
            return -max(left[rank])
        return load[rank] if method.order == "smallest" else -load[rank]

    above = [(turn(r), r) for r in left]
    heapify(above)
    # slack * ranks + rank, an integer for each rank below tau that has a slot
    below = sorted((tau - load[r]) * ranks + r for r in range(ranks) if load[r] < tau and free[r])
    exports: list[tuple[int, int, int, int]] = []
    local = 0
    while above:
        if not below:
            return None
        source = above[0][1]
        need, remaining = load[source] - tau, left[source]
        available = max(remaining)
        expert = remaining.index(available)
        want = min(need, available)
        demand = problem.demand(source, expert)

        slack, target = divmod(below.pop(_choose(below, want, ranks, demand, near, method)), ranks)
        tokens = min(want, slack)
        if (method.always_fill or free[target] == 1) and free[source]:  # what comes below tau must be able to import
            tokens = min(available, slack)
        exports.append((source, expert, target, tokens))
        local += min(tokens, demand[target])
        remaining[expert] -= tokens
        load[source] -= tokens
        free[target] -= 1
        if tokens < slack and free[target]:
            insort(below, (slack - tokens) * ranks + target)
        if tokens < need:
            heapreplace(above, (turn(source), source))
        else:
            heappop(above)
            if tokens > need:
                insort(below, (tokens - need) * ranks + source)
    for source, expert in {export[:2] for export in exports}:
        local -= max(problem.demand(source, expert)[source] - left[source][expert], 0)
    return Found(exports, local)


def _choose(below: list[int], want: int, ranks: int, demand: list[int], near: int, method: Method) -> int:
    """Where in `below` the target for `want` tokens is."""
    first, end = bisect_left(below, want * ranks), len(below)
    if method.best_fit and first < end:
        end = bisect_left(below, (below[first] // ranks + near + 1) * ranks, first)
    else:
        largest = below[-1] // ranks
        first = bisect_left(below, (largest - (largest * method.near_full >> 10)) * ranks)
    if end - first == 1:
        return first
    return max(range(first, end), key=lambda at: (demand[below[at] % ranks], -(below[at] % ranks)))
