"""Weights that a model computes from sharded tensors, computed for this rank's experts alone.

Written by the model for all experts, `quantised.float() * scale` would gather both from all ranks. Where every op on the
way keeps experts apart, the same ops run on the parts that this rank holds.
"""

from __future__ import annotations

import math

from torch import fx

from ultraep_compile.passes.lift.nodes import CASTS, RESHAPES, held, is_call, is_unshard, op_name, tensor

_BY_ELEMENT = CASTS | {"add", "sub", "mul", "truediv", "div", "neg", "clamp"}
_BY_MATRIX = frozenset({"bmm", "matmul", "baddbmm"})


def own_part(graph: fx.Graph, node: fx.Node, ranks: int) -> fx.Node:
    """The node that holds this rank's part [M, ...] of a tensor [E, ...]; the node itself where that cannot be told, and
    then all parts are gathered.
    """
    parts: dict[fx.Node, fx.Node | None] = {}
    part = _part(graph, node, held(node).shape[0], ranks, parts)
    if part is None:
        for made in reversed([p for n, p in parts.items() if p is not None and not is_unshard(n)]):
            graph.erase_node(made)
    return part or node


def _part(
    graph: fx.Graph, node: fx.Node, experts: int, ranks: int, parts: dict[fx.Node, fx.Node | None]
) -> fx.Node | None:
    if is_unshard(node):
        return node.args[0]  # pyright: ignore[reportReturnType]
    if node in parts:
        return parts[node]
    parts[node] = None
    if not is_call(node) or not _keeps_experts_apart(node, experts):
        return None
    operands: dict[fx.Node, fx.Node] = {}
    for operand in node.all_input_nodes:
        mine = _part(graph, operand, experts, ranks, parts) if _by_expert(operand, node, experts) else operand
        if mine is None:
            return None
        operands[operand] = mine
    with graph.inserting_before(node):  # where autocast is what it was
        made = graph.node_copy(node, operands.__getitem__)
    if op_name(node) in RESHAPES:
        sizes = [experts // ranks, *held(node).shape[1:]]
        made.op, made.target, made.args, made.kwargs = "call_method", "reshape", (made.args[0], sizes), {}
    made.meta = {**node.meta, "example_value": held(node).new_empty(experts // ranks, *held(node).shape[1:])}
    parts[node] = made
    return made


def _keeps_experts_apart(node: fx.Node, experts: int) -> bool:
    name, value = op_name(node), tensor(node)
    if value is None or value.ndim == 0 or value.shape[0] != experts or None in map(tensor, node.all_input_nodes):
        return False
    if name in RESHAPES:
        source = held(node.all_input_nodes[0])
        whole_experts = source.shape[0] == experts
        if is_unshard(node.all_input_nodes[0]):  # [E*F, ...] as [E, F, ...], or [G, E/G, ...] as [E, ...]
            in_groups = any(math.prod(source.shape[:depth]) == experts for depth in range(2, source.ndim))
            whole_experts = source.shape[0] % experts == 0 or in_groups
        return len(node.all_input_nodes) == 1 and whole_experts
    if name in _BY_MATRIX:
        return all(held(a).ndim == 3 and held(a).shape[0] == experts for a in node.all_input_nodes)
    return name in _BY_ELEMENT


def _by_expert(operand: fx.Node, node: fx.Node, experts: int) -> bool:
    """Does dim 0 of an operand run over the experts of the result? Smaller tensors are broadcast."""
    value = held(operand)
    return op_name(node) in RESHAPES or (value.ndim == held(node).ndim and value.shape[0] == experts)
