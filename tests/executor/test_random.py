"""Many batches of random shapes through one pipeline: none may hang, mix up messages, or give another result."""

from __future__ import annotations

import random
from typing import Any

import pytest
from torch.distributed.device_mesh import init_device_mesh

from tests.executor import toys
from tests.multirank import run_ranks
from ultraep_compile.executor.holdings import names_of
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"sound": True, "feeds": (0, 1)},
    {"painter": True, "generator": "split"},
    {"virtual": 2},
    {"painter": True, "sound": True},
)


def _batches(rank: int, ranks: int, count: int, ordered: bool) -> tuple[int, float]:
    """(different plans, largest relative difference of the losses and of gradients added up over each kind's batches)."""
    mesh = init_device_mesh("cpu", (ranks,))
    draw = random.Random(1)
    plans, worst = 0, 0.0
    for k, kind in enumerate(KINDS):
        settings = Settings(
            2 * ranks + 2 * (k % 2), deadline=60.0, virtual=kind.get("virtual", 1),
            generator=kind.get("generator", "whole"),
        )  # fmt: skip
        flags = {name: kind.get(name, False) for name in ("sound", "painter")}
        model = toys.parts(ranks * settings.virtual, kind.get("feeds", (0,)), **flags, seed=k)
        single = toys.copied(model)
        pipe = Pipeline(None, model, mesh, settings)
        for channel in pipe.channels.values():
            channel.ordered = ordered  # as NCCL needs it
        made = []
        for _ in range(count // len(KINDS)):
            images = draw.choice([0.0, 0.3, 0.8, 1.0])
            made.append(toys.microbatches(settings.microbatches, draw.randrange(10**6), images=images, **flags))
        loader = [{"microbatches": batch} for batch in made]
        for batch, given in zip(made, pipe.ahead(loader) if k % 2 else loader, strict=True):
            result = float(pipe.step(given))
            expected = float(toys.reference(single, batch)[0])
            worst = max(worst, abs(result - expected) / abs(expected))
        plans += len(pipe.planner)
        grads = names_of(None, single)
        for name, p in pipe.named_parameters():
            grad = grads[name].grad
            if grad is not None and p.grad is not None:
                worst = max(worst, float((p.grad - grad).norm() / grad.norm()))
    return plans, worst


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "count", "ordered"),
    [
        (2, 20, True),
        pytest.param(2, 200, False, marks=SLOW),
        pytest.param(4, 200, False, marks=SLOW),
        pytest.param(4, 200, True, marks=SLOW),
    ],
)
def test_random_batches(ranks: int, count: int, ordered: bool) -> None:
    for plans, worst in run_ranks(ranks, _batches, ranks, count, ordered):
        assert plans > len(KINDS) and worst < 2e-5
