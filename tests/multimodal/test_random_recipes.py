"""Training recipes at random over two processes beside one: `benchmarks.random_recipes`, a few steps of it."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.random_recipes import TOLERANCE, lives
from tests.multirank import run_ranks


@pytest.mark.parametrize(("seeds", "steps"), [([1, 2], 8), pytest.param([*range(3, 9)], 15, marks=pytest.mark.slow)])
def test_recipes_at_random(seeds: list[int], steps: int) -> None:
    events: Counter[str] = Counter()
    for found in run_ranks(2, lives, seeds, steps):
        for lived in found:
            assert not lived.wrong and lived.worst <= TOLERANCE, lived
            events += lived.events
    assert events["step"] and events["updates"] and events["frozen otherwise"], "too few draws to show anything"
