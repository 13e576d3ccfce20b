"""Loads at the edge of what can happen."""

from __future__ import annotations

import pytest
import torch

from tests.planner.problems import skewed, spread
from ultraep_compile.planner import (
    imbalance,
    loads_after,
    make_plan,
    max_ingress,
    remote_tokens,
    replica_count,
    validate_plan,
)


def planned(counts_RE, slots, planner="quota"):
    plan = make_plan(counts_RE, slots, planner)
    validate_plan(counts_RE, plan)
    return plan


def test_no_tokens_at_all():
    plan = planned(torch.zeros(4, 8, dtype=torch.int32), 2)
    assert replica_count(plan) == max_ingress(plan) == 0
    assert imbalance(loads_after(plan)) == 1.0


@pytest.mark.parametrize("slots", [1, 2])
def test_one_expert_takes_all(slots):
    counts_RE = torch.zeros(8, 32, dtype=torch.int64)
    counts_RE[:, 13] = 1000
    plan = planned(counts_RE, slots)
    assert loads_after(plan).max() <= 1010
    assert replica_count(plan) == 7
    assert int(remote_tokens(plan).sum()) <= 80  # a rank may take 10 tokens more than it has


def test_one_rank():
    plan = planned(torch.tensor([[3, 0, 9]]), 0)
    assert plan.slot_expert_RS.shape == (1, 0)
    assert plan.shares_RP.tolist() == [[3, 0, 9]]


def test_no_slots():
    counts_RE = skewed(4, 2, 100, 4.0, seed=0)
    assert torch.equal(planned(counts_RE, 0).shares_RP.long(), counts_RE)


def test_one_token():
    counts_RE = torch.zeros(4, 4, dtype=torch.int64)
    counts_RE[2, 1] = 1
    assert replica_count(planned(counts_RE, 2)) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_totals_near_two_to_the_31(dtype):
    counts_RE = torch.zeros(8, 8, dtype=dtype)
    counts_RE[:, 0] = 2**28 - 1  # 2^31 - 8 tokens for expert 0
    plan = planned(counts_RE, 1)
    assert loads_after(plan).max() <= (2**28 - 1) * 1.01


def test_totals_far_beyond_int32():
    counts_RE = torch.full((8, 8), 2**31 - 1)
    counts_RE[:, 4:] = 7
    plan = planned(counts_RE, 2)
    assert imbalance(loads_after(plan)) <= 1.01
    assert int(loads_after(plan).sum()) == int(counts_RE.sum())


def test_more_slots_than_useful():
    counts_RE = skewed(4, 3, 1000, 6.0, seed=1)
    few, many = planned(counts_RE, 2), planned(counts_RE, 9)
    assert imbalance(loads_after(many)) <= max(imbalance(loads_after(few)), 1.01)


def test_ranks_without_tokens():
    counts_RE = skewed(6, 4, 500, 4.0, seed=2)
    counts_RE[1:] = 0
    plan = planned(counts_RE, 2)
    assert int(plan.shares_RP[1:].sum()) == 0
    assert imbalance(loads_after(plan)) <= 1.011


@pytest.mark.parametrize("masters", [1, 2, 4])
@pytest.mark.parametrize("tokens", [64, 120, 256, 1024])
def test_small_loads_balance_to_the_token(masters, tokens):
    # 1% of a mean of 8 tokens is less than one token
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        heat_E = torch.rand(8 * masters, generator=generator).pow(4) + 0.001
        ids = torch.multinomial(heat_E, tokens, replacement=True, generator=generator)
        counts_RE = spread(torch.bincount(ids, minlength=8 * masters).tolist(), 8)
        assert imbalance(loads_after(planned(counts_RE, 2))) <= 1.02


@pytest.mark.parametrize("ranks, masters, slots", [(64, 4, 2), (64, 2, 1), (128, 2, 1), (16, 64, 2)])
def test_large_topologies(ranks, masters, slots):
    for seed, power in enumerate([1.0, 4.0, 16.0]):
        counts_RE = skewed(ranks, masters, 4096, power, seed)
        plan = planned(counts_RE, slots)
        assert imbalance(loads_after(plan)) <= 1.03
        assert replica_count(plan) <= ranks * (1 if masters <= 4 else slots)
