"""Every development family, balanced over virtual ranks, against itself without us."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.balancing import assert_as_good_as_eager, compiled_step, oracle_step, prepared, step

LONG = ("jamba",)  # its state space layers take most of a minute to trace
FORMS = {"fp32": ("batched_mm", torch.float32), "bf16": ("grouped_mm", torch.bfloat16)}
IN_BF16 = ("granitemoe", "deepseek_v3")
"""Also tested in bf16 by default; the others with the slow tests."""
slow = pytest.mark.slow


def _cases():
    for i, family in enumerate(zoo.FAMILIES):
        for form in FORMS:
            for ranks in (2, 4, 8):
                few = form == "fp32" or family in IN_BF16
                quick = family not in LONG and ranks == (4, 8, 2)[i % 3] and few
                yield pytest.param(family, form, ranks, id=f"{family}-{form}-R{ranks}", marks=() if quick else slow)


@pytest.mark.parametrize(("family", "form", "ranks"), _cases())
def test_family(family: str, form: str, ranks: int) -> None:
    experts, dtype = FORMS[form]
    model, inputs = prepared(family, experts, dtype)
    eager, exact = step(model, model, inputs), oracle_step(model, inputs)
    ours, graphs = compiled_step(model, inputs, ranks=ranks)
    plain, _ = compiled_step(model, inputs, ranks=ranks, planner="none")
    assert sum(len(g.prepared) for g in graphs) == zoo.MOE_LAYERS.get(family, zoo.LAYERS)
    assert torch.equal(ours.loss, plain.loss)
    for name, grad in plain.grads.items():
        if "expert" not in name:
            assert torch.equal(ours.grads[name], grad), name  # only expert weights sum over copies
    assert_as_good_as_eager(ours, eager, exact, floor=2 * torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_family_on_inductor(family: str) -> None:
    model, inputs = prepared(family, "batched_mm")
    eager, exact = step(model, model, inputs), oracle_step(model, inputs)
    ours, _ = compiled_step(model, inputs, ranks=4, inner="inductor")
    plain, _ = compiled_step(model, inputs, ranks=4, inner="inductor", planner="none")
    assert torch.equal(ours.loss, plain.loss)
    assert_as_good_as_eager(ours, eager, exact, floor=1e-6)


@pytest.mark.parametrize("handmade", [zoo.HandMoE, zoo.AllExperts, zoo.TopOne])
def test_handmade(handmade) -> None:
    torch.manual_seed(0)
    model = handmade()
    inputs = {"x": torch.randn(2, 16, zoo.WIDTH)}
    eager, exact = step(model, model, inputs), None
    import copy

    double = copy.deepcopy(model).double()
    exact = step(double, double, {"x": inputs["x"].double()})
    ours, graphs = compiled_step(model, inputs, ranks=4)
    assert sum(len(g.prepared) for g in graphs) == 1
    assert_as_good_as_eager(ours, eager, exact, floor=1e-6)
