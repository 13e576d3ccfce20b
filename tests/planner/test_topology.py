"""Domains, uneven numbers of experts, ranks without slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import skewed
from ultraep_compile.errors import OptionError, TopologyError
from ultraep_compile.planner import (
    PLANNERS,
    imbalance,
    loads_after,
    loads_before,
    logical_expert,
    make_plan,
    replica_count,
    validate_plan,
)


@st.composite
def uneven_problems(draw: st.DrawFn):
    """(counts, slots of each rank, domain, experts of each rank): some ranks without experts, some without slots."""
    domain, domains = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = domain * domains
    experts_R = draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks).filter(sum))
    foreign_R = [sum(experts_R) - n for n in experts_R]
    slots_R = [draw(st.integers(0, min(3, n))) for n in foreign_R]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heat_E = torch.rand(sum(experts_R), generator=generator).pow(draw(st.sampled_from([0.5, 4.0, 30.0])))
    scale = draw(st.sampled_from([1, 50, 4000]))
    counts_RE = (torch.rand(ranks, sum(experts_R), generator=generator) * heat_E * scale).round().long()
    return counts_RE, slots_R, domain, experts_R


@settings(max_examples=200, deadline=None)
@given(uneven_problems(), st.sampled_from(sorted(PLANNERS)))
def test_promises_hold_for_every_topology(problem, planner):
    counts_RE, slots_R, domain, experts_R = problem
    plan = make_plan(counts_RE, slots_R, planner, domain, experts_R)
    validate_plan(counts_RE, plan, planner in ("quota", "greedy", "none"), domain, experts_R)
    held_R = (plan.slot_expert_RS >= 0).sum(1)
    assert all(int(held) <= slots for held, slots in zip(held_R, slots_R, strict=True))


def test_domains_are_planned_by_themselves():
    counts_RE = skewed(8, 3, 2000, 6.0, seed=4)
    whole = make_plan(counts_RE, 2, domain=4)
    for first in (0, 4):
        loads_R = loads_after(whole)[first : first + 4]
        assert imbalance(loads_R) <= 1.01
    assert imbalance(loads_after(whole)) > 1.01 >= imbalance(loads_after(make_plan(counts_RE, 2)))


def test_domains_of_one_have_no_copies():
    counts_RE = skewed(4, 3, 2000, 6.0, seed=4)
    plan = make_plan(counts_RE, 2, domain=1)
    assert replica_count(plan) == 0
    assert loads_after(plan).tolist() == loads_before(counts_RE).tolist()


def test_uneven_experts():
    # rank 0 is home to experts 0..2, rank 1 to expert 3: copies even out what the homes do not
    counts_RE = torch.tensor([[60, 60, 60, 0], [60, 60, 60, 0]])
    plan = make_plan(counts_RE, [1, 2], experts_per_rank=[3, 1], tolerance=0)
    assert logical_expert(plan, [3, 1]).tolist()[:3] == [0, 1, 2]
    assert logical_expert(plan, [3, 1]).tolist()[5:8] == [3, -1, -1]
    assert loads_after(plan).tolist() == [180, 180]


def test_a_rank_without_slots_gets_no_copy():
    counts_RE = torch.tensor([[90, 0, 0]] * 3)
    plan = make_plan(counts_RE, [1, 0, 1], tolerance=0)
    assert plan.slot_expert_RS.tolist() == [[-1], [-1], [0]]
    assert loads_after(plan).tolist() == [135, 0, 135]


def test_tolerance_is_the_price_of_copies():
    counts_RE = skewed(16, 4, 3000, 6.0, seed=5)
    exact, loose = make_plan(counts_RE, 2, tolerance=0), make_plan(counts_RE, 2, tolerance=0.1)
    assert imbalance(loads_after(exact)) < 1.001 < 1.01 < imbalance(loads_after(loose)) <= 1.1
    assert replica_count(loose) < replica_count(exact)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"domain": 3}, "4 ranks cannot be divided into domains of 3. Choose one of 1, 2, 4"),
        ({"domain": 0}, "domains of 0"),
        ({"experts_per_rank": [2, 2, 2]}, r"does not fit 4 ranks and 8 experts. Pass 4 numbers"),
        ({"experts_per_rank": [5, 5, -1, -1]}, "numbers >= 0 that sum to 8"),
        ({"redundant_experts": [1, 1]}, "2 entries for 4 ranks. Pass one number"),
        ({"redundant_experts": [1, 1, 1, 7]}, "7 slots on rank 3"),
        ({"redundant_experts": [1, 1, 1, None]}, "redundant_experts is"),
    ],
)
def test_bad_topologies(arguments, message):
    with pytest.raises(TopologyError, match=message):
        make_plan(torch.ones(4, 8, dtype=torch.int32), **{"redundant_experts": 1, **arguments})


def test_bad_tolerances():
    with pytest.raises(OptionError, match="Pass a share of the mean"):
        make_plan(torch.ones(4, 8, dtype=torch.int32), 1, tolerance=50)
    with pytest.raises(OptionError, match="'greedy' knows no tolerance"):
        make_plan(torch.ones(4, 8, dtype=torch.int32), 1, "greedy", tolerance=0.1)
