"""Derivatives and transforms that balanced experts do not have: left to the model's own code, or refused; never computed wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests import forms, zoo
from tests.balancing import backend, relative
from ultraep_compile import prepare
from ultraep_compile.errors import DerivativeError
from ultraep_compile.ladder.install import lifted_layer
from ultraep_compile.report import collect_reports

Transform = Callable[[nn.Module, Tensor], Tensor]


def _dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Transform] = {
    "vmap": lambda m, x: torch.vmap(lambda y: m(y))(torch.stack([x, x.cos()])),
    "grad": lambda m, x: torch.func.grad(lambda y: m(y).pow(2).mean())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x.cos(),))[1],
    "forward-mode AD": _dual,
    "cond": lambda m, x: torch.cond(x.sum() > 0, m, lambda y: 2 * y, (x,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_layer_inside_of_a_transform(name: str) -> None:
    """It computes what it does in eager, unbalanced, and that is reported; outside, the same layer is balanced."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = zoo.HandMoE(), torch.randn(2, 16, zoo.WIDTH)

    def call(y: Tensor) -> Tensor:
        return TRANSFORMS[name](model, y) + model(y)

    with collect_reports() as collected:
        got = torch.compile(call, backend=backend(ranks=4))(x)
    assert relative(got.detach(), call(x).detach()) < 1e-6
    misses = [m.reason for g in collected.graphs for m in g.misses]
    assert len(misses) == 1 and ("forward-mode AD" if name == "jvp" else name) in misses[0]
    assert sum(len(g.prepared) for g in collected.graphs) == 1


_QUICK = (("jvp", "plain"), ("vmap", "ultraep"))


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        pytest.param(n, i, marks=() if (n, i) in _QUICK else pytest.mark.slow)
        for n in TRANSFORMS
        if n != "cond"
        for i in ("plain", "ultraep")
    ],
)
def test_a_lifted_layer_inside_of_a_transform(name: str, inner: str) -> None:
    """Under any compiler, the module's own forward runs there."""
    torch._dynamo.reset()
    model, inputs = forms.build("DenseGated")
    plain = copy.deepcopy(model)
    prepare(model, inputs)
    assert any(lifted_layer(m) for m in model.modules())
    run = TRANSFORMS[name]
    got = torch.compile(lambda x: run(model, x), backend="aot_eager" if inner == "plain" else backend(ranks=2))(inputs["x"])
    assert relative(got.detach(), run(plain, inputs["x"]).detach()) < 1e-6


def test_forward_mode_through_a_compiled_model_is_refused() -> None:
    """Of a frozen model the compiled code is run on dual tensors, and torch would take all tangents behind a custom op for zero."""
    torch._dynamo.reset()
    model = zoo.HandMoE().requires_grad_(False)
    model.compile(backend=backend(ranks=4))
    x = torch.randn(2, 16, zoo.WIDTH)
    expected = model(x)
    with pytest.raises(DerivativeError, match="no derivative in forward mode"):
        _dual(model, x)
    with forward_ad.dual_level():  # without tangents there is nothing to lose
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("inner", "error"), [("eager", DerivativeError), ("aot_eager", RuntimeError)])
def test_a_second_derivative_is_refused(inner: str, error: type[Exception]) -> None:
    torch._dynamo.reset()
    model = zoo.HandMoE()
    model.compile(backend=backend(ranks=4, inner=inner))
    x = torch.randn(2, 16, zoo.WIDTH, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(error, match=r"second derivative|double backward"):
        gradient.pow(2).sum().backward()
