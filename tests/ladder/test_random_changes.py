"""Random changes of a lifted and of a traced model: after each, both equal their eager twins."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.ladder.random_changes import MODELS, Life

STEPS = 8


@pytest.mark.parametrize("model", MODELS)
def test_equal_after_every_random_change(model: str) -> None:
    _live(model, seed=0, steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("model", MODELS)
def test_equal_after_many_random_changes(model: str, seed: int) -> None:
    _live(model, seed, steps=60)


def _live(model: str, seed: int, steps: int) -> None:
    torch._dynamo.reset()
    life = Life(model, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            assert life.step() == "", f"seed {seed}: {' -> '.join(life.history[-8:])}"
    assert life.seen > 2, "too few kinds of changes to show anything"
