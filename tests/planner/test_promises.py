"""What holds for every plan, whatever the counts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import problems
from ultraep_compile.planner import (
    PLANNERS,
    imbalance,
    loads_after,
    loads_before,
    logical_expert,
    lower_bound,
    make_plan,
    max_ingress,
    quotas,
    remote_tokens,
    replica_count,
    validate_plan,
)
from ultraep_compile.planner.registry import uses_history

any_planner = st.sampled_from(sorted(PLANNERS))
ours = st.sampled_from(sorted(name for name in PLANNERS if not uses_history(name)))  # the peers promise less
many = settings(max_examples=200, deadline=None)


@many
@given(problems(), any_planner)
def test_every_token_goes_to_one_copy_of_its_expert(problem, planner):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, planner)
    expert_P = logical_expert(plan)
    for expert in range(counts_RE.shape[1]):
        sent_R = plan.shares_RP[:, expert_P == expert].sum(1)
        assert sent_R.tolist() == counts_RE[:, expert].tolist()
    assert int(plan.shares_RP.min()) >= 0
    assert int(plan.shares_RP[:, expert_P < 0].sum()) == 0


@many
@given(problems(), any_planner)
def test_slots_hold_foreign_experts_once(problem, planner):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, planner)
    ranks, masters = counts_RE.shape[0], counts_RE.shape[1] // counts_RE.shape[0]
    assert plan.slot_expert_RS.shape == (ranks, slots)
    for rank, row in enumerate(plan.slot_expert_RS.tolist()):
        held = [expert for expert in row if expert >= 0]
        assert len(set(held)) == len(held)
        assert all(expert // masters != rank for expert in held)
    assert max_ingress(plan) <= slots
    assert replica_count(plan) <= ranks * slots


@many
@given(problems(), ours)
def test_largest_load_never_rises(problem, planner):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, planner)
    assert int(loads_after(plan).max()) <= int(loads_before(counts_RE).max())
    assert int(loads_after(plan).sum()) == int(counts_RE.sum())
    assert lower_bound(counts_RE, slots) <= imbalance(loads_after(plan))


@many
@given(problems(), ours)
def test_a_copy_is_used_and_prefers_its_own_tokens(problem, planner):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, planner)
    ranks, expert_P, quota_P = counts_RE.shape[0], logical_expert(plan), quotas(plan)
    host_P = torch.arange(expert_P.numel()) // (expert_P.numel() // ranks)
    in_slot_P = torch.arange(expert_P.numel()) % (expert_P.numel() // ranks) >= counts_RE.shape[1] // ranks
    assert bool((quota_P[(expert_P >= 0) & in_slot_P] > 0).all())
    for p in torch.nonzero(expert_P >= 0).flatten().tolist():
        rank, own = int(host_P[p]), int(counts_RE[host_P[p], expert_P[p]])
        assert int(plan.shares_RP[rank, p]) == min(own, int(quota_P[p]))
    kept = int(counts_RE.sum() - remote_tokens(plan).sum())
    assert kept == sum(int(plan.shares_RP[r, host_P == r].sum()) for r in range(ranks))


@many
@given(problems(), any_planner)
def test_equal_counts_give_equal_plans(problem, planner):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, planner)
    same = make_plan(counts_RE.clone().t().contiguous().t(), slots, planner)
    assert all(torch.equal(a, b) for a, b in zip(plan, same, strict=True))
    if int(counts_RE.max()) < 2**31:
        same = make_plan(counts_RE.int(), slots, planner)
        assert all(torch.equal(a, b) for a, b in zip(plan, same, strict=True))


@many
@given(problems(), ours)
def test_validate_plan_agrees(problem, planner):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, planner)
    validate_plan(counts_RE, plan)
    assert plan.slot_expert_RS.dtype == plan.shares_RP.dtype == torch.int32


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**20), st.data())
def test_a_balanced_load_stays_as_it_is(ranks, masters, tokens, data):
    slots = data.draw(st.integers(0, min(2, (ranks - 1) * masters)))
    counts_RE = torch.full((ranks, ranks * masters), tokens)
    plan = make_plan(counts_RE, slots)
    assert replica_count(plan) == 0
    masters_RP = plan.shares_RP.view(ranks, ranks, masters + slots)[:, :, :masters]
    assert torch.equal(masters_RP.reshape(ranks, -1).long(), counts_RE)
