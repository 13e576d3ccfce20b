"""Divided tensors that a graph only takes this rank's part of, inside an activation checkpoint: the part is taken before.

AOTAutograd of torch 2.13 cannot save a distributed tensor's device mesh for the backward of a graph that recomputes; a graph
without distributed tensors has none. Gradients are the same: the part is a view that autograd follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.distributed.tensor import DTensor

from ultraep_compile.passes.pipeline import bodies_run_by

Compiled = Callable[..., Any]


def take_parts(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[list[Any], Callable[[Compiled], Compiled]]:
    """Change a graph in place so that it is given parts; returns its new example inputs, and what wraps its compiled form."""
    inputs, places = list(example_inputs), []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if not isinstance(node.meta.get("example_value"), DTensor):
            continue
        uses = _uses(gm, node)
        if uses is None or all(owner is gm for owner, _ in uses):  # read by something else; or in no body at all
            continue
        for each in _chain(gm, node):
            each.meta["example_value"] = each.meta["example_value"].to_local()
        for owner, read in uses:
            read.replace_all_uses_with(read.args[0])  # pyright: ignore[reportArgumentType]
            owner.graph.erase_node(read)
        inputs[place] = inputs[place].to_local()
        places.append(place)
    if not places:
        return inputs, lambda compiled: compiled
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()

    def wrapped(compiled: Compiled) -> Compiled:
        return lambda *args: compiled(*(a.to_local() if i in places else a for i, a in enumerate(args)))

    return inputs, wrapped


def _uses(gm: fx.GraphModule, node: fx.Node) -> list[tuple[fx.GraphModule, fx.Node]] | None:
    """Where a tensor's own part is read, bodies included; None if anything else is done with it."""
    found: list[tuple[fx.GraphModule, fx.Node]] = []
    for user in node.users:
        if user.op == "call_method" and user.target == "to_local" and len(user.args) == 1 and not user.kwargs:
            found.append((gm, user))
            continue
        inner = _inside(gm, user, node)
        if inner is None:
            return None
        for body, placeholder in inner:
            deeper = _uses(body, placeholder)
            if deeper is None:
                return None
            found += deeper
    return found


def _chain(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """A placeholder, and those of the bodies that it is passed to."""
    inner = [pair for user in node.users for pair in _inside(gm, user, node) or ()]
    return [node, *(deeper for body, placeholder in inner for deeper in _chain(body, placeholder))]


def _inside(gm: fx.GraphModule, call: fx.Node, node: fx.Node) -> list[tuple[fx.GraphModule, fx.Node]] | None:
    """The placeholders under which a body that is called knows a node; None if nothing of the kind is called."""
    bodies = bodies_run_by(gm, call)
    if len(bodies) != 1:
        return None
    placeholders = bodies[0].graph.find_nodes(op="placeholder")
    given = call.args[len(call.args) - len(placeholders) :]
    return [(bodies[0], p) for p, a in zip(placeholders, given, strict=True) if a is node]
