"""Run a model with and without balancing and compare both with fp64."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo
from ultraep_compile import ultraep
from ultraep_compile.preparation import warm_up
from ultraep_compile.report import GraphReport, collect_reports


@dataclass
class Step:
    """Loss and gradients of one forward and backward."""

    loss: Tensor
    grads: dict[str, Tensor]


def backend(**options: Any):
    return functools.partial(ultraep, options={"inner": "aot_eager", **options})


def step(call, model: nn.Module, inputs: dict[str, Tensor]) -> Step:
    """Forward and backward from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = zoo.loss_of(call(**inputs))
    loss.backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), grads)


def compiled_step(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Step, list[GraphReport]]:
    """One step of the model compiled by us; and what the backend reported."""
    torch._dynamo.reset()
    with collect_reports() as collected:
        result = step(torch.compile(model, backend=backend(**options)), model, inputs)
    return result, collected.graphs


def oracle_step(model: nn.Module, inputs: dict[str, Tensor]) -> Step:
    """One eager step in fp64."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("batched_mm")  # the grouped product has no fp64
    return step(exact, exact, inputs)


def prepared(
    name: str, experts: str, dtype: torch.dtype = torch.float32, **sizes: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model in training mode, warmed up, with biases that are not zero."""
    model, inputs = zoo.build(name, experts, **sizes)
    model = model.train().to(dtype)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    warm_up(model, **inputs)
    return model, inputs


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def assert_as_good_as_eager(ours: Step, eager: Step, exact: Step, floor: float) -> None:
    """Errors against fp64 at most twice eager's, for the loss and every gradient."""
    assert relative(ours.loss, exact.loss) <= 2 * relative(eager.loss, exact.loss) + floor
    for name, truth in exact.grads.items():
        if name not in eager.grads or truth.norm() < 1e-7:
            continue
        mine, theirs = relative(ours.grads[name], truth), relative(eager.grads[name], truth)
        assert mine <= 2 * theirs + floor, f"{name}: error {mine:.1e}, eager's {theirs:.1e}"
