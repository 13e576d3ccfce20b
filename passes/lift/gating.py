"""How ids were chosen: the router's scores behind them, and the form of gating between. Evidence, never a
condition.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ultraep_compile.passes.lift.nodes import GraphFacts, is_buffer, is_call, is_param, op_name, tensor
from ultraep_compile.passes.lift.rules.products import PRODUCTS
from ultraep_compile.passes.lift.sizes import Size, product, same

_SELECTIONS = frozenset({"topk", "sort", "argsort", "max", "argmax", "min", "argmin"})
UNSETTLED = ("unknown", "given")
"""Forms that say that the router was not seen."""
_FURTHEST = 300
"""Nodes to look back over at most."""


@dataclass(frozen=True, slots=True)
class Gating:
    form: str
    scores: fx.Node | None


def find_gating(facts: GraphFacts, ids: fx.Node, weight: fx.Node | None, experts: int) -> Gating:
    """Walk back from the ids to the latest product [tokens, >= experts], and name what lies between."""
    shape = facts.shape(ids)
    tokens = (product(shape[:-1]), product(shape))  # the last dim of the ids may be the choices or not
    scores, between = _walk_back(facts, [ids], tokens, experts)
    if scores is None:
        if levels := _levels(facts, between, experts):
            beyond = facts.order[levels[0]]
            return Gating(_form(facts, [n for n in between if facts.order[n] > beyond], set(), experts, levels=len(levels)), None)
        if any(op_name(n) in _SELECTIONS for n in between):
            return Gating("unknown", None)
        if any(_reads_table(facts, n) for n in between):
            return Gating("table", None)
        return Gating("unknown" if any(op_name(n) in PRODUCTS for n in between) else "given", None)
    weighing: Iterable[fx.Node] = ()
    if weight is not None:
        weighing = _walk_back(facts, [weight], tokens, experts, stop=scores)[1]
    return Gating(_form(facts, between, set(weighing), experts), scores)


def _walk_back(
    facts: GraphFacts, start: list[fx.Node], tokens: Iterable[Size], experts: int, stop: fx.Node | None = None
) -> tuple[fx.Node | None, list[fx.Node]]:
    """(latest product that looks like scores, or `stop`; the nodes after it that lead to `start`)."""
    queue = [(-facts.order[n], n) for n in start]
    seen, path = set(start), []
    while queue and len(path) < _FURTHEST:
        _, node = heapq.heappop(queue)
        if node is stop or (stop is None and _is_scores(facts, node, tokens, experts)):
            return node, path
        path.append(node)
        for source in node.all_input_nodes:
            if source not in seen and is_call(source):
                seen.add(source)
                heapq.heappush(queue, (-facts.order[source], source))
    return None, path


def _reads_table(facts: GraphFacts, node: fx.Node) -> bool:
    """Does a node select from something that the model holds?"""
    table = node.args[1] if op_name(node) == "embedding" and len(node.args) > 1 else node.args[0] if node.args else None
    return op_name(node) in ("getitem", "index_select", "embedding", "gather", "take") and table in facts.held_by_modules


def _is_scores(facts: GraphFacts, node: fx.Node, tokens: Iterable[Size], experts: int) -> bool:
    value = tensor(node)
    if op_name(node) not in PRODUCTS | {"cdist"} or value is None or value.ndim < 2 or not value.is_floating_point():
        return False
    shape = facts.shape(node)
    wide = isinstance(shape[-1], int) and shape[-1] >= experts
    rows = product(shape[:-1])
    return wide and any(same(rows, count) or _divides(rows, count) for count in tokens)


def _levels(facts: GraphFacts, between: list[fx.Node], experts: int) -> list[fx.Node]:
    """Products of a router in several levels, groups first and then experts in a group: what is chosen by each, in graph order."""
    products = [n for n in between if op_name(n) in PRODUCTS and tensor(n) is not None and facts.shape(n)]
    sizes = [facts.shape(n)[-1] for n in products]
    if len(products) < 2 or not all(isinstance(s, int) and s > 1 for s in sizes):
        return []
    return sorted(products, key=facts.order.__getitem__) if product(tuple(sizes)) >= experts else []


def _divides(rows: Size, pairs: Size) -> bool:
    """Ids may stand in a row of their own for each choice of a token."""
    return isinstance(rows, int) and isinstance(pairs, int) and rows > 1 and pairs % rows == 0


def _form(facts: GraphFacts, between: list[fx.Node], weighing: set[fx.Node], experts: int, levels: int = 1) -> str:
    """`between`: the nodes from the scores to the ids, latest first; `weighing`: those from the scores to the
    weights; `levels`: of a router that chooses groups, and experts in them.
    """
    names = [op_name(n) for n in between]
    running = [n for n in {*between, *weighing} if op_name(n) == "cumsum"]
    if any(_counts_places(n, {*between, *weighing}) for n in running):
        return "capacity"
    if any(op_name(n) in ("sort", "argsort") for n in between) and running:
        return "top-p"
    selections = [n for n in between if op_name(n) == "topk"]
    before = _upstream([n for n in between if op_name(n) in _SELECTIONS], set(between))
    squash = next((name for name in ("sigmoid", "softmax") if name in map(op_name, before)), None)
    if len(selections) > levels:
        return "group-limited"
    if not selections:
        return "argmax" if any(name in _SELECTIONS for name in names) else "unknown"
    if squash == "sigmoid":
        return "sigmoid-bias-topk" if _adds_bias(facts, between, experts) else "sigmoid-topk"
    if squash == "softmax":
        return "softmax-topk"
    after = [op_name(n) for n in {*weighing, *between} - before]
    if "softmax" in after:
        return "topk-softmax"
    return "topk-sigmoid" if "sigmoid" in after else "topk"


_MARKS = frozenset({"one_hot", "eq", "scatter"})


def _counts_places(running: fx.Node, path: set[fx.Node]) -> bool:
    """Does a running sum count choices, so that each has a place in its expert's buffer? (One of probabilities does not.)"""
    return any(op_name(n) in _MARKS for n in _upstream([running], path))


def _upstream(of: list[fx.Node], path: set[fx.Node]) -> set[fx.Node]:
    """What nodes are computed from, as far as it is among those of `path`."""
    todo, seen = [a for n in of for a in n.all_input_nodes], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in path and node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


def _adds_bias(facts: GraphFacts, between: list[fx.Node], experts: int) -> bool:
    """Is a vector of one entry per expert, not made from the scores, added before the selection?"""
    chain = set(between)
    for node in between:
        if op_name(node) in ("add", "sub"):
            for operand in node.all_input_nodes:
                shape = facts.shape(operand) if tensor(operand) is not None else ()
                free = operand not in chain or is_param(operand) or is_buffer(operand) or facts.param_root(operand)
                if free and isinstance(tensor(operand), torch.Tensor) and shape and product(shape) != 1:
                    return True
    return False
