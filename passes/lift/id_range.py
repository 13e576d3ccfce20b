"""How large can expert ids be? Read off the ops that made them: a router may score more choices than there are experts and
still never give an id beyond the last of them.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ultraep_compile.passes.lift.nodes import CASTS, VIEWS, GraphFacts, functional_target, is_call, op_name, tensor

_PLACES = frozenset({"topk", "sort", "argsort", "max", "min", "argmax", "argmin"})
"""Ops whose ids are places along a dim."""
_FROM = {"ge": 0, "greater_equal": 0, "gt": 1, "greater": 1}
"""Comparisons `x >= c + shift`."""


def id_bound(facts: GraphFacts, node: Any) -> int | None:
    """A number that all ids of an int tensor are below, as small as the ops show it; None if they do not.

    `scores[:, :-1].topk(2)[1]` of a router with 9 choices: 8.
    """
    if isinstance(node, int) and not isinstance(node, bool):
        return node + 1
    if not isinstance(node, fx.Node) or not is_call(node) or _is_overwritten(node):
        return None
    name, first = op_name(node), node.args[0] if node.args else None
    if name == "getitem" and tensor(first) is None:
        return _places(facts, first, 2) if node.args[1] == 1 else None
    if name in ("argmax", "argmin", "argsort"):
        return _places(facts, node, 1)
    if name in CASTS | VIEWS:
        return id_bound(facts, first)
    if name in ("clamp", "clip", "clamp_max"):
        return _least(id_bound(facts, first), _clamped(node))
    if name == "masked_fill" and len(node.args) == 3:
        return _most([_without(facts, first, node.args[1]), id_bound(facts, node.args[2])])
    if name == "where" and len(node.args) == 3:
        return _most([id_bound(facts, node.args[1]), _without(facts, node.args[2], first)])
    if name in ("cat", "stack", "concat") and isinstance(first, (tuple, list)):
        return _most([id_bound(facts, part) for part in first])
    if name in ("remainder", "mod") and isinstance(node.args[1], int) and node.args[1] > 0:
        return node.args[1]
    return None


def _places(facts: GraphFacts, node: Any, dim_at: int) -> int | None:
    """Size of the dim along which an op gives places; (values, places) have the dim one argument later than argmax has it."""
    if not isinstance(node, fx.Node) or op_name(node) not in _PLACES or not isinstance(node.args[0], fx.Node):
        return None
    at = dim_at if op_name(node) == "topk" else 1
    whole = op_name(node) in ("topk", "sort", "argsort")  # these go along the last dim unless told otherwise
    dim = node.kwargs.get("dim", node.args[at] if len(node.args) > at else -1 if whole else None)
    if not isinstance(dim, int) or isinstance(dim, bool) or tensor(node.args[0]) is None:
        return None
    size = facts.shape(node.args[0])[dim]
    return size if isinstance(size, int) else None


def _without(facts: GraphFacts, ids: Any, mask: Any) -> int | None:
    """Bound of those ids that a mask, made by comparing the same ids with a number, does not cover."""
    bound = id_bound(facts, ids)
    if not isinstance(mask, fx.Node) or len(mask.args) < 2 or mask.args[0] is not ids or not isinstance(mask.args[1], int):
        return bound
    name, number = op_name(mask), mask.args[1]
    if name in _FROM:
        return _least(bound, number + _FROM[name])
    return number if name in ("eq", "equal") and bound == number + 1 else bound


def _clamped(node: fx.Node) -> int | None:
    last = node.kwargs.get("max", node.args[-1] if len(node.args) > (1 if op_name(node) == "clamp_max" else 2) else None)
    return last + 1 if isinstance(last, int) else None


def _is_overwritten(node: fx.Node) -> bool:
    return any(
        (functional_target(user)[0] or user.target is operator.setitem) and user.args and user.args[0] is node
        for user in node.users
    )


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _most(bounds: list[int | None]) -> int | None:
    known = [b for b in bounds if b is not None]
    return max(known) if len(known) == len(bounds) and known else None
