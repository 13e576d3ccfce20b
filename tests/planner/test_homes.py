"""Experts dealt anew over domains and ranks: the bound falls, the order is a permutation, bad input is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import skewed
from ultraep_compile.errors import LoadsError, TopologyError
from ultraep_compile.planner import imbalance, loads_after, loads_before, lower_bound, make_plan
from ultraep_compile.planner.homes import in_order, spread_homes


def hot_first(ranks: int, masters: int, seed: int) -> torch.Tensor:
    """Loads that fall with the expert's number, as when popular experts lie side by side."""
    counts_RE = skewed(ranks, masters, 4000, 0.5, seed)
    heat_E = 1 / (1 + torch.arange(ranks * masters) / (ranks * masters / 8))
    return (counts_RE * heat_E).long()


@pytest.mark.parametrize("ranks, masters, domain", [(16, 4, 4), (64, 4, 8), (24, 4, 6)])
def test_domains_come_out_even(ranks, masters, domain):
    for seed in range(4):
        counts_RE = hot_first(ranks, masters, seed)
        moved_RE = in_order(counts_RE, spread_homes(counts_RE, domain))
        before, after = (lower_bound(c, 2, domain) for c in (counts_RE, moved_RE))
        assert before > 1.25 and after <= 1.02
        assert imbalance(loads_after(make_plan(moved_RE, 2, domain=domain))) <= 1.04
        assert imbalance(loads_before(moved_RE)) < imbalance(loads_before(counts_RE))


def test_without_domains_ranks_come_out_even():
    counts_RE = hot_first(8, 8, seed=0)
    assert imbalance(loads_before(counts_RE)) > 1.8
    assert imbalance(loads_before(in_order(counts_RE, spread_homes(counts_RE)))) < 1.1


def test_history_counts_together():
    history_NRE = torch.stack([hot_first(8, 4, seed) for seed in range(5)])
    assert torch.equal(spread_homes(history_NRE, 4), spread_homes(history_NRE.sum(0), 4))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0, 1, 1000, 2**31 / 600]), st.integers(0, 99))
def test_any_load_gives_a_permutation_that_is_no_worse(size, domains, masters, scale, seed):
    ranks = size * domains
    counts_RE = skewed(ranks, masters, scale, 8.0, seed)
    order_E = spread_homes(counts_RE, size)
    assert order_E.sort().values.tolist() == list(range(ranks * masters))
    loads_D, moved_D = (c.sum(0).view(domains, -1).sum(1) for c in (counts_RE, in_order(counts_RE, order_E)))
    # LPT with room in every domain: the fullest exceeds the mean by at most the largest expert
    assert moved_D.max() <= moved_D.sum() / domains + counts_RE.sum(0).max()
    assert int(moved_D.sum()) == int(loads_D.sum())


def test_bad_input():
    with pytest.raises(TopologyError, match="cannot be divided into domains of 3"):
        spread_homes(torch.ones(4, 8, dtype=torch.int64), 3)
    with pytest.raises(LoadsError, match="holds -1 tokens"):
        spread_homes(torch.full((2, 2, 4), -1))
    with pytest.raises(LoadsError, match=r"shape \[0, 2, 4\]"):
        spread_homes(torch.zeros(0, 2, 4, dtype=torch.int64))
    with pytest.raises(LoadsError, match="order is one of 8 experts"):
        in_order(torch.ones(2, 4, dtype=torch.int64), torch.arange(8))
