"""The form of a layer's gating, read off recordings by the function that reads it off a compiler's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ultraep_compile.ladder.recording import Call, Recording, record
from ultraep_compile.passes.lift.gating import UNSETTLED, find_gating
from ultraep_compile.passes.lift.nodes import GraphFacts
from ultraep_compile.passes.lift.values import Refusal

Around = Sequence[tuple[nn.Module, Call, str]]
"""Modules around one, innermost first: a call of each, and the module's path inside."""


def gating_of(
    recording: Recording, ids: fx.Node | None, weight: fx.Node | None, experts: int, around: Around = ()
) -> str:
    """The form of the gating that made these ids and weights (see `Site.gating`), in the module itself or in those around it.

    Routers that were recorded as one node are looked into: the call is recorded once more, with nothing left out.
    """
    whole = recording if not recording.leaves else record(recording.owner, recording.call, {})
    found = _read(whole, [None if n is None else _same(whole, recording.values[n]) for n in (ids, weight)], experts)
    for module, call, path in around if found in UNSETTLED else ():
        with contextlib.suppress(Refusal):
            if (inner := _call_inside(module, call, path)) is None:
                continue
            again = record(recording.owner, inner, recording.leaves)
            turns = {n.meta["turn"]: v for n, v in again.values.items() if "turn" in n.meta}
            values = [None if n is None else turns.get(n.meta.get("turn")) for n in (ids, weight)]
            whole = record(module, call, {})
            found = _better(found, _read(whole, [_same(whole, v) for v in values], experts))
            if found not in UNSETTLED:
                break
    return found


def gating_around(experts: int, around: Around) -> str:
    """The same of experts that take ids, or weights for each of them, as an argument of their module."""
    found = "unknown"
    for above, call, path in around:
        with contextlib.suppress(Refusal):
            inner = call if not path else _call_inside(above, call, path)
            others = inner.tensors()[1:] if inner else []
            ids = next((t for t in others if not t.is_floating_point() and t.dtype != torch.bool), None)
            weight = next((t for t in others if t.is_floating_point() and t.shape[-1:] == (experts,)), None)
            whole = record(above, call, {})
            found = _better(found, _read(whole, [_same(whole, ids), _same(whole, weight)], experts))
            if found not in UNSETTLED:
                break
    return found


def _better(one: str, other: str) -> str:
    return one if other == "unknown" else other


def _call_inside(module: nn.Module, call: Call, path: str) -> Call | None:
    """The first call of a module inside of another one's."""
    recording = record(module, call, {module.get_submodule(path): path})
    node = next((n for n in recording.graph.nodes if n.op == "call_module"), None)
    if node is None:
        return None
    value = lambda n: recording.values[n]  # noqa: E731
    return Call(tuple(map_arg(a, value) for a in node.args), {k: map_arg(v, value) for k, v in node.kwargs.items()})


def _read(recording: Recording, sources: list[fx.Node | None], experts: int) -> str:
    ids, weight = sources
    start = weight if ids is None else ids
    if start is None:
        return "unknown"
    for node, value in recording.raw.items():
        node.meta["example_value"] = value
    graph: Any = SimpleNamespace(graph=recording.graph)
    return find_gating(GraphFacts(graph), start, weight, experts).form


def _same(recording: Recording, value: Tensor | None) -> fx.Node | None:
    """The first node that holds the same numbers; for sizes of groups, the ids that were counted."""
    if value is None:
        return None
    if not value.is_floating_point() and value.dim() == 1 and (ids := _counted(recording, value.tolist())) is not None:
        return ids
    for node, other in recording.values.items():
        if node.op != "get_attr" and other.numel() == value.numel() and other.dtype == value.dtype:
            if torch.equal(other.reshape(-1), value.detach().reshape(-1)):
                return node
    return None


def _counted(recording: Recording, sizes: list[int]) -> fx.Node | None:
    """The first node that names each expert as often as the sizes of groups say: Python has counted them."""
    for node, other in recording.values.items():
        if other.dtype in (torch.int64, torch.int32) and other.numel() == sum(sizes) and node.op != "get_attr":
            inside = other.numel() and int(other.min()) >= 0 and int(other.max()) < len(sizes)
            if inside and torch.bincount(other.reshape(-1), minlength=len(sizes)).tolist() == sizes:
                return node
    return None
