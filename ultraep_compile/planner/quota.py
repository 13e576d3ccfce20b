"""The planner `quota`: few copies that bring the largest load within 1% of the mean, or as low as it goes.

Copies cost memory traffic, tokens that leave their rank cost network traffic: of the plans found at a
threshold, the one is taken in which every copy is worth mean/40 tokens that stay at home.
"""

from __future__ import annotations

from numpy.typing import NDArray

from ultraep_compile.planner.bounds import smallest_max_load
from ultraep_compile.planner.local import keep_local
from ultraep_compile.planner.placement import Placement, place
from ultraep_compile.planner.registry import register
from ultraep_compile.planner.search import Found, Method, Problem, find_copies

TOLERANCE = 100  # a largest load within mean/100 of the mean is good enough
COPY_WORTH = 40  # one copy more must keep mean/40 tokens at home

FEW_COPIES = (
    Method(near=20, near_full=100),
    Method(near=50, near_full=200),
    Method(largest_first=True, near=50, near_full=200),
)
LOW_LOAD = tuple(
    Method(largest_first=largest_first, best_fit=best_fit, always_fill=True)
    for largest_first in (True, False)
    for best_fit in (True, False)
)


@register("quota")
def plan_quota(counts_RE: NDArray, slots: int) -> Placement:
    """Search at the lowest threshold worth reaching, then at higher ones until some method finds copies."""
    problem = Problem(counts_RE, slots)
    good_enough = max(problem.mean, problem.total * (TOLERANCE + 1) // (TOLERANCE * problem.ranks))
    if problem.worst <= good_enough or slots == 0:
        return place(problem.loads_RM, slots, None)
    tau = good_enough
    found = _cheapest(problem, tau, FEW_COPIES)
    if found is None:
        tau = _lowest_threshold(problem, good_enough)
        found = _cheapest(problem, tau, FEW_COPIES + LOW_LOAD)
        assert found is not None
    return keep_local(counts_RE, place(problem.loads_RM, slots, problem.copies(found)), tau)


def _lowest_threshold(problem: Problem, good_enough: int) -> int:
    """The lowest threshold that a method reaches: doubling steps up from the bound, then bisection."""

    def reached(tau: int) -> bool:
        return any(find_copies(problem, tau, method) is not None for method in LOW_LOAD)

    tau = max(good_enough, smallest_max_load(problem.loads_RM, problem.slots))
    if reached(tau):
        return tau
    failed, step, fine = tau, max(1, problem.mean // 128), max(1, problem.mean // 512)
    while not reached(tau := min(failed + step, problem.worst)):  # the unbalanced maximum is always reached
        failed, step = tau, 2 * step
    while tau - failed > fine:
        middle = (tau + failed) // 2
        if reached(middle):
            tau = middle
        else:
            failed = middle
    return tau


def _cheapest(problem: Problem, tau: int, methods: tuple[Method, ...]) -> Found | None:
    """Of what the methods find, the best trade of copies for local tokens; the first of equals."""
    found = [one for method in methods if (one := find_copies(problem, tau, method)) is not None]
    return min(found, key=lambda one: problem.mean * len(one.exports) - COPY_WORTH * one.local, default=None)
