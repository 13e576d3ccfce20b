"""What did not run balanced in a step is counted, said once with the reason, and an error where a count was promised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.test_verify import Looped, Net, Stacked, skewed
from ultraep_compile import backend as backend_module
from ultraep_compile import explain, prepare
from ultraep_compile.errors import SiteCountError
from ultraep_compile.report import StepReport, collect_reports


class Counting(Looped):
    """A size that depends on data, which no checkpoint in a graph can have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            best = self.gate(x).amax(-1)
            self.seen += best[best > 0].sum()  # rows chosen by their values: no graph holds that under a checkpoint
        return super().forward(x)


class Partly(nn.Module):
    """One of two layers behind a function that is never compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.shown = Looped(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        return self.shown(x) + self.unseen(x)

    @torch.compiler.disable
    def unseen(self, x: Tensor) -> Tensor:
        return self.hidden(x)


def steps(model: nn.Module, rows: list[int], *, dynamic: bool | None = None, **options: Any) -> tuple[list[StepReport], list[str]]:
    """Reports of the steps and our warnings."""
    torch._dynamo.reset()
    backend_module.warn_once.cache_clear()
    prepare(model, (skewed(32),))
    model.compile(backend="ultraep", options={"ranks": 4, "inner": "eager", **options}, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as caught, collect_reports() as collected:
        warnings.simplefilter("always")
        for n in rows:
            model(skewed(n))
    return collected.steps, [str(w.message) for w in caught if "ultraep" in str(w.message)]


HIDDEN: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "lifted, checkpoint": (lambda: Net(Counting, checkpointed=True), ("layers.0", "layers.1"), "aten.nonzero"),
    "traced, checkpoint": (lambda: Net(Stacked, checkpointed=True), ("layers.0", "layers.1"), "side effect"),
    "disabled": (Partly, ("hidden",), "torch.compiler.disable"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_layers_left_to_eager_mode_are_one_warning_or_an_error(case: str) -> None:
    make, names, reason = HIDDEN[case]
    reports, said = steps(make(), [32, 32])
    assert reports[0].unbalanced == names and reason in reports[0].reason
    assert len(reports[0].balanced) == 2 - len(names)
    assert len(said) == 1 and reason in said[0] and all(n in said[0] for n in names), said
    with pytest.raises(SiteCountError, match=rf"expected 2 MoE layers.*rewrote {2 - len(names)}(?s:.*){names[0]}: .*{reason}"):
        steps(make(), [32], expect_moe_sites=2)


def test_recompile_limit_is_noticed() -> None:
    sizes = [20, 21, 22, 23, 24]
    with torch._dynamo.config.patch(recompile_limit=2):
        reports, said = steps(Stacked(), sizes, dynamic=False)
        assert [len(r.balanced) for r in reports] == [1, 1, 0, 0, 0]
        assert len(said) == 1 and "recompile limit" in said[0] and "dynamic=True" in said[0]
        with pytest.raises(SiteCountError, match="recompile limit"):
            steps(Stacked(), sizes, dynamic=False, expect_moe_sites=1)


def test_graphs_of_one_step_are_counted_together() -> None:
    reports, said = steps(Net(Stacked, broken=True), [32, 32], expect_moe_sites=2)
    assert [len(r.balanced) for r in reports] == [2, 2] and not said
    with pytest.raises(SiteCountError, match=r"expected 1 MoE layers.*rewrote 2"):
        steps(Net(Stacked, broken=True), [32], expect_moe_sites=1)


def test_layers_compiled_one_by_one_are_counted_one_by_one() -> None:
    torch._dynamo.reset()
    model = Net(Looped)
    prepare(model, (skewed(32),))
    for layer in model.layers:
        layer.compile(backend="ultraep", options={"ranks": 4, "inner": "eager", "expect_moe_sites": 1})
    with collect_reports() as collected:
        model(skewed(32))
    assert [len(s.balanced) for s in collected.steps] == [1, 1]


def test_eager_calls_of_a_prepared_model_are_no_steps() -> None:
    model = Net(Looped)
    prepare(model, (skewed(32),))
    with warnings.catch_warnings(), collect_reports() as collected:
        warnings.filterwarnings("error", message="ultraep")
        model(skewed(32))
        checkpoint(model, skewed(32), use_reentrant=False)
        model.compile(backend="ultraep", options={"ranks": 4, "inner": "eager", "expect_moe_sites": 2})
        model(skewed(32))
        with torch.compiler.set_stance("force_eager"):
            model(skewed(32))
    assert [len(s.balanced) for s in collected.steps] == [2]


def test_an_error_of_the_forward_is_not_covered_by_the_count() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.view(7, 7)

    torch._dynamo.reset()
    model = Failing(Stacked)
    model.compile(backend="ultraep", options={"ranks": 4, "inner": "eager", "expect_moe_sites": 5})
    with pytest.raises(Exception) as caught:
        model(skewed(32))
    assert not isinstance(caught.value, SiteCountError)


def test_explain_names_what_hides_a_layer() -> None:
    found = explain(Net(Counting, checkpointed=True), (skewed(32),))
    assert [s.status for s in found.moe_sites] == ["missed", "missed"]
    assert "aten.nonzero" in found.moe_sites[0].reason
