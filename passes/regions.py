"""What a layer computes from its inputs, cut out of a graph, to run it by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ultraep_compile.ops import looked_at  # noqa: F401  (defines the mark)
from ultraep_compile.passes.lift.nodes import (
    VIEWS,
    functional_target,
    is_buffer,
    is_call,
    is_param,
    op_name,
    tensor,
    upstream,
)

_CONTEXTS = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")


@dataclass(frozen=True, slots=True)
class Region:
    """`module(*inputs, *free)` gives what the outputs hold."""

    inputs: list[fx.Node]
    """Tensors that come from outside of the layer."""
    free: list[fx.Node]
    """Inputs of the graph that it reads: parameters, buffers, sizes."""
    module: fx.GraphModule
    autocasts: list[tuple[Any, ...]]
    """Arguments of the autocast contexts around it."""


def cut(owner: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], is_given: Callable[[fx.Node], bool]) -> Region | None:
    """The nodes between inputs and outputs, in-place writes to what they make included; None where sizes come from elsewhere.

    Args:
        is_given: can this input of the graph be had from outside? Others are made inputs of the region.
    """
    nodes = list(owner.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    inputs = list(dict.fromkeys(inputs))
    below = set(inputs)
    for node in nodes:
        if node not in below and any(a in below for a in node.all_input_nodes):
            below.add(node)
    needed: set[fx.Node] = set()
    free: dict[fx.Node, None] = {}
    todo = [n for n in outputs if n not in inputs]
    if any(n not in below for n in todo):
        return None
    while todo or (todo := [w for w in nodes if w not in needed and _is_wanted(w, needed, free, place)]):
        node = todo.pop()
        if node in needed or node in inputs or node in free:
            continue
        if node.op == "placeholder":
            if is_given(node):
                free[node] = None
            elif tensor(node) is not None:
                inputs.append(node)
            else:
                return None
        elif node.op != "get_attr" and node not in below and not _is_constant(node):
            if tensor(node) is None:
                return None
            inputs.append(node)
        else:
            needed.add(node)
            todo += node.all_input_nodes
    calls = [place[n] for n in needed if is_call(n)]
    if not calls:
        return None
    first, last = min(calls), max(calls)
    around, inside = _contexts(nodes, first, last)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for index, node in enumerate((*inputs, *free)):
        copies[node] = graph.placeholder(f"given_{index}")
    for node in nodes:
        if node in needed or node in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in outputs))
    return Region(inputs, list(free), fx.GraphModule(owner, graph), [tuple(n.args) for n in around])


def _is_constant(node: fx.Node) -> bool:
    """Is this made of parameters and buffers alone?"""
    return all(is_param(n) or is_buffer(n) for n in upstream(node) if n.op == "placeholder")


def _is_wanted(write: fx.Node, needed: set[fx.Node], free: dict[fx.Node, None], place: dict[fx.Node, int]) -> bool:
    """Does a node write into something that the region makes, or into an input that it reads later?"""
    if not is_call(write) or not functional_target(write)[0] or not write.args or not isinstance(write.args[0], fx.Node):
        return False
    root = write.args[0]
    while is_call(root) and (op_name(root) in VIEWS or functional_target(root)[0]) and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    if root in needed and root.op != "get_attr":
        return True
    return root in free and any(place[u] > place[write] for u in root.users if u in needed)


def _contexts(nodes: list[fx.Node], first: int, last: int) -> tuple[list[fx.Node], set[fx.Node]]:
    """Autocast contexts that are open where a region begins; and what opens and closes some inside of it."""
    name = lambda n: getattr(n.target, "__name__", "") if n.op == "call_function" else ""  # noqa: E731
    opened = [n for n in nodes[:first] if name(n) == "_enter_autocast"]
    closed = {n.args[0] for n in nodes[:first] if name(n) == "_exit_autocast"}
    inside = {n for n in nodes[first : last + 1] if name(n) in _CONTEXTS}
    ends = {n.args[0]: n for n in nodes if name(n) == "_exit_autocast"}
    inside |= {ends[n] for n in inside if n in ends}  # pyright: ignore
    inside = {n for n in inside if name(n) != "_exit_autocast" or n.args[0] in inside}
    return [n for n in opened if n not in closed], inside


# ---- layers with marks ------------------------------------------------------------------------------------------------


def take_marks(owner: fx.GraphModule) -> list[tuple[list[fx.Node], list[fx.Node]]]:
    """(inputs, outputs) of every lifted layer in a graph, whose marks are erased."""
    found: list[tuple[list[fx.Node], list[fx.Node]]] = []
    open_: list[list[fx.Node]] = []
    for node in list(owner.graph.nodes):
        if node.target is not torch.ops.ultraep.mark.default:
            continue
        tensors, begins = list(node.args[0]), node.args[1]  # pyright: ignore[reportArgumentType]
        if begins:
            open_.append(tensors)
        elif open_:
            found.append((open_.pop(), tensors))
        owner.graph.erase_node(node)
    return found


