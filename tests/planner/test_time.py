"""`quota:N`: copies only where they save more than they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.problems import problems, skewed
from ultraep_compile.cost_model import Layer, Loads, Rates, copy_tokens, evaluate, occurrences
from ultraep_compile.errors import OptionError
from ultraep_compile.planner import (
    Plan,
    loads_after,
    loads_before,
    make_plan,
    max_ingress,
    replica_count,
    validate_plan,
)
from ultraep_compile.planner.figures import plan_figures


def tokens(counts_RE: torch.Tensor, plan: Plan, price: int) -> int:
    """What `quota:price` minimises, of the plan as it came out."""
    moved = max(plan_figures(counts_RE, plan)["max_egress"], max_ingress(plan))
    return int(loads_after(plan).max()) + price * int(moved)


@settings(deadline=None, max_examples=80)
@given(problems(), st.sampled_from([0, 1, 50, 3000, 2**24]))
def test_never_slower_than_no_copies_or_few(problem, price):
    counts_RE, slots = problem
    plan = make_plan(counts_RE, slots, f"quota:{price}")
    validate_plan(counts_RE, plan)
    ours = tokens(counts_RE, plan, price)
    mean = -(-int(counts_RE.sum()) // counts_RE.shape[0])
    slack = mean // 100 + mean // 256 + 2  # a threshold may not be reached to the last token
    assert ours <= int(loads_before(counts_RE).max())
    even = make_plan(counts_RE, slots)
    if int(loads_after(even).max()) <= mean + mean // 100:
        assert ours <= tokens(counts_RE, even, price) + slack


def test_copies_that_do_not_pay_are_not_made():
    counts_RE = skewed(16, 4, 300, 8.0, seed=4)
    gain = int(loads_before(counts_RE).max()) - int(counts_RE.sum()) // 16
    assert replica_count(make_plan(counts_RE, 2)) > 5
    assert replica_count(make_plan(counts_RE, 2, f"quota:{gain}")) == 0
    counts = [replica_count(make_plan(counts_RE, 2, f"quota:{n}")) for n in (0, gain // 16, gain // 4, gain)]
    assert counts[0] > counts[-2] and counts == sorted(counts, reverse=True)


def test_domains_decide_for_themselves():
    counts_RE = torch.zeros(8, 8, dtype=torch.int64)
    counts_RE[:, 0], counts_RE[:, 4:] = 1000, 10  # only the first domain has something to gain
    counts_RE[:, 5] = 40
    plan = make_plan(counts_RE, 1, "quota:500", domain=4)
    assert (plan.slot_expert_RS[:4] == 0).any() and (plan.slot_expert_RS[4:] == -1).all()


def test_number_from_the_model_gives_faster_plans():
    layer, rates = Layer.gated(1024, 512, 4), Rates()
    planner = f"quota:{copy_tokens(layer, rates)}"
    times = occurrences("train")

    def time(counts_RE: torch.Tensor, planner: str) -> float:
        return evaluate(Loads.of(make_plan(counts_RE, 2, planner), rates), layer, rates, times).total

    loads = [skewed(16, 4, 400, power, seed) for seed, power in enumerate([2.0, 6.0, 20.0, 60.0])]
    ratios = np.array([time(c, "quota") / time(c, planner) for c in loads])
    assert ratios.min() > 0.97 and ratios.max() > 1.1
    assert copy_tokens(layer, Rates(exposed=0.5)) < copy_tokens(layer, rates) < copy_tokens(layer, Rates(copy_gbs=100))


@pytest.mark.parametrize("name", ["quota:", "quota:-1", "quota:1e3", "quota:auto", "greedy:100", f"quota:{2**24 + 1}"])
def test_bad_names(name):
    with pytest.raises(OptionError, match=f"{name}' is not known.*quota:2000"):
        make_plan(torch.ones(2, 4, dtype=torch.int64), 1, name)
