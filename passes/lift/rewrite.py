"""Replace the region of a site in the user's graph."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ultraep_compile.passes.lift.nodes import draws_random, example, functional_target, held, is_call
from ultraep_compile.passes.lift.site import Site


def replace_site(gm: fx.GraphModule, site: Site, make_rows: Callable[[fx.Graph, Site], fx.Node]) -> list[fx.Node]:
    """Put new expert rows and the model's own combine in the place of a site's region.

    Args:
        make_rows: inserts nodes at the current point of the graph; returns the node with y [T*K, D_out] in
          pair order.
    Returns: nodes of the region that stay because something outside reads them. The caller recompiles `gm`.
    """
    graph = gm.graph
    moved: dict[fx.Node, fx.Node] = gm.meta.setdefault(_MOVED, {})
    site = _with_moved_sources(site, moved)
    region = set(site.region)
    with graph.inserting_before(site.output):
        site = _with_flat_pairs(graph, site)
        y = make_rows(graph, site)
        new = _inline_combine(graph, site, y)
    new.meta = dict(site.output.meta)
    moved |= dict.fromkeys(_redirect(site, new, region), new)
    return _erase(graph, site)


_MOVED = "ultraep_moved"
"""Key in the graph module's meta: node that held the output of a replaced site -> node that holds it now."""


def where_now(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that holds the output of a replaced site."""
    moved: dict[fx.Node, fx.Node] = gm.meta.get(_MOVED, {})
    while node in moved:
        node = moved[node]
    return node


def _with_moved_sources(site: Site, moved: dict[fx.Node, fx.Node]) -> Site:
    """A site found before another was replaced may read the other's output."""

    def now(node: fx.Node) -> fx.Node:
        while node in moved:
            node = moved[node]
        return node

    return dataclasses.replace(
        site,
        hidden=now(site.hidden),
        ids=now(site.ids),
        weight=site.weight and now(site.weight),
        scores=site.scores and now(site.scores),
        consts=[now(c) for c in site.consts],
    )


def _with_flat_pairs(graph: fx.Graph, site: Site) -> Site:
    """The site with ids and weights [T, K], whatever leading dims they have in the model."""
    changed = {"ids": _flat_pairs(graph, site, site.ids)}
    if site.weight is not None and held(site.weight).ndim > 2 and held(site.weight).shape[-1] == site.top_k:
        changed["weight"] = _flat_pairs(graph, site, site.weight)
    return dataclasses.replace(site, **changed)


def _flat_pairs(graph: fx.Graph, site: Site, node: fx.Node) -> fx.Node:
    like = held(node)
    if like.ndim == 2 and not isinstance(like.shape[1], torch.SymInt) and like.shape[1] == site.top_k:
        return node
    flat = graph.call_method("reshape", (node, -1, site.top_k))
    counted = like.shape if site.top_k == 1 else like.shape[:-1]
    tokens = math.prod(counted)  # of SymInts, too: no guard is added
    flat.meta = {**site.output.meta, "example_value": like.new_empty(tokens, site.top_k)}
    return flat


def _inline_combine(graph: fx.Graph, site: Site, y: fx.Node) -> fx.Node:
    """Copy the combine behind y. Sizes that are fixed are written as numbers."""
    meta = {k: site.output.meta[k] for k in ("nn_module_stack", "stack_trace") if k in site.output.meta}
    bound: dict[str, Any] = {"y": y}
    wanted = {n.target for n in site.combine.graph.nodes if n.op == "placeholder" and n.users}
    if "weight" in wanted:
        assert site.weight is not None
        bound["weight"] = site.weight
    for name, dim in (("T", 0), ("K", 1)):
        if name in wanted:
            size = held(site.ids).shape[dim]
            fixed = not isinstance(size, torch.SymInt) or size.node.expr.is_Integer
            bound[name] = int(size) if fixed else graph.call_method("size", (site.ids, dim))
    env: dict[fx.Node, Any] = {}
    for node in site.combine.graph.nodes:
        if node.op == "placeholder":
            env[node] = bound.get(str(node.target))
        elif node.op == "output":
            return env[node.args[0]]
        elif node.target is operator.mul and all(isinstance(env.get(a, a), int) for a in node.args):
            env[node] = env.get(node.args[0], node.args[0]) * env.get(node.args[1], node.args[1])
        else:
            env[node] = graph.node_copy(node, lambda a: env[a])
            env[node].meta = dict(meta)
    raise AssertionError("combine has no output")


def _redirect(site: Site, new: fx.Node, region: set[fx.Node]) -> list[fx.Node]:
    """Whoever read the output reads the new node; so do readers of a tensor that the output was written into.

    Returns: the nodes that are not to be read any more.
    """
    site.output.replace_all_uses_with(new, lambda user: user not in region)
    if functional_target(site.output)[0]:
        written = site.output.args[0]
        assert isinstance(written, fx.Node)
        order = {n: i for i, n in enumerate(site.output.graph.nodes)}
        after = order[site.output]
        written.replace_all_uses_with(new, lambda user: user not in region and order[user] > after)
        return [site.output, written]
    return [site.output]


def _erase(graph: fx.Graph, site: Site) -> list[fx.Node]:
    """Erase the region and what only fed it.

    Never `Graph.eliminate_dead_code`: it takes in-place calls with unused results for dead, here and in
    subgraphs.
    """
    kept = _still_read(site)
    feeders: set[fx.Node] = set()
    for node in reversed(site.region):
        if node not in kept:
            feeders.update(node.all_input_nodes)
            for user in [u for u in node.users if example(u) is None or not _is_tensor_like(u)]:
                if not user.users and is_call(user):  # a size that was read and is no longer used
                    graph.erase_node(user)
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node in feeders and not node.users and is_call(node) and not _has_effect(node):
            feeders.update(node.all_input_nodes)
            graph.erase_node(node)
    return [n for n in site.region if n in kept]


def _still_read(site: Site) -> set[fx.Node]:
    """Region nodes with readers outside, and all that they need, in-place writes to them included."""
    region = set(site.region)

    def reads_outside(node: fx.Node) -> bool:
        return any(
            u not in region and (u.users or _has_effect(u) or u.op == "output" or _is_tensor_like(u))
            for u in node.users
        )

    todo = [n for n in site.region if reads_outside(n)]
    kept: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in kept:
            continue
        kept.add(node)
        todo += [a for a in node.all_input_nodes if a in region]
        todo += [u for u in node.users if u in region and functional_target(u)[0] and u.args[0] is node]
    return kept


def _is_tensor_like(node: fx.Node) -> bool:
    value = example(node)
    return isinstance(value, (torch.Tensor, tuple, list))


def _has_effect(node: fx.Node) -> bool:
    """Must a node stay though nobody reads it? In-place writes, and draws from a generator that others share."""
    return functional_target(node)[0] or draws_random(node)
