"""Quotas that keep tokens at home."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import problems
from ultraep_compile.planner.local import keep_local
from ultraep_compile.planner.placement import Placement, place
from ultraep_compile.planner.quota import FEW_COPIES, LOW_LOAD
from ultraep_compile.planner.registry import PLANNERS
from ultraep_compile.planner.search import Problem, find_copies
from ultraep_compile.planner.shares import split_quotas


def tokens_at_home(counts_RE, placement):
    ranks = counts_RE.shape[0]
    shares_RRL = split_quotas(counts_RE, *placement).reshape(ranks, ranks, -1)
    return int(np.einsum("rrl->", shares_RRL))


def test_example():
    # expert 0 has copies on both ranks, which hold 5 of its tokens each; rank 1 has nothing else
    counts_RE = np.array([[5, 0], [5, 0]])
    placement = Placement(np.array([[-1], [0]]), np.array([3, 0, 0, 7]))
    assert keep_local(counts_RE, placement, tau=10).quota_P.tolist() == [5, 0, 0, 5]
    assert keep_local(counts_RE, placement, tau=4).quota_P.tolist() == [4, 0, 0, 6]


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(FEW_COPIES + LOW_LOAD))
def test_the_search_knows_how_many_tokens_stay(problem, method):
    counts_RE, slots = problem[0].numpy(), problem[1]
    loads = Problem(counts_RE, slots)
    found = find_copies(loads, max(loads.mean, loads.total * 101 // (100 * loads.ranks)), method)
    if found is not None:
        before = tokens_at_home(counts_RE, place(loads.loads_RM, slots, None))
        after = tokens_at_home(counts_RE, place(loads.loads_RM, slots, loads.copies(found)))
        assert found.local == after - before


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_token_is_lost_no_rank_overflows_and_more_stay_at_home(problem):
    counts_RE, slots = problem[0].numpy(), problem[1]
    ranks = counts_RE.shape[0]
    before = PLANNERS["greedy"](counts_RE, slots)
    loads_R = before.quota_P.reshape(ranks, -1).sum(1)
    for tau in (int(loads_R.max()), int(loads_R.max()) * 2):
        after = keep_local(counts_RE, before, tau)
        assert after.quota_P.reshape(ranks, -1).sum(1).max() <= tau
        assert (
            split_quotas(counts_RE, *after).sum(0) == after.quota_P
        ).all()  # quotas still sum to the loads
        assert tokens_at_home(counts_RE, after) >= tokens_at_home(counts_RE, before)
        width = counts_RE.shape[1] // ranks + slots
        slot_quota_RS = after.quota_P.reshape(ranks, width)[:, width - slots :]
        assert ((slot_quota_RS > 0) == (before.slot_expert_RS >= 0)).all()
