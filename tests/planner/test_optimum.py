"""How far plans are from the exact optimum, and that the lower bound never passes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planner.problems import spread
from ultraep_compile.planner import (
    imbalance,
    loads_after,
    loads_before,
    lower_bound,
    make_plan,
    replica_count,
    validate_plan,
)
from ultraep_compile.planner.optimum import optimal_max_load


def solved(number: int, seed: int, masters: tuple[int, int]) -> list[tuple[torch.Tensor, int, int]]:
    """Random problems (counts, slots, optimum); more experts per rank make slots scarcer and plans harder."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < number:
        ranks, experts_per_rank = int(rng.integers(2, 6)), int(rng.integers(*masters))
        slots = int(rng.integers(1, 3))
        if slots > (ranks - 1) * experts_per_rank:
            continue
        heat_RM = np.exp(rng.normal(size=(ranks, experts_per_rank)) * rng.choice([0.3, 1.0, 2.0]))
        heat_RM *= np.exp(rng.normal(size=(ranks, 1)) * 0.7) * rng.choice([5, 50, 2000])
        loads_E = heat_RM.astype(np.int64).ravel()
        optimum = optimal_max_load(loads_E, ranks, slots)
        if loads_E.sum() and optimum is not None:
            out.append((spread(loads_E.tolist(), ranks), slots, optimum))
    return out


@pytest.mark.parametrize(
    "number, masters, mean_gap, worst_gap",
    [(60, (1, 4), 0.002, 0.03), (40, (4, 11), 0.005, 0.05)],
    ids=["ample slots", "scarce slots"],
)
def test_gap_to_the_optimum(number, masters, mean_gap, worst_gap):
    gaps = []
    for counts_RE, slots, optimum in solved(number, seed=7, masters=masters):
        plan = make_plan(counts_RE, slots)
        validate_plan(counts_RE, plan)
        good_enough = max(optimum, int(counts_RE.sum()) * 101 // (100 * counts_RE.shape[0]))
        gaps.append(max(int(loads_after(plan).max()) / good_enough - 1, 0))
        best = optimum * counts_RE.shape[0] / int(counts_RE.sum())
        assert lower_bound(counts_RE, slots) <= best + 1e-12
    assert np.mean(gaps) <= mean_gap
    assert max(gaps) <= worst_gap


def test_greedy_alone_is_further_from_the_optimum():
    problems = solved(30, seed=8, masters=(1, 4))
    worst = {
        planner: max(int(loads_after(make_plan(c, s, planner)).max()) / best for c, s, best in problems)
        for planner in ("quota", "greedy")
    }
    assert worst["quota"] < 1.03 < 1.15 < worst["greedy"]


def test_lower_bound_is_often_the_optimum():
    exact = [
        lower_bound(counts_RE, slots) == pytest.approx(best * counts_RE.shape[0] / int(counts_RE.sum()))
        for counts_RE, slots, best in solved(30, seed=9, masters=(4, 11))
    ]
    assert sum(exact) >= 27


def test_lower_bound_knows_what_slots_can_carry_off():
    # rank 0 has 5, 5, 5 and the other rank one slot: one 5 can leave, so 10 stay, and the mean is 8
    assert lower_bound(spread([5, 5, 5, 1, 0, 0], 2), 1) == 10 / 8
    assert lower_bound(spread([5, 5, 5, 1, 0, 0], 2), 0) == 15 / 8
    assert lower_bound(spread([5, 5, 5, 1, 0, 0], 2), 2) == 1.0
    assert lower_bound(torch.zeros(2, 6, dtype=torch.int32), 1) == 1.0


@pytest.mark.parametrize("slots", [1, 2])
def test_an_overloaded_rank_must_import(slots):
    # loads 10, 7, 1: rank 0 sends 5 to rank 2 and drops to 5, rank 1 sends 1 to rank 0
    counts_RE = torch.tensor([[4, 3, 0], [3, 3, 1], [3, 1, 0]])
    plan = make_plan(counts_RE, slots)
    validate_plan(counts_RE, plan)
    assert loads_before(counts_RE).tolist() == [10, 7, 1]
    assert loads_after(plan).tolist() == [6, 6, 6]
    assert imbalance(loads_after(plan)) == 1.0
    assert replica_count(plan) == 2
    if slots == 1:
        assert int(loads_after(make_plan(counts_RE, slots, "greedy")).max()) == 7
