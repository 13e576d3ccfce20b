"""Experts whose forms nothing else recognises, and that are equally loaded in any case: dense mixtures inside larger sums, and
experts that are single rows of tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from ultraep_compile.ladder.groups import Siblings
from ultraep_compile.ladder.recording import Call, Recording, record
from ultraep_compile.ladder.regions import row_count
from ultraep_compile.ladder.routing import CLOSE
from ultraep_compile.passes.lift.nodes import CASTS, VIEWS, op_name

DENSE = "every expert computes every token: the loads are equal by construction, there is nothing to balance"
ROWS = (
    "an expert is one row of each of its tables, no larger than a token: to send a token to its experts, or an expert to its "
    "tokens, costs the same, there is nothing to balance"
)
_MOST = 64
"""Tensors to try as a mixture, or as rows times tokens."""
_HEAVIEST = 16
"""Parameters of a module, over those of experts in it, at most, for the whole of it to be recorded."""
_CHOICES = frozenset({"topk", "argmax", "sort", "argsort", "max"})


@dataclass(frozen=True, slots=True)
class EqualLoads:
    """Experts of which nothing can be balanced."""

    reason: str
    parameters: frozenset[str]
    experts: int | None = None
    choices: int | None = None


def equally_loaded(owner: nn.Module, call: Call, group: Siblings | None, parameters: set[str]) -> EqualLoads | None:
    """What these parameters are, in a call of the module, if they are such experts; `group` holds them, or the module itself."""
    found = row_experts(owner, call, parameters)
    if found and (group is None or found.parameters == parameters):
        return found
    return EqualLoads(DENSE, frozenset(parameters)) if group and dense_mixture(owner, call, group) else None


def is_light(owner: nn.Module, experts: int) -> bool:
    """Can a module that is more than a layer be recorded whole? Not where experts are a small part of what it computes with, nor
    where weights would have to be gathered or made up. Tables of embeddings compute nothing.
    """
    held = [p for m in owner.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
    apart = any(p.is_meta or isinstance(p, DTensor) for p in owner.parameters())
    return not apart and sum(p.numel() for p in held) <= _HEAVIEST * experts


def dense_mixture(owner: nn.Module, call: Call, group: Siblings) -> bool:
    """Are all siblings (of lists: the modules in them) given every token, and weighed for each token by a number that depends on
    what they read? Others of their make may be in the same sums.

    O is such a mixture where dO[t]/dY_e[t] = g[t, e] times one and 0 for other tokens, whatever else O is the sum of: a gradient
    of random direction comes back parallel to it.
    """
    if isinstance(owner.get_submodule(group.container), (nn.ParameterList, nn.ParameterDict)):
        return False  # no module is called
    leaves = {m: p for p, m in owner.named_modules() if _has_like(owner, m, group)}
    members = {p for p in leaves.values() if any(p == m or p.startswith(f"{m}.") for m in _members(group))}
    if not members or len(leaves) < 2:
        return False
    recording = record(owner, call, leaves)
    called = [n for n in recording.graph.nodes if n.op == "call_module" and n.target in leaves.values()]
    calls = {n: {n} for n in called if n in recording.raw}
    if {n.target for n in calls} < members or len({n.target for n in calls}) != len(calls):
        return False
    tokens = {row_count(recording.raw[n]) for n in calls}
    above = _above(recording, calls)
    tried = [n for n, found in above.items() if n not in calls and len(found) > 1 and _is_like(recording, n, next(iter(found)))]
    mixed: set[str] = set()
    for node in tried[:_MOST] if len(tokens) == 1 else ():
        weighed = list(_weighed(recording, node, above[node]))
        mixed |= set(weighed) if len(weighed) > 1 else set()
        if members <= mixed:
            return True
    return False


def row_experts(owner: nn.Module, call: Call, tables: set[str]) -> EqualLoads | None:
    """Experts where a choice of scores gathers rows of two of the tables (parameters [experts, width]), those of one are multiplied
    with the token and the product weighs those of the other; None elsewhere. Memories, which have values and no product with the
    token, codebooks and embeddings are no such experts.
    """
    recording = record(owner, call, {})
    roots = {n: {n} for n in recording.graph.nodes if n.meta.get("parameter") in tables and recording.raw[n].dim() == 2}
    chosen = {n: {n} for n in recording.graph.nodes if op_name(n) in _CHOICES and any(map(_is_state(recording), n.all_input_nodes))}
    chosen = _above(recording, chosen)
    gathers = {}
    for node in recording.graph.nodes:
        given = node.all_input_nodes
        table = next((a for a in given if a in roots), None)
        ids = [a for a in given if a is not table and a in recording.raw and not recording.raw[a].is_floating_point()]
        if table is not None and node in recording.raw and len(ids) == 1 and chosen.get(ids[0]):
            if row_count(recording.raw[node]) == recording.raw[ids[0]].numel():
                gathers[node] = table
    above = _above(recording, {n: {n} for n in gathers})
    for node, table in gathers.items():
        inner = _contracted(recording, node, above)
        others = {n for n, t in gathers.items() if t.meta["parameter"] != table.meta["parameter"]}
        below = _above(recording, {n: {n} for n in inner})
        for out, products in below.items():
            if products and others & above[out] and out in recording.raw and _width(recording, out) == _width(recording, node):
                tokens = next(row_count(recording.raw[x]) for x in inner.values())
                read = frozenset(t.meta["parameter"] for t in gathers.values())
                return EqualLoads(ROWS, read, recording.raw[table].shape[0], row_count(recording.raw[node]) // tokens)
    return None


# ---- dense mixtures -------------------------------------------------------------------------------------------------


def _members(group: Siblings) -> list[str]:
    return [f"{group.container}.{n}" if group.container else n for n in group.names]


def _has_like(owner: nn.Module, module: nn.Module, group: Siblings) -> bool:
    """Is it like the (innermost called) modules of the group's first sibling?"""
    first = owner.get_submodule(_members(group)[0])
    while type(first) in (nn.ModuleList, nn.ModuleDict):
        first = next(first.children())
    return type(module) is type(first) and _outline(module) == _outline(first)


def _outline(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(n, p.shape) for n, p in module.named_parameters()]


def _is_like(recording: Recording, node: fx.Node, made: fx.Node) -> bool:
    """As many rows, as wide."""
    value, like = recording.raw.get(node), recording.raw[made]
    if value is None or value.dim() < 2 or not value.is_floating_point():
        return False
    return value.requires_grad and value.shape[-1] == like.shape[-1] and row_count(value) == row_count(like)


def _weighed(recording: Recording, node: fx.Node, calls: set[fx.Node]) -> Iterator[str]:
    """The modules whose outputs are weighed by a number of each token in this sum."""
    outputs = {n: recording.raw[n] for n in calls if recording.raw[n].requires_grad}
    value = recording.raw[node]
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    grads = torch.autograd.grad((value * direction).sum(), list(outputs.values()), allow_unused=True, create_graph=True)
    flat = direction.reshape(row_count(direction), -1)
    given = {a for call in calls for a in call.all_input_nodes if a in recording.raw}
    read = [recording.raw[a] for a in given if recording.raw[a].requires_grad]
    for call, grad in zip(outputs, grads, strict=True):
        if grad is None or grad.numel() != flat.numel() or not grad.requires_grad:
            continue
        grad = grad.reshape(flat.shape)
        factor = (grad * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True)
        apart = (grad - factor * flat).norm() > 10 * CLOSE.get(value.dtype, 1e-4) * grad.norm()
        if not apart and bool((factor != 0).any()) and read:
            seen = torch.autograd.grad(factor.sum(), read, allow_unused=True, retain_graph=True)
            if any(s is not None for s in seen):
                yield str(call.target)


# ---- rows of tables -------------------------------------------------------------------------------------------------


def _above(recording: Recording, of: dict[fx.Node, set[fx.Node]]) -> dict[fx.Node, set[fx.Node]]:
    """Node -> which of these it was computed from."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in recording.graph.nodes:
        found[node] = set(of.get(node, ())).union(*(found.get(a, set()) for a in node.all_input_nodes))
    return found


def _is_state(recording: Recording) -> Callable[[fx.Node], bool]:
    return lambda n: n in recording.raw and recording.raw[n].is_floating_point() and n.op != "get_attr"


def _width(recording: Recording, node: fx.Node) -> int:
    value = recording.raw[node]
    return value.shape[-1] if value.dim() else 0


def _contracted(
    recording: Recording, gather: fx.Node, above: dict[fx.Node, set[fx.Node]]
) -> dict[fx.Node, fx.Node]:
    """Tensors that hold the products of the gathered rows with the token of each, up to one factor -> the tokens."""
    rows = recording.values[gather]
    rows = rows.reshape(-1, rows.shape[-1]).double()
    found: dict[fx.Node, fx.Node] = {}
    states = [n for n in recording.graph.nodes if not above[n] and _is_state(recording)(n) and _width(recording, n) == rows.shape[1]]
    behind = [n for n in recording.graph.nodes if gather in above[n] and n in recording.raw and op_name(n) not in VIEWS | CASTS]
    for state in states[-_MOST:]:
        tokens = recording.values[state].reshape(-1, rows.shape[1]).double()
        if not len(tokens) or len(rows) % len(tokens):
            continue
        products = (rows.view(len(tokens), -1, rows.shape[1]) * tokens[:, None]).sum(-1)
        for node in behind[:_MOST]:
            if recording.raw[node].numel() == products.numel() and _same_up_to_a_factor(recording.values[node], products):
                found[node] = state
    return found


def _same_up_to_a_factor(value: Tensor, products: Tensor) -> bool:
    """The same numbers, in any order."""
    one, other = (t.detach().double().flatten().sort().values for t in (value, products))
    one, other = (t / t.norm().clamp_min(1e-30) for t in (one, other))
    return float((one - other).norm()) < 10 * CLOSE.get(value.dtype, 1e-4)
