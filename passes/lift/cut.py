"""Cut a lifted graph in two: the row function, and the model's own combine.

The cut is the first tensor [rows, width] through which everything that depends on rows, ids and parameters
must pass: the output of the last expert op. Weighting and the sum over K stay on the combine side, in the
model's own graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ultraep_compile.passes.lift.lifter import Lifter
from ultraep_compile.passes.lift.values import Dim, Kind, Refusal, Value


@dataclass(frozen=True, slots=True)
class Halves:
    row_function: fx.GraphModule
    combine: fx.GraphModule
    hidden: fx.Node
    weight: fx.Node | None
    uses_weight: bool
    """Does the row function read the routing weight?"""
    params: list[fx.Node]
    consts: list[fx.Node]
    y: Value


def cut(lift: Lifter) -> Halves:
    """Split the lifted graph of a finished interpretation."""
    assert lift.output_value is not None and lift.output_value.node is not None
    end = lift.output_value.node
    needed = _ancestors(end)
    hidden = _only_one(lift.row_sources, needed, "sources of token states")
    weight = _only_one(lift.weights, needed, "routing weights")
    y = _cut_point(lift, needed, end)
    before = _ancestors(y)
    params = [p for p, holder in lift.params.items() if holder in before]
    consts = [c for c, holder in lift.consts.items() if holder in before]
    if hidden is None or not params:
        raise Refusal("the output does not depend on token states and expert parameters")
    rows_in, weight_in = lift.row_sources[hidden], weight and lift.weights[weight]
    uses_weight = weight_in in before
    holders = [rows_in, lift.id_in, *([weight_in] if weight_in and uses_weight else [])]
    holders += [lift.params[p] for p in params] + [lift.consts[c] for c in consts]
    row_function = _row_function(lift, holders, y, before)
    combine = _combine(lift, weight_in, y, end, needed - before)
    return Halves(row_function, combine, hidden, weight, uses_weight, params, consts, lift.values_of[y])


def _only_one(sources: dict[fx.Node, fx.Node], needed: set[fx.Node], what: str) -> fx.Node | None:
    used = [source for source, holder in sources.items() if holder in needed]
    if len(used) > 1:
        raise Refusal(f"{len(used)} {what}: {', '.join(n.name for n in used)}")
    return used[0] if used else None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return seen


def _cut_point(lift: Lifter, needed: set[fx.Node], end: fx.Node) -> fx.Node:
    """The earliest row tensor that no path from rows, ids or parameters to the end avoids."""
    sources = {*lift.row_sources.values(), lift.id_in, *lift.params.values(), *lift.consts.values()}
    tainted = [n for n in lift.graph.nodes if n in needed and n in sources]
    marked = set(tainted)
    for n in lift.graph.nodes:
        if n in needed and n not in marked and any(a in marked for a in n.all_input_nodes):
            tainted.append(n)
            marked.add(n)
    position = {n: i for i, n in enumerate(tainted)}
    last_use = [max([position[u] for u in n.users if u in position], default=len(tainted)) for n in tainted]
    reach = 0
    for i, n in enumerate(tainted):
        value = lift.values_of.get(n)
        if reach <= i and n not in sources and value is not None and _is_row_tensor(value):
            return n
        reach = max(reach, last_use[i])
    raise Refusal("the expert output is nowhere a single tensor [rows, width]")


def _is_row_tensor(value: Value) -> bool:
    return (
        value.kind is Kind.ROWS
        and len(value.dims) == 2
        and value.dims[0] in (Dim.PAIR, Dim.SORTED)
        and not value.dims[1]
    )


def _row_function(lift: Lifter, holders: list[fx.Node], y: fx.Node, body: set[fx.Node]) -> fx.GraphModule:
    """rows [N, D_in], expert_id [N], (weight [N, 1]), params..., consts... -> [N, D_out]: N tokens of one
    choice each.
    """
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {h: graph.placeholder(str(h.target)) for h in holders}
    sized = {lift.size_nodes[Dim.TOKEN], lift.size_nodes[Dim.PAIR], lift.size_nodes[Dim.CHOICE]}
    if sized & body:
        count = graph.call_method("size", (new[holders[0]], 0))
        new |= {
            lift.size_nodes[Dim.TOKEN]: count,
            lift.size_nodes[Dim.PAIR]: count,
            lift.size_nodes[Dim.CHOICE]: 1,
        }
    for n in lift.graph.nodes:
        if n in body and n not in new:
            new[n] = graph.node_copy(n, lambda a: new[a])
    graph.output(new[y])
    return fx.GraphModule(nn.Module(), graph, "RowFunction")


def _combine(lift: Lifter, weight_in: fx.Node | None, y: fx.Node, end: fx.Node, body: set[fx.Node]) -> fx.GraphModule:
    """y [T*K, D_out], weight [T, K], T, K -> the output of the region."""
    graph = fx.Graph()
    new: dict[Any, Any] = {y: graph.placeholder("y"), weight_in: graph.placeholder("weight")}
    for name, dim in (("T", Dim.TOKEN), ("K", Dim.CHOICE)):
        new[lift.size_nodes[dim]] = graph.placeholder(name)
    size = lift.size_nodes[Dim.PAIR]
    for n in lift.graph.nodes:
        if (n in body or (n is size and any(u in body for u in n.users))) and n not in new:
            new[n] = graph.node_copy(n, lambda a: new[a])
    graph.output(new[end])
    return fx.GraphModule(nn.Module(), graph, "Combine")
