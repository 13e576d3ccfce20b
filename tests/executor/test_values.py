"""Loss, metrics and gradients of a pipeline against one process that runs the same microbatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.executor import toys
from tests.multirank import run_ranks
from ultraep_compile.executor.holdings import names_of
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings

Case = dict[str, Any]


def worst_difference(pipe: Pipeline, model: toys.Parts, batch: list, steps: int = 2) -> float:
    """Largest relative difference of loss, metrics and this rank's gradients over a few steps of one batch."""
    single = toys.copied(model)
    worst = 0.0
    for _ in range(steps):
        result = pipe.step({"microbatches": batch})
        loss, metrics = toys.reference(single, batch)
        worst = max(worst, abs(float(result) - float(loss)) / abs(float(loss)))
        assert result.metrics[1].dtype == torch.int64 and int(result.metrics[1]) == int(metrics[1])
        worst = max(worst, abs(float(result.metrics[0]) - metrics[0]) / abs(metrics[0]))
    expected = names_of(None, single)
    for name, p in pipe.named_parameters():
        grad = expected[name].grad
        assert (p.grad is None) == (grad is None), f"{name} has a gradient on one side only"
        if grad is not None:
            assert p.grad is not None
            worst = max(worst, float((p.grad - grad).norm() / grad.norm().clamp(min=1e-12)))
    return worst


def _cases(rank: int, ranks: int, cases: list[Case]) -> list[float]:
    mesh = init_device_mesh("cpu", (ranks,))
    found = []
    for number, case in enumerate(cases):
        case = dict(case)
        kind = {k: case.pop(k) for k in ("sound", "painter") if k in case}
        made = {k: case.pop(k) for k in ("feeds", "tied", "frozen") if k in case}
        images = case.pop("images", 0.8)
        settings = Settings(case.pop("microbatches", 2 * ranks + 1), deadline=60.0, **case)
        model = toys.parts(ranks * settings.virtual, **made, **kind)
        batch = toys.microbatches(settings.microbatches, number, images=images, **kind)
        single = toys.copied(model)
        pipe = Pipeline(None, model, mesh, settings)
        found.append(worst_difference(pipe, single, batch))
    return found


TWO: dict[str, Case] = {
    "nested": {},
    "two encoders": {"sound": True},
    "frozen": {"frozen": True},
    "untied": {"tied": False},
    "no images": {"images": 0.0},
    "few images": {"images": 0.2, "microbatches": 7},
    "memory": {"encoder_memory": 4.0, "microbatches": 8},
    "deep": {"feeds": (0, 1), "sound": True},
    "colocated": {"method": "colocated"},
    "uneven": {"method": "uneven"},
    "encoder-first": {"method": "encoder-first"},
    "flush": {"method": "flush"},
    "recompute": {"method": "recompute"},
    "optimus": {"method": "optimus"},
    "virtual": {"virtual": 2, "microbatches": 6, "feeds": (0, 3)},
    "virtual colocated": {"virtual": 2, "method": "colocated", "feeds": (0, 2)},
    "zero-bubble": {"base": "zero-bubble", "feeds": (0, 1)},
    "dualpipev": {"base": "dualpipev", "virtual": 2, "microbatches": 6},
    "gpipe": {"base": "gpipe"},
}
GENERATORS: dict[str, Case] = {
    "whole": {"microbatches": 6},
    "split": {"microbatches": 6, "generator": "split"},
    "split group": {"microbatches": 6, "generator": "split", "generator_group": 2},
    "colocated": {"method": "colocated"},
    "encoder-first": {"method": "encoder-first"},
}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_methods_equal_one_process(ranks: int) -> None:
    results = run_ranks(ranks, _cases, ranks, list(TWO.values()))
    for row in results:
        assert all(x < 1e-5 for x in row), dict(zip(TWO, row, strict=True))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_generators_equal_one_process(ranks: int) -> None:
    cases = [{"painter": True, **c} for c in GENERATORS.values()]
    for row in run_ranks(ranks, _cases, ranks, cases):
        assert all(x < 1e-5 for x in row), dict(zip(GENERATORS, row, strict=True))
