"""Loads, plans and reroutes: exact integers, on any routing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ultraep_compile.errors import RoutingError
from ultraep_compile.ops import routing
from ultraep_compile.ops.layout import physical_to_logical, source_ranks

OPS = torch.ops.ultraep


@settings(deadline=None, max_examples=80)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    masters=st.integers(1, 4),
    slots=st.integers(0, 3),
    tokens=st.integers(0, 90),
    choices=st.integers(1, 4),
    skew=st.floats(0, 20),
    seed=st.integers(0, 10_000),
)
def test_every_pair_reaches_a_copy_of_its_expert_and_shares_are_met(
    ranks, masters, slots, tokens, choices, skew, seed
) -> None:
    experts = ranks * masters
    choices, slots = min(choices, experts), min(slots, experts - masters)
    g = torch.Generator().manual_seed(seed)
    ids = (torch.randn(tokens, experts, generator=g) + skew * torch.linspace(1, 0, experts)).topk(choices)[1]
    counts = OPS.expert_load(ids, None, experts, ranks, "", "x")
    source = source_ranks(tokens, ranks, ids.device)
    for r in range(ranks):
        assert torch.equal(counts[r].long(), torch.bincount(ids[source == r].flatten(), minlength=experts))
    slot_expert, shares = OPS.plan(counts, slots, "quota", "x")
    physical = OPS.reroute(ids, slot_expert, shares, experts, "", "x").long()
    assert torch.equal(physical_to_logical(slot_expert, experts)[physical], ids)
    for r in range(ranks):
        assert torch.equal(torch.bincount(physical[source == r].flatten(), minlength=shares.shape[1]), shares[r].long())
    assert torch.equal(physical, OPS.reroute(ids, slot_expert, shares, experts, "", "x").long())


def test_reroute_interleaves_the_copies() -> None:
    """Any window of 30 tokens uses all three equal copies; the naive order would use one for 100 tokens on end."""
    ids = torch.zeros(900, 1, dtype=torch.int64)
    slot_expert = torch.tensor([[-1], [0], [0]], dtype=torch.int32)
    shares = torch.tensor([[100, 0, 0, 100, 0, 100]] * 3, dtype=torch.int32)
    physical = OPS.reroute(ids, slot_expert, shares, 3, "", "x").flatten()[:300]
    for start in range(270):
        used = torch.bincount(physical[start : start + 30], minlength=6)
        assert used[[0, 3, 5]].min() >= 7


def test_dealing_is_exact_in_token_order_and_even() -> None:
    """Whole problems: every copy gets its share, numbers count up, and no window strays from the shares."""
    column, number = routing.deal(
        torch.arange(3), torch.zeros(3).long(), torch.full((3,), 2), torch.tensor([2, 3]), copies=2
    )
    assert column.tolist() == [1, 0, 0] and number.tolist() == [0, 0, 1]
    generator = torch.Generator().manual_seed(0)
    for copies in (1, 2, 3, 4, 7, 16):
        shares = torch.randint(0, 60, (copies,), generator=generator)
        shares[-1] += 1
        n = int(shares.sum())
        one = torch.ones(n, dtype=torch.int64)
        column, number = routing.deal(torch.arange(n), 0 * one, copies * one, torch.cumsum(shares, 0), copies)
        assert torch.equal(torch.bincount(column, minlength=copies), shares)
        for c in range(copies):
            assert torch.equal(number[column == c], torch.arange(int(shares[c])))
        got = torch.cumsum(torch.nn.functional.one_hot(column, copies), 0)
        due = torch.arange(1, n + 1).unsqueeze(1) * shares / n
        assert (got - due).abs().max() <= max(1, (copies - 1).bit_length())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores = torch.randn(5, 8)
    scores[3, 2] = value
    with pytest.raises(RoutingError, match=r"layers\.0\.mlp: the router's score of token 3 for expert 2 is"):
        OPS.expert_load(torch.zeros(5, 2, dtype=torch.int64), scores, 8, 2, "", "layers.0.mlp@abc")


@pytest.mark.parametrize("bad", [-1, 8, 1000])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    ids = torch.zeros(5, 2, dtype=torch.int64)
    ids[4, 1] = bad
    with pytest.raises(RoutingError, match=rf"token 4, choice 1 is routed to expert {bad}.*experts 0\.\.7"):
        OPS.expert_load(ids, None, 8, 2, "", "layer@abc")
