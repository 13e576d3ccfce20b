"""What each expert computes, in a recorded forward: its nodes, the tensor it ends in, and that all experts are alike.

Two forms. *Apart*: the weights of single experts are used one by one (a loop). *Together*: a product takes the weights of
all experts at once, one dim of its operands runs over the experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ultraep_compile.passes.lift.nodes import CASTS, VIEWS, op_name
from ultraep_compile.passes.lift.rules.products import PRODUCTS
from ultraep_compile.passes.lift.values import Refusal

if TYPE_CHECKING:
    from ultraep_compile.ladder.recording import Recording

ALL = -1
"""In place of an expert's number: the weights of all experts."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that belongs to one expert (or, with expert = ALL, to all)."""

    role: str
    expert: int


@dataclass(frozen=True, slots=True)
class Region:
    """One expert's computation up to a tensor that everything it does passes through."""

    expert: int
    end: fx.Node
    entries: tuple[fx.Node, ...]
    """Tensors from outside, in the order in which they are met."""
    nodes: frozenset[fx.Node]


@dataclass(slots=True)
class Parts:
    """The per-expert tensors of a recording and what depends on them."""

    parts: dict[fx.Node, Part]
    """Node that holds exactly one expert's part (or all parts, unselected) -> which."""
    experts: int
    holders: dict[str, list[str]]
    """Role -> parameter names: one for each expert, or a single one that holds all."""
    label: dict[fx.Node, frozenset[int]]
    """Node -> experts whose weights it was computed from."""
    views: set[fx.Node]
    """Nodes that are views of per-expert tensors: weights, not data."""
    lead: tuple[int, ...] = ()
    """Of experts together: the leading dims that run over them, one or several (experts in groups)."""

    @property
    def present(self) -> frozenset[int]:
        return frozenset(p.expert for p in self.parts.values())

    def role_of(self, view: fx.Node) -> str:
        while view not in self.parts:
            view = view.all_input_nodes[0]
        return self.parts[view].role


def find_parts(recording: Recording, owned: dict[str, tuple[str, int]], count: int) -> Parts:
    """Per-expert tensors: parameters of siblings, or equal blocks of larger parameters.

    Args:
        owned: parameter -> (role, expert), of sibling modules; empty to look for blocks.
        count: number of siblings.
    """
    parts = {n: Part(*owned[n.meta["parameter"]]) for n in recording.graph.nodes if n.meta.get("parameter") in owned}
    if owned:
        holders: dict[str, list[str]] = {}
        for name, (role, _) in owned.items():
            holders.setdefault(role, []).append(name)
        experts, lead = count, ()
    else:
        parts, experts, lead = _blocks(recording)
        holders = {p.role: [p.role] for p in parts.values()}
    views = set(parts)
    for node in recording.graph.nodes:
        tensor_inputs = node.all_input_nodes
        if node not in views and len(tensor_inputs) == 1 and tensor_inputs[0] in views and _is_view(node):
            views.add(node)
    aside = _of_weights_alone(recording, views)
    label: dict[fx.Node, frozenset[int]] = {}
    for node in recording.graph.nodes:
        found = frozenset() if node in aside else frozenset().union(*(label[a] for a in node.all_input_nodes))
        label[node] = found | ({parts[node].expert} if node in parts else frozenset())
    return Parts(parts, experts, holders, label, views, lead)


def _of_weights_alone(recording: Recording, views: set[fx.Node]) -> set[fx.Node]:
    """What becomes numbers made of weights and no data, as penalties are: nothing that an expert computes for its rows."""
    alone: list[fx.Node] = []
    known = set(views)
    for node in recording.graph.nodes:
        if node not in known and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            alone.append(node)
            known.add(node)
    aside: set[fx.Node] = set()
    for node in reversed(alone):
        is_number = node in recording.raw and recording.raw[node].dim() == 0
        if is_number or (node.users and aside.issuperset(node.users)):
            aside.add(node)
    return aside


def _is_view(node: fx.Node) -> bool:
    name = "getattr" if node.target is getattr else op_name(node)
    return name in VIEWS | CASTS


def _blocks(recording: Recording) -> tuple[dict[fx.Node, Part], int, tuple[int, ...]]:
    """Blocks of parameters that views pick, or stacked parameters that are used whole; and over how many experts, in which dims."""
    roots = {n: n.meta["parameter"] for n in recording.graph.nodes if n.meta.get("parameter")}
    chain = dict(roots)
    blocks: dict[fx.Node, Part] = {}
    sizes: dict[str, int] = {}
    whole: dict[str, fx.Node] = {}
    for node in recording.graph.nodes:
        inputs = node.all_input_nodes
        if node.op in ("get_attr", "placeholder", "output") or not any(a in chain for a in inputs):
            continue
        by_number = all(recording.raw[a].dim() == 0 for a in inputs[1:] if a in recording.raw)
        if not (inputs[0] in chain and by_number and (_is_view(node) or op_name(node) == "index_select")):
            whole |= {chain[a]: _root(a) for a in inputs if a in chain and chain[a] not in whole}
            continue
        name, root = chain[inputs[0]], recording.raw[_root(inputs[0])]
        view = recording.raw.get(node)
        if view is None or view.numel() == root.numel():  # a tuple of views, or all of it
            chain[node] = name
        elif (place := _block_of(view, root)) is not None:
            blocks[node] = Part(name, place)
            sizes[name] = root.numel() // view.numel()
    counts = set(sizes.values())
    if len(counts) > 1 and max(p.expert for p in blocks.values()) < min(counts):
        counts = {min(counts)}  # a parameter has blocks that no expert uses
    if len(counts) > 1:
        common = max(counts, key=list(sizes.values()).count)
        blocks = {n: p for n, p in blocks.items() if sizes[p.role] == common}
        counts = {common}
    if counts:
        return blocks, counts.pop(), ()
    stacked = {name: node for name, node in whole.items() if recording.raw[node].dim() >= 3}
    shapes = [tuple(recording.raw[n].shape) for n in stacked.values()]
    if not shapes:
        raise Refusal("no parameter is used expert by expert, nor one with a dim of experts")
    depth = _expert_dims(recording, chain)
    leads = [s[:depth] for s in shapes]
    lead = max(set(leads), key=leads.count)
    together = {
        n: Part(name, ALL)
        for name, n in whole.items()
        if tuple(recording.raw[n].shape[:depth]) == lead and not _scores_tokens(recording, n, depth)
    }
    return together, math.prod(lead), lead


def _expert_dims(recording: Recording, weights: dict[fx.Node, str]) -> int:
    """How many leading dims of stacked weights run over experts: all but the two of the matrices, where products agree on it."""
    found = {
        recording.raw[a].dim() - 2
        for n in recording.graph.nodes
        if n.op.startswith("call") and op_name(n) in PRODUCTS
        for a in n.all_input_nodes
        if a in weights and a in recording.raw and recording.raw[a].dim() >= 3
    }
    return found.pop() if len(found) == 1 else 1


def _scores_tokens(recording: Recording, weight: fx.Node, depth: int) -> bool:
    """Is [experts, width] the matrix of a router, which gives a number for each expert?"""
    if recording.raw[weight].dim() != depth + 1:
        return False
    return any(op_name(u) in ("linear", "matmul", "mm", "addmm") for n in (weight, *filter(_is_view, weight.users)) for u in n.users)


def _root(node: fx.Node) -> fx.Node:
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return node


def _block_of(view: Tensor, root: Tensor) -> int | None:
    """Which of root's equal blocks a view (or a copy) holds, if it holds one."""
    if view.untyped_storage().data_ptr() != root.untyped_storage().data_ptr():
        if root.numel() % max(view.numel(), 1) or not root.is_contiguous():
            return None
        same = (root.reshape(-1, view.numel()) == view.reshape(1, -1)).all(1).nonzero().flatten()
        return int(same[0]) if len(same) == 1 else None
    extent = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True)) + 1
    offset = view.storage_offset() - root.storage_offset()
    if extent != view.numel() or offset % view.numel() or root.numel() % view.numel() or not root.is_contiguous():
        return None
    return offset // view.numel()


# ---- regions --------------------------------------------------------------------------------------------------------


def calls_of(recording: Recording, parts: Parts, expert: int) -> list[list[fx.Node]]:
    """The nodes that read an expert's weights, one list for each time that the expert is called.

    An expert that is called again reads each of its tensors again: the n-th reading of every tensor belongs to the n-th call. One
    that reads a tensor twice in a call, or tensors unequally often, has one call.
    """
    inside = [n for n in recording.graph.nodes if parts.label[n] == {expert} and n not in parts.views]
    readings: dict[str, list[fx.Node]] = {}
    for node in inside:
        for role in {parts.role_of(a) for a in node.all_input_nodes if a in parts.views}:
            readings.setdefault(role, []).append(node)
    if not readings:
        raise Refusal(f"nothing is computed with the weights of expert {expert}")
    counts = {len(nodes) for nodes in readings.values()}
    calls = [list(dict.fromkeys(nodes)) for nodes in zip(*readings.values(), strict=True)] if len(counts) == 1 else []
    if len(calls) < 2 or len({n for call in calls for n in call}) < sum(map(len, calls)) or _feed_one_another(calls):
        return [list(dict.fromkeys(n for nodes in readings.values() for n in nodes))]
    return calls


def _feed_one_another(calls: list[list[fx.Node]]) -> bool:
    """Does the first call's result reach the weights of the second? Then they are one: a layer that is used twice."""
    seen, todo = set(calls[0]), list(calls[0])
    later = set(calls[1])
    while todo:
        for user in todo.pop().users:
            if user in later:
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def ends_of(recording: Recording, parts: Parts, expert: int) -> list[list[fx.Node]]:
    """For each call of an expert, tensors that all of its computation passes through, nearest first: common dominators, seen
    from the end.
    """
    calls = calls_of(recording, parts, expert)
    inside = {n for n in recording.graph.nodes if parts.label[n] == {expert} and n not in parts.views}
    backwards = nx.DiGraph()
    for node in inside:
        users = list(node.users)
        for user in users:
            backwards.add_edge(user if user in inside else "end", node)
        if not users:
            backwards.add_edge("end", node)
    above = nx.immediate_dominators(backwards, "end")

    def way(node: Any) -> list[Any]:
        out = [node]
        while out[-1] != "end":
            out.append(above[out[-1]])
        return out

    ends = []
    for first in calls:
        ways = [way(node) for node in first]
        common = set.intersection(*map(set, ways))
        ends.append([n for n in ways[0] if n in common and n != "end" and n in recording.raw])
    return ends


def region_to(recording: Recording, parts: Parts, expert: int, end: fx.Node) -> Region:
    """What an expert computes up to `end`."""
    nodes: list[fx.Node] = []
    entries: list[fx.Node] = []

    def visit(node: fx.Node) -> None:
        if node in nodes or node in entries or (node in parts.parts):
            return
        if not parts.label[node]:
            entries.append(node)
            return
        if parts.label[node] != {expert}:
            raise Refusal(f"what expert {expert} computes depends on another expert, at {node.name}")
        for source in node.all_input_nodes:
            visit(source)
        nodes.append(node)

    visit(end)
    casts: dict[fx.Node, list[fx.Node]] = {}
    for node in entries:
        if node.op.startswith("call") and op_name(node) in CASTS and len(node.all_input_nodes) == 1:
            casts.setdefault(node.all_input_nodes[0], []).append(node)
    for source, made in casts.items():
        if len(made) > 1 or source in entries:  # cast for each product: one entry, and each expert casts it
            place = min(entries.index(n) for n in (source, *made) if n in entries)
            entries.insert(place, source)
            entries[:] = [n for i, n in enumerate(entries) if n not in made and (n is not source or i == place)]
            nodes += made
    return Region(expert, end, tuple(entries), frozenset(nodes))


def code_of(recording: Recording, parts: Parts, region: Region, rows: int) -> tuple:
    """A text of what a region computes, equal for experts that compute the same with weights of their own."""
    memo: dict[fx.Node, Any] = {}

    def code(node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return "ROWS" if isinstance(node, int) and node == rows and not isinstance(node, bool) else repr(node)
        if node not in memo:
            if node in parts.parts:
                memo[node] = ("part", parts.parts[node].role)
            elif node in region.entries:
                memo[node] = ("entry", region.entries.index(node))
            else:
                flat: list[Any] = []
                map_aggregate((node.args, node.kwargs), lambda a: flat.append(code(a)))
                memo[node] = (node.op, str(node.target), tuple(flat))
        return memo[node]

    return code(region.end)


def places(recording: Recording, parts: Parts) -> dict[fx.Node, Any]:
    """A name for every node that is the same in another rank's recording: its place from the start; behind the first node of
    an expert, where the data may lead ranks apart, its place from the end; a parameter's path.
    """
    called = [n for n in recording.graph.nodes if n.op != "get_attr"]
    turn = next((i for i, n in enumerate(called) if parts.label[n]), len(called))
    out: dict[fx.Node, Any] = {n: i if i < turn else i - len(called) for i, n in enumerate(called)}
    return out | {n: str(n.target) for n in recording.graph.nodes if n.op == "get_attr"}


def between_exchanges(recording: Recording) -> set[str]:
    """Parameters whose data has come from other ranks and goes back to them: those of experts, however they are held.

    Only where a matrix is among them: attention that exchanges heads has norms there.
    """
    flow = nx.DiGraph((a, n) for n in recording.graph.nodes for a in n.all_input_nodes)
    exchanges = [n for n in recording.graph.nodes if "all_to_all" in n.meta.get("exchange", "") and n in flow]
    after = set().union(*(nx.descendants(flow, n) for n in exchanges))
    before = set().union(*(nx.ancestors(flow, n) for n in exchanges))
    held = {n: n.meta["parameter"] for n in recording.graph.nodes if n.meta.get("parameter")}
    for node in recording.graph.nodes:
        if _is_view(node) and len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in held:
            held[node] = held[node.all_input_nodes[0]]
    inside = [n for n in recording.graph.nodes if n in after and n in before and n not in held]
    read = {a for n in inside for a in n.all_input_nodes if a in held}
    return {held[a] for a in read} if any(recording.raw[a].dim() >= 2 for a in read) else set()


def row_count(tensor: Tensor) -> int:
    return tensor.numel() // max(tensor.shape[-1], 1) if tensor.dim() else 1


def in_order(recording: Recording, wanted: frozenset[fx.Node]) -> Iterator[fx.Node]:
    return (n for n in recording.graph.nodes if n in wanted)


def numbers_read(recording: Recording, held: dict[str, tuple[str, int]]) -> dict[int, int]:
    """How many numbers meet the weights of each sibling."""
    owners = {n: held[n.meta["parameter"]][1] for n in recording.graph.nodes if n.meta.get("parameter") in held}
    found: dict[int, int] = {}
    for node in recording.graph.nodes:
        experts = {owners[a] for a in node.all_input_nodes if a in owners}
        if len(experts) == 1:
            if _is_view(node) and all(a in owners for a in node.all_input_nodes):
                owners[node] = experts.pop()
                continue
            size = sum(recording.raw[a].numel() for a in node.all_input_nodes if a in recording.raw and a not in owners)
            expert = experts.pop()
            found[expert] = found.get(expert, 0) + size
    return found


_SELECTIONS = frozenset({"topk", "argmax", "sort", "argsort", "one_hot", "multinomial", "max"})


def multiplied_after_selection(recording: Recording, parameters: set[str]) -> fx.Node | None:
    """A product of given parameters with data that a selection (top-k, argmax, one-hot) has shaped, if there is one.

    Evidence of routing for a layer that is not understood otherwise.
    """
    flow = nx.DiGraph((a, n) for n in recording.graph.nodes for a in n.all_input_nodes)
    chosen = [n for n in recording.graph.nodes if n.op.startswith("call") and op_name(n) in _SELECTIONS and n in flow]
    after = set().union(*(nx.descendants(flow, n) for n in chosen))
    held = {n for n in recording.graph.nodes if n.meta.get("parameter") in parameters}
    for node in recording.graph.nodes:
        if _is_view(node) and held.issuperset(node.all_input_nodes) and node.all_input_nodes:
            held.add(node)
        data = [a for a in node.all_input_nodes if a not in held]
        if op_name(node) in PRODUCTS and len(data) < len(node.all_input_nodes) and any(a in after for a in data):
            return node
    return None
