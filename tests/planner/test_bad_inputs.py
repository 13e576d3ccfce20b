"""Each wrong input has its sentence."""

from __future__ import annotations

import pytest
import torch

from ultraep_compile.errors import LoadsError, OptionError, TopologyError
from ultraep_compile.planner import Plan, loads_after, lower_bound, make_plan, remote_tokens, validate_plan

ones = torch.ones(4, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    "counts, message",
    [
        ([[1, 2]], "is a list, not a tensor. Wrap it in torch.as_tensor"),
        (ones.float(), "has dtype torch.float32. Pass token counts as int32 or int64"),
        (ones.bool(), "has dtype torch.bool"),
        (ones[0], r"has shape \[8\]. Pass \[ranks, experts\]"),
        (ones[None], r"has shape \[1, 4, 8\]"),
        (ones[:0], r"has shape \[0, 8\]"),
        (ones.clone().index_fill_(1, torch.tensor([5]), -3), "holds -3 tokens at source rank 0, expert 5"),
        (ones * 2**31, "holds 2147483648 tokens at source rank 0, expert 0. Pass counts between 0 and"),
    ],
)
def test_loads(counts, message):
    for call in (make_plan, lower_bound):
        with pytest.raises(LoadsError, match=message):
            call(counts, 1)


@pytest.mark.parametrize(
    "counts, slots, message",
    [
        (ones[:3], 1, "8 experts cannot be divided over 3 ranks. Choose a number of ranks that divides 8"),
        (ones, -1, "redundant_experts is -1. Pass the number of slots per rank"),
        (ones, 1.0, "redundant_experts is 1.0"),
        (ones, True, "redundant_experts is True"),
        (
            ones,
            7,
            "Too many redundant experts: 7 slots .* only 6 live on other ranks. .*redundant_experts <= 6",
        ),
        (ones[:1], 1, "Too many redundant experts: 1 slots .* redundant_experts <= 0"),
    ],
)
def test_topology(counts, slots, message):
    for call in (make_plan, lower_bound):
        with pytest.raises(TopologyError, match=message):
            call(counts, slots)


def test_planner_name():
    with pytest.raises(OptionError, match=r"There is no planner 'qota'\. Did you mean 'quota'\?"):
        make_plan(ones, 1, "qota")
    with pytest.raises(OptionError, match=r"There is no planner 'zzz'\. Known: .*greedy.* none.* quota"):
        make_plan(ones, 1, "zzz")


COUNTS = torch.tensor([[3, 1], [4, 0]])
SLOTS = torch.tensor([[-1], [0]], dtype=torch.int32)
SHARES = torch.tensor([[3, 0, 1, 0], [1, 0, 0, 3]], dtype=torch.int32)


def test_the_plan_of_the_docstring():
    plan = make_plan(COUNTS, 1)
    assert torch.equal(plan.slot_expert_RS, SLOTS)
    assert torch.equal(plan.shares_RP, SHARES)
    assert loads_after(plan).tolist() == [4, 4]
    assert remote_tokens(plan).tolist() == [1, 1]


@pytest.mark.parametrize(
    "slots, shares, message",
    [
        (SLOTS, [[2, 0, 1, 0], [1, 0, 0, 3]], "source rank 0 sends 2 of its 3 tokens of expert 0"),
        (SLOTS, [[4, 0, 1, -1], [1, 0, 0, 3]], "a share is negative"),
        (SLOTS, [[3, 1, 1, 0], [1, 0, 0, 3]], "tokens are sent to an empty slot"),
        (torch.zeros_like(SLOTS), SHARES, "rank 0 .its home. holds 2 copies of expert 0"),
        (SLOTS + 2, SHARES, "a slot holds an expert outside -1..1"),
        (SLOTS.long(), SHARES, "dtypes are torch.int64 and torch.int32, not int32"),
        (SLOTS, SHARES[:, :3], "do not belong to counts"),
    ],
)
def test_broken_plans_are_named(slots, shares, message):
    with pytest.raises(AssertionError, match=message.replace("..", r"\.\.")):
        validate_plan(COUNTS, Plan(slots, torch.as_tensor(shares, dtype=torch.int32)))


def test_a_worse_plan_is_named():
    counts = torch.tensor([[3, 3], [3, 3]])
    slots = torch.tensor([[1], [-1]], dtype=torch.int32)
    shares = torch.tensor([[3, 1, 2, 0], [3, 1, 2, 0]], dtype=torch.int32)
    with pytest.raises(AssertionError, match="the largest load rose from 6 to 8"):
        validate_plan(counts, Plan(slots, shares))
    validate_plan(counts, Plan(slots, shares), never_worse=False)
