"""Experts that a module's own forward already calls as one op: `ladder` put it there, with the row function known."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ultraep_compile.ops.experts import site_of
from ultraep_compile.passes.lift.gating import find_gating
from ultraep_compile.passes.lift.nodes import GraphFacts, held, module_path
from ultraep_compile.passes.lift.site import Site


@dataclass(frozen=True, slots=True)
class LiftedExperts:
    """The experts of one module as a row function."""

    row_function: fx.GraphModule
    experts: int
    uses_weight: bool
    source: str
    """Source line of the experts in the module that was lifted."""
    gating: str = "unknown"
    """Form of the gating, as recorded; used where the graph does not show it."""
    place: str = ""
    """Module that holds the experts."""
    python_state: dict[str, str] = field(default_factory=dict)
    """What the forward read in Python that a compiled graph has fixed, in words that ranks can compare."""


_by_key: dict[str, LiftedExperts] = {}


def register_lifted(key: str, lifted: LiftedExperts) -> None:
    _by_key[key] = lifted


def called_sites(facts: GraphFacts) -> Iterator[Site]:
    """A site for every call of lifted experts, in graph order. Nothing is analysed again."""
    for node in facts.nodes:
        if node.target is not torch.ops.ultraep.experts.default or node.args[7] not in _by_key:
            continue
        lifted = _by_key[str(node.args[7])]
        hidden, weight, ids, _, counts, params, consts, _ = node.args
        assert isinstance(ids, fx.Node) and isinstance(hidden, fx.Node) and isinstance(counts, fx.Node)
        parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        output = parts.pop(0)
        assert not any(p.users for p in parts.values()), "what is saved for backward is read by nobody else"
        gating = find_gating(facts, ids, weight if isinstance(weight, fx.Node) else None, lifted.experts)
        y = held(output)
        own = site_of(str(node.args[7]))
        yield Site(
            name=module_path(node) or lifted.place or node.name,
            source=lifted.source,
            experts=lifted.experts,
            top_k=int(held(ids).shape[1]),
            gating=gating.form if lifted.gating == "unknown" else lifted.gating,
            hidden=hidden,
            ids=ids,
            weight=weight if isinstance(weight, fx.Node) else None,
            scores=gating.scores,
            params=list(params),  # type: ignore[arg-type]
            consts=list(consts),  # type: ignore[arg-type]
            row_function=lifted.row_function,
            uses_weight=lifted.uses_weight,
            combine=_identity(),
            width=int(y.shape[-1]),
            dtype=y.dtype,
            output=output,
            region=[counts, node, output, *parts.values()],
            anchors=[node],
            divided=(own.group, own.layout.ranks) if own.group else None,
            python_state=lifted.python_state,
        )


def is_divided(node: fx.Node) -> bool:
    """Is this a call of lifted experts that the model divides over ranks by itself?"""
    return node.target is torch.ops.ultraep.experts.default and bool(site_of(str(node.args[7])).group)


def _identity() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.placeholder("y"))
    return fx.GraphModule(nn.Module(), graph, "Combine")
