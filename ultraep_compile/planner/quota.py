"""The planner `quota`: few copies that bring the largest load within 1% of the mean, or as low as it goes.

Copies cost memory traffic, tokens that leave their rank cost network traffic: of the plans found at a
threshold, the one is taken in which every copy is worth mean/40 tokens that stay at home.

With `copy_tokens` the aim is time: of all thresholds of the ladder the one is taken at which the fullest rank's tokens
and what its copies cost are least in sum; often that is fewer copies, and none where they would not pay.

Where the good enough threshold is out of reach, a ladder of 32 thresholds leads up to the unbalanced maximum,
and 32 more divide the step below the lowest that is reached. All of them are known beforehand, so that a GPU
tries them side by side (`codegen/planner_kernels`, which makes the same plans); here they are tried in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from numpy.typing import NDArray

from ultraep_compile.planner.placement import Placement, place
from ultraep_compile.planner.registry import register
from ultraep_compile.planner.search import Found, Method, Problem, find_copies

TOLERANCE = 100  # basis points: a largest load within 1% of the mean is good enough
COPY_WORTH = 40  # one copy more must keep mean/40 tokens at home
LADDER = 32  # thresholds of the ladder, and of the refinement

FEW_COPIES = (
    Method(near=20, near_full=100),
    Method(near=50, near_full=200),
    Method(order="largest"),
    Method(order="largest", near=200, near_full=500),
)
LOW_LOAD = (
    Method(order="hottest", always_fill=True),
    Method(order="hottest", always_fill=True, best_fit=False),
)


@register("quota")
def plan_quota(
    counts_RE: NDArray, slots: int | NDArray, tolerance: int = TOLERANCE, copy_tokens: int | None = None
) -> Placement:
    """Search at the good enough threshold, then at higher ones until some method finds copies.

    copy_tokens: tokens that a rank computes while one copy travels; the plan is then the fastest, not the most even.
    """
    problem = Problem(counts_RE, slots)
    good_enough = max(problem.mean, problem.total * (10000 + tolerance) // (10000 * problem.ranks))
    found = None
    if problem.worst > good_enough and any(problem.slots):
        if copy_tokens is None:
            found = _cheapest(problem, good_enough, FEW_COPIES) or _lowest(problem, good_enough)
        else:
            found = _fastest(problem, good_enough, copy_tokens)
    return place(problem.loads_RM, max(problem.slots), problem.copies(found) if found else None)


def ladder(good_enough: int, mean: int, worst: int) -> list[int]:
    """Thresholds from `good_enough` up; each is about a quarter further from the mean than the one before."""
    excess = max(good_enough - mean, 1 + (mean >> 8))
    taus = [good_enough]
    for _ in range(LADDER - 2):
        taus.append(min(mean + excess, worst))
        excess += 1 + (excess >> 2)
    return [*taus, worst]


def refinement(below: int, reached: int) -> list[int]:
    """Thresholds that divide the step from `below` to `reached`, neither of them included."""
    return [below + (reached - below) * (k + 1) // (LADDER + 1) for k in range(LADDER)]


def _lowest(problem: Problem, good_enough: int) -> Found | None:
    taus = ladder(good_enough, problem.mean, problem.worst)
    reached, found = _first(problem, taus)
    if reached == 0:
        return found
    return _first(problem, refinement(taus[reached - 1], taus[reached]))[1] or found


def _first(problem: Problem, taus: Iterable[int]) -> tuple[int, Found | None]:
    """The place of the first threshold that any method reaches, and the cheapest plan there."""
    at = 0
    for at, tau in enumerate(taus):
        if found := _cheapest(problem, tau, LOW_LOAD):
            return at, found
    return at, None


def _fastest(problem: Problem, good_enough: int, copy_tokens: int) -> Found | None:
    """The plan with the least time, in tokens; the first of equals."""
    taus = ladder(good_enough, problem.mean, problem.worst)
    best, least = None, 1 << 62
    for tau, methods in [(good_enough, FEW_COPIES), *((tau, LOW_LOAD) for tau in taus)]:
        if tau > least:
            break
        for method in methods:
            one = find_copies(problem, tau, method)
            if one is not None and (time := tau + copy_tokens * _most_moved(one)) < least:
                best, least = one, time
    return best


def _most_moved(found: Found) -> int:
    """The most copies that one rank sends or receives: ranks move theirs side by side."""
    ends = [Counter(export[end] for export in found.exports) for end in (0, 2)]
    return max((number for counter in ends for number in counter.values()), default=0)


def _cheapest(problem: Problem, tau: int, methods: tuple[Method, ...]) -> Found | None:
    """Of what the methods find, the best trade of copies for local tokens; the first of equals."""
    shift = max(problem.total.bit_length() - 31, 0)  # the kernel's keys have 42 bits for this
    found = [one for method in methods if (one := find_copies(problem, tau, method)) is not None]
    return min(
        found,
        key=lambda one: (problem.mean >> shift) * len(one.exports) - COPY_WORTH * (one.local >> shift),
        default=None,
    )
