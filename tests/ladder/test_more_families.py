"""MoE families that nothing was designed for: every layer rewritten, with all its parameters, and equal to the model without us."""

from __future__ import annotations

import pytest
import torch

from tests import zoo_moe
from tests.balancing import assert_as_good_as_eager, compiled_step, oracle_step, step
from ultraep_compile import explain
from ultraep_compile.ops import watch

QUICK = {("glm4_moe", "eager"), ("zaya", "batched_mm"), ("hunyuan_v1_moe", "grouped_mm")}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Of the experts, as transformers offers them: a loop, products over gathered weights, grouped products in bf16."""
UNOFFERED = {("kimi_k25", "grouped_mm")}
"""What transformers refuses of a class, although the language model in it has it."""
CASES = [
    pytest.param(name, experts, id=f"{name}-{experts}", marks=() if (name, experts) in QUICK else pytest.mark.slow)
    for name in zoo_moe.FAMILIES
    for experts in IMPLEMENTATIONS
    if (experts == "eager" or name not in zoo_moe.LOOPS) and (name, experts) not in UNOFFERED
]


@pytest.mark.parametrize(("name", "experts"), CASES)
def test_balanced_like_eager(name, experts, monkeypatch):
    family = zoo_moe.FAMILIES[name]
    model, inputs = zoo_moe.build(name, experts)
    dtype = next(model.parameters()).dtype
    model(**inputs)
    keys = list(model.state_dict())
    eager, exact = step(model, model, inputs), oracle_step(model, inputs)
    found = explain(model, inputs)
    assert [s.status for s in found.moe_sites] == ["rewritten"] * family.sites, str(found)
    assert {s.name for s in found.moe_sites} <= dict(model.named_modules()).keys()
    assert found.rewritten_parameters == found.expert_parameters > 0
    inner = "eager" if family.recurrent else "aot_eager"
    planned: list[str] = []
    watched = watch.planned
    monkeypatch.setattr(watch, "planned", lambda site, *rest: (planned.append(site), watched(site, *rest)))
    ours, _ = compiled_step(model, inputs, ranks=4, inner=inner)
    assert len(planned) >= family.sites  # layers of like code may share a graph
    plain, _ = compiled_step(model, inputs, ranks=4, inner=inner, planner="none")
    assert torch.equal(ours.loss, plain.loss)
    assert ours.grads.keys() >= eager.grads.keys()
    assert_as_good_as_eager(ours, eager, exact, floor=2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert list(model.state_dict()) == keys
