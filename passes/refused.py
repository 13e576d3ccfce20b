"""Weights whose layers stay as they are although a graph shows them: what a graph does not show speaks against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from ultraep_compile.passes.lift.nodes import upstream

_reasons: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse(weights: Iterable[Tensor], reason: str) -> None:
    for weight in weights:
        _reasons[weight] = reason


def allow(weights: Iterable[Tensor]) -> None:
    """Forget what an earlier look at the model said of these."""
    for weight in weights:
        _reasons.pop(weight, None)


def refused_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, str]:
    """Placeholders of a graph that stand for refused weights, and why they are."""
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = zip(places, example_inputs, strict=True)
    return {n: _reasons[t] for n, t in given if isinstance(t, Tensor) and t in _reasons}


def refusal(params: Sequence[fx.Node], refused: dict[fx.Node, str]) -> str | None:
    """Why a site with these parameters stays as it is; None for most."""
    return next((refused[n] for p in params for n in upstream(p) if n in refused), None) if refused else None
