"""The search for copies."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import problems
from ultraep_compile.planner.placement import place
from ultraep_compile.planner.quota import FEW_COPIES, LOW_LOAD
from ultraep_compile.planner.search import Problem, find_copies
from ultraep_compile.planner.shares import split_quotas


def tokens_at_home(counts_RE, placement):
    ranks = counts_RE.shape[0]
    shares_RRL = split_quotas(counts_RE, *placement).reshape(ranks, ranks, -1)
    return int(np.einsum("rrl->", shares_RRL))


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
