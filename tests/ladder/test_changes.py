"""Nothing that Python reads in a lifted forward may change without anybody noticing."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import ultraep_compile
from tests.ladder.changing import CHANGES, FORMS, Asking, Reader, Swapped, difference, set_at, twins
from ultraep_compile.errors import SiteCountError
from ultraep_compile.ladder.install import lifted_layer
from ultraep_compile.ladder.standing import standing_of
from ultraep_compile.preparation import findings_of

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
QUICK = {"attribute", "nested dict", "closure", "hook inside an expert"}
ALIKE = {"dropout's own mode", "frozen", "dtype", "tied", "experts swapped", "weight norm"}
"""Changes that the output does not show, or only by what there was to change."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CHANGES])
def test_a_change_after_compiling_is_noticed(name: str) -> None:
    torch._dynamo.reset()
    change = CHANGES[name]
    plain, ours = twins(Reader(), X)
    assert difference(plain, ours, X) == ""
    before = plain(X).detach()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(plain)
            if not isinstance(change, Swapped):  # of both at once
                change(ours)
            x = X.to(next(plain.parameters()).dtype)
            assert difference(plain, ours, x) == ""
            assert difference(plain, ours, x) == ""
        if name not in ALIKE:
            assert not torch.allclose(before, plain(X)), "a change that changes nothing shows nothing"
    finally:
        if isinstance(change, Swapped):
            change.undo()


QUICK_FORMS = ("experts' dtype", "all experts frozen", "tied", "a shape that nothing computes with")


@pytest.mark.parametrize(
    "name", [n if n in QUICK_FORMS else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]
)
def test_a_change_of_what_parameters_are_is_noticed(name: str) -> None:
    """After the first call, and of a model that was prepared and has not run yet."""
    for runs_before in (True, False) if name not in QUICK_FORMS else (True,):
        torch._dynamo.reset()
        plain, ours = twins(Asking(), X)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if runs_before:
                assert difference(plain, ours, X) == ""
            for model in (plain, ours):
                FORMS[name](model)
            for _ in range(2):
                assert difference(plain, ours, X) == ""


def test_a_state_that_comes_back_uses_its_graph_again(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    plain, ours = twins(Reader(), X, expect_moe_sites=1)
    caplog.set_level(logging.INFO, "ultraep_compile.ladder.standing")
    digests, graphs, standing = set(), [], standing_of(ours)
    assert standing is not None
    for turn in range(6):
        for model in (plain, ours):
            model.temperature = (1.0, 0.3)[turn % 2]
        assert difference(plain, ours, X) == ""
        digests |= {s.reads.digest() for s in standing.states if s.reads.hold()}
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert [n - graphs[0] for n in graphs] == [0, 1, 1, 1, 1, 1]
    assert len(digests) == 2
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == "Reader is lifted anew: temperature was 1.0 and is 0.3"


def test_experts_of_another_dtype_are_balanced_still(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    plain, ours = twins(Asking(), X, expect_moe_sites=1)
    caplog.set_level(logging.INFO, "ultraep_compile.ladder.standing")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ultraep")
        for dtype in (torch.float64, torch.float32, torch.float64):
            for model in (plain, ours):
                model.experts.to(dtype)
            assert difference(plain, ours, X) == ""
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("Asking is lifted anew: experts.0.up.weight.dtype was torch.float32 and is torch.float64")


def test_what_cannot_be_lifted_anew_runs_as_it_is_and_says_why() -> None:
    torch._dynamo.reset()
    plain, ours = twins(Reader(), X)
    assert difference(plain, ours, X) == ""
    for model in (plain, ours):
        model.experts[2].residual = True  # not alike any more
    with pytest.warns(
        UserWarning, match=r"Reader runs unbalanced: experts.2.residual was False and is True since it was prepared"
    ):
        assert difference(plain, ours, X) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert difference(plain, ours, X) == ""


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Asking(), Asking()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_layer_that_fell_back_is_not_counted_and_gives_one_warning() -> None:
    torch._dynamo.reset()
    _, ours = twins(Two(), X)
    _, counting = twins(Two(), X, expect_moe_sites=2)
    counting(X)
    for model in (ours, counting):
        model.get_submodule("first.experts.2").to(torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours(X), ours(X)
        for _ in range(2):
            with pytest.raises(SiteCountError, match=r"rewrote 1(.|\n)*first runs unbalanced: experts.2.up.weight.dtype was"):
                counting(X)
    said = [str(w.message) for w in caught if str(w.message).startswith("ultraep")]
    assert len(said) == 2 and len(set(said)) == 1, "one for each model"
    assert said[0].startswith("ultraep: first runs unbalanced: experts.2.up.weight.dtype was torch.float32 and is torch.float64")
    counting.get_submodule("first.experts.2").to(torch.float32)
    counting(X)


class Counting(Reader):
    """Writes in Python: a counter that steers the forward, or one that nobody reads."""

    def __init__(self, steers: bool) -> None:
        super().__init__()
        self.calls, self.steers, self.seen = 0, steers, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(tuple(x.shape))
        y = super().forward(x)
        return y * 2 if self.steers and self.calls > 3 else y


@pytest.mark.parametrize("steers", [True, False])
def test_what_the_forward_writes_in_python_is_not_lost(steers: bool) -> None:
    torch._dynamo.reset()
    plain = Counting(steers)
    ours = Counting(steers)
    ultraep_compile.prepare(ours, (X,))
    assert lifted_layer(ours) is None
    (finding,) = findings_of(ours)
    assert finding.rung == "missed" and "writes calls in Python (from" in finding.reason
    assert len(ours.seen) == ours.calls == 1, "only the warm-up has run the model's forward for good"
    ours.calls, ours.seen = 0, []
    ours.compile(backend="aot_eager")
    for _ in range(5):
        assert difference(plain, ours, X) == ""
    assert plain.calls == ours.calls and plain.seen == ours.seen


class Around(nn.Module):
    """Sets what the layer reads in the same graph, before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.coldest = Reader(), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.temperature = self.coldest * 0.5
        return self.layer(x)


def test_an_attribute_that_the_model_sets_while_it_runs() -> None:
    torch._dynamo.reset()
    plain, ours = twins(Around(), X)
    for coldest in (1.0, 0.3, 1.0):
        set_at("coldest", coldest)(plain), set_at("coldest", coldest)(ours)
        assert difference(plain, ours, X) == ""
