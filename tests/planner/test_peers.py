"""Planners of other systems: what they do on small cases, and what history costs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import problems, skewed, spread
from ultraep_compile.config import Options
from ultraep_compile.errors import LoadsError, OptionError
from ultraep_compile.planner import (
    PLANNERS,
    imbalance,
    loads_after,
    loads_before,
    make_plan,
    quotas,
    replica_count,
    validate_plan,
)
from ultraep_compile.planner.ideal import forced_counts
from ultraep_compile.planner.registry import uses_history
from ultraep_compile.planner.stale import divide_in_proportion, reuse_plan


def test_eplb_copies_the_expert_with_the_highest_load_per_instance():
    # loads 12, 3, 1, 1, one slot a rank: expert 0 gets copies at 12, 6 and 4 a head; it is everywhere then
    counts_RE = spread([12, 3, 1, 1], 4)
    plan = make_plan(counts_RE, 1, "eplb")
    assert plan.slot_expert_RS[1:].tolist() == [[0], [0], [0]]
    assert loads_after(plan).tolist() == [5, 4, 4, 4]
    # the next copy, of expert 1, went to the emptiest rank with a slot
    assert plan.slot_expert_RS[0].tolist() == [1]


def test_eplb_gives_odd_tokens_to_the_lowest_ranks():
    plan = make_plan(spread([7, 0], 2), 1, "eplb")
    assert quotas(plan).tolist() == [4, 0, 0, 3]


def test_lplb_divides_as_well_as_its_copies_allow():
    # loads 9, 5, 1 on three ranks: EPLB leaves some rank fuller than the linear program does
    counts_RE = spread([9, 5, 1], 3)
    even, by_lp = (make_plan(counts_RE, 1, name) for name in ("eplb", "lplb"))
    assert torch.equal(even.slot_expert_RS, by_lp.slot_expert_RS)
    assert int(loads_after(by_lp).max()) == 5 < int(loads_after(even).max())


@settings(max_examples=100, deadline=None)
@given(problems())
def test_lplb_is_never_above_eplb_nor_above_none(problem):
    counts_RE, slots = problem
    worst = {name: int(loads_after(make_plan(counts_RE, slots, name)).max()) for name in ("eplb", "lplb", "none")}
    tolerance = worst["none"] // 10**8  # of the solver; no token below 10^8
    assert worst["lplb"] <= min(worst["eplb"], worst["none"]) + tolerance


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(sorted(PLANNERS)), st.randoms(use_true_random=False))
def test_a_reused_plan_serves_other_counts_exactly(problem, planner, random):
    history_RE, slots = problem
    order = list(range(history_RE.shape[1]))
    random.shuffle(order)
    counts_RE = history_RE[:, order]
    earlier = make_plan(history_RE, slots, planner)
    plan = reuse_plan(earlier, counts_RE, planner)
    validate_plan(counts_RE, plan, never_worse=False)
    assert torch.equal(plan.slot_expert_RS, earlier.slot_expert_RS)


@pytest.mark.parametrize("planner", sorted(PLANNERS))
def test_the_same_counts_give_the_same_plan(planner):
    counts_RE = skewed(8, 4, 3000, 4.0, seed=5)
    plan = make_plan(counts_RE, 2, planner)
    same = reuse_plan(plan, counts_RE, planner)
    assert all(torch.equal(a, b) for a, b in zip(plan, same, strict=True))


def test_proportions():
    slot_expert_RS = np.array([[-1], [0]])
    counts_RE = np.array([[7, 0], [0, 4]])
    assert divide_in_proportion(counts_RE, slot_expert_RS, np.array([3, 0, 9, 1])).tolist() == [5, 0, 4, 2]
    assert divide_in_proportion(counts_RE, slot_expert_RS, np.array([0, 0, 9, 0])).tolist() == [7, 0, 4, 0]
    huge = np.array([[2**40, 0], [0, 0]])
    assert divide_in_proportion(huge, slot_expert_RS, np.array([2**40, 0, 0, 2**40])).tolist() == [2**39, 0, 0, 2**39]


def test_history_costs_balance_when_the_load_moves():
    before, now = skewed(16, 4, 2000, 6.0, seed=1), skewed(16, 4, 2000, 6.0, seed=2)
    exact = imbalance(loads_after(make_plan(now, 2)))
    stale = imbalance(loads_after(reuse_plan(make_plan(before, 2), now)))
    assert exact <= 1.01 and stale > 1.3


def test_a_plan_for_another_layer_is_refused():
    with pytest.raises(LoadsError, match=r"for 4 ranks and 8 experts, the counts are \[4, 16\]. Pass counts of the same"):
        reuse_plan(make_plan(spread([1] * 8, 4), 1), spread([1] * 16, 4))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_forced_counts_are_even(problem):
    counts_RE, _ = problem
    forced = forced_counts(counts_RE)
    assert torch.equal(forced.sum(1), counts_RE.sum(1))
    loads_R = loads_before(forced)
    assert int(loads_R.max() - loads_R.min()) <= 1
    assert int(forced.sum(0).max() - forced.sum(0).min()) <= 1
    assert int((forced.max(1).values - forced.min(1).values).max()) <= 1


def test_ideal_is_a_figure_and_not_a_planner():
    for use in (lambda: make_plan(spread([1, 2], 2), 1, "ideal"), lambda: Options(planner="ideal")):
        with pytest.raises(OptionError, match=r"'ideal' is a figure and no plan: .*run with 'quota'"):
            use()
    assert {name for name in PLANNERS if uses_history(name)} == {"eplb", "lplb"}


def test_without_load_nothing_is_copied():
    nothing = torch.zeros(4, 8, dtype=torch.int64)
    assert all(replica_count(make_plan(nothing, 2, name)) == 0 for name in PLANNERS)
