"""Where a MoE layer shows: an op that hands rows or weights to experts, and the expert ids it goes by.

Only data flow is used: no module names, no top-k. A finder says which operand of a node was made from expert
ids; from there the walk goes back, through sorting, counting and reshaping, to the ids [tokens, k]
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ultraep_compile.passes.lift.nodes import CASTS, RESHAPES, VIEWS, GraphFacts, is_call, op_name, tensor
from ultraep_compile.passes.lift.rules.products import GROUPED, PRODUCTS

_FROM_IDS = CASTS | RESHAPES | {
    "cumsum", "histc", "bincount", "sort", "argsort", "clamp", "clip", "squeeze", "unsqueeze", "getitem",
}  # fmt: skip

Finder = Callable[[GraphFacts, fx.Node], Any]


def grouped_product(facts: GraphFacts, node: fx.Node) -> Any:
    """The offsets of a grouped matrix product."""
    if op_name(node) in GROUPED:
        return node.kwargs.get("offs", node.args[2] if len(node.args) > 2 else None)
    return None


def parameter_by_id(facts: GraphFacts, node: fx.Node) -> Any:
    """An int tensor that selects along dim 0 of a parameter of 2 or more dims."""
    if not node.args or facts.param_root(node.args[0]) is None:
        return None
    return _index_of(node)


def _index_of(node: fx.Node) -> Any:
    if op_name(node) not in ("getitem", "index_select") or len(node.args) < 2:
        return None
    index = node.kwargs.get("index", node.args[-1])
    index = index[0] if isinstance(index, tuple) and index else index
    value = tensor(index)
    return index if value is not None and not value.is_floating_point() and value.ndim >= 1 else None


def given_by_id(facts: GraphFacts, node: fx.Node) -> fx.Node | None:
    """The ids that select matrices from an input of the graph that is no parameter; None for any other node."""
    source = node.args[0] if is_call(node) and node.args else None
    if not isinstance(source, fx.Node) or source.op != "placeholder" or facts.param_root(source) is not None:
        return None
    value = tensor(source)
    if value is None or value.ndim < 3 or not value.is_floating_point():
        return None
    return ids_behind(facts, _index_of(node))


FINDERS: list[Finder] = [grouped_product, parameter_by_id]


def ids_behind(facts: GraphFacts, node: Any) -> fx.Node | None:
    """The ids that an index, order or offsets tensor was made from: the first int tensor of 2 or more dims on
    the way back.
    """
    while isinstance(node, fx.Node):
        value = tensor(node)
        if value is not None and value.ndim >= 2 and not value.is_floating_point():
            return node
        source = node.args[0] if is_call(node) and node.args else None
        onward = op_name(node) in _FROM_IDS and isinstance(source, fx.Node)
        if onward and op_name(node) == "getitem" and tensor(source) is None:
            onward = op_name(source) in ("sort",)  # type: ignore[arg-type]
        if not onward:
            return node if value is not None and value.ndim == 1 and not value.is_floating_point() else None
        node = source
    return None


def find_anchors(facts: GraphFacts) -> dict[fx.Node, list[fx.Node]]:
    """ids -> the nodes that go by them, in graph order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in facts.order:
        if not is_call(node):
            continue
        for finder in FINDERS:
            if (start := finder(facts, node)) is not None:
                ids = ids_behind(facts, start)
                if ids is not None:
                    found.setdefault(ids, []).append(node)
                break
    return found


def anchor_params(facts: GraphFacts, anchor: fx.Node) -> list[fx.Node]:
    """The parameter operands of an anchor, views included."""
    return [a for a in anchor.all_input_nodes if facts.param_root(a) is not None]


def is_weighty(facts: GraphFacts, anchor: fx.Node) -> bool:
    """Does an anchor alone suggest experts? Rows of a table (an embedding, a codebook) do not, matrices do."""
    return any(len(facts.shape(a)) >= 3 for a in anchor_params(facts, anchor)) or op_name(anchor) in GROUPED


def feeds_product(anchor: fx.Node) -> bool:
    """Is what an anchor selects multiplied with something? Tables of positions and the like are not."""
    if op_name(anchor) in GROUPED:
        return True
    todo, seen = list(anchor.users), set()
    while todo:
        node = todo.pop()
        if op_name(node) in PRODUCTS:
            return True
        if node not in seen and is_call(node) and op_name(node) in VIEWS | CASTS:
            seen.add(node)
            todo += node.users
    return False
