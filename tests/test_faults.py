"""Faults of every kind over every way to exchange: see `benchmarks.faults`, which draws many more of them."""

from __future__ import annotations

import pytest

from benchmarks.faults import Fault, Group, run

_GROUPS = [
    Group("collective", 2, [Fault(1, "backward", "hook"), Fault(0, "between", "alone"), Fault(1, "optimizer", "kill")]),
    Group("symmetric", 3, [Fault(2, "optimizer", "memory"), Fault(1, "forward", "hook"), Fault(1, "backward", "kill")]),
    Group("pipeline", 2, [Fault(0, "save", "ctrl-c"), Fault(1, "between", "loader"), Fault(0, "forward", "stop")]),
]


@pytest.mark.parametrize("group", _GROUPS, ids=lambda group: group.job)
def test_survivors_end_in_time_and_name_the_rank(group: Group) -> None:
    _check(group)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["collective", "symmetric", "pipeline"])
def test_a_hundred_failures_leave_nothing_behind(job: str) -> None:
    moments = ("forward", "backward", "optimizer", "save")
    faults = [Fault(n % 2, moments[n % 4], "hook") for n in range(100)]
    _check(Group(job, 2, [*faults, Fault(0, "between", "exit")]), limit_s=1200.0)


def _check(group: Group, limit_s: float = 240.0) -> None:
    outcome = run(group, limit_s)
    assert not outcome.hung
    assert not [(fault, wrong) for fault, wrong in outcome.ended if wrong]
    assert outcome.grown[:2] == [0, 0], "descriptors, threads"
