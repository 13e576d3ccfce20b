"""Ops on ids, orders and counts: they decide where rows stand, and vanish from the lifted function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ultraep_compile.passes.lift.nodes import CASTS, held
from ultraep_compile.passes.lift.outside import same_as
from ultraep_compile.passes.lift.rules.table import rule
from ultraep_compile.passes.lift.sizes import same
from ultraep_compile.passes.lift.values import Call, Dim, Kind, Refusal, Value, describe

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt, "eq": operator.eq, "ne": operator.ne,
    "greater_equal": operator.ge, "greater": operator.gt, "less_equal": operator.le, "less": operator.lt,
    "not_equal": operator.ne,
}  # fmt: skip


@rule(*CASTS, "clamp", "clip")
def ids_stay_ids(lift: Lifter, call: Call):
    value = call.args[0]
    if not isinstance(value, Value) or value.kind not in (Kind.IDS, Kind.COUNTS, Kind.OFFSETS, Kind.MASK):
        return None
    if call.name in ("clamp", "clip"):
        low, high = call.arg(1, "min", 0), call.arg(2, "max", expert_count(lift))
        fixed = isinstance(low, int) and isinstance(high, int)
        if value.kind is not Kind.IDS or not fixed or low > 0 or high < expert_count(lift) - 1:
            raise Refusal(f"clamps {describe(value)} to {low}..{high}: changes legal ids")
        lift.legal_ids_assumed = True
    dtype = held(call.node).dtype
    if value.kind is Kind.MASK and dtype != torch.bool:
        raise Refusal("a mask used as data")
    return value.but(dtype=dtype)


@rule("sort", "argsort")
def sort(lift: Lifter, call: Call):
    value = call.args[0]
    if not isinstance(value, Value):
        return None
    if value.kind is Kind.ORDER and call.name == "argsort" and not call.kwargs.get("descending"):
        return value.but(kind=Kind.UNORDER, dims=(Dim.PAIR,))
    if value.kind is not Kind.IDS:
        return None
    if value.dims != (Dim.PAIR,) or call.kwargs.get("descending") or True in call.args[2:]:
        raise Refusal(f"sorts {describe(value)}, expected ids of all pairs in ascending order")
    order = Value(Kind.ORDER, (Dim.SORTED,), value.sizes, torch.int64)
    return order if call.name == "argsort" else (value.but(dims=(Dim.SORTED,)), order)


@rule("histc", "bincount")
def count(lift: Lifter, call: Call):
    value = call.args[0]
    if not isinstance(value, Value) or value.kind is not Kind.IDS:
        return None
    shape = lift.facts.shape(call.node)
    if len(shape) != 1 or not same(shape[0], expert_count(lift)):
        raise Refusal(f"counts ids into {shape} bins, expected one for each of {expert_count(lift)} experts")
    low, high = call.arg(2, "min", 0), call.arg(3, "max", 0)
    if call.name == "histc" and (low != 0 or high not in (expert_count(lift) - 1, expert_count(lift))):
        raise Refusal(f"counts ids in {low}..{high}, expected 0..{expert_count(lift) - 1}")
    return Value(Kind.COUNTS, (Dim.EXPERT,), shape, held(call.node).dtype)


@rule("cumsum")
def offsets(lift: Lifter, call: Call):
    value = call.args[0]
    if isinstance(value, Value) and value.kind is Kind.COUNTS:
        return value.but(kind=Kind.OFFSETS, dtype=held(call.node).dtype)
    return None


@rule(*_COMPARE)
def compare(lift: Lifter, call: Call):
    """A predicate that all legal ids meet, or none, is a constant; any other would tell experts apart."""
    value, bound = call.args[0], call.args[1]
    if not isinstance(value, Value) or value.kind is not Kind.IDS:
        return None
    if not isinstance(bound, int):
        raise Refusal("compares ids with a tensor: a predicate on the expert id")
    met = {_COMPARE[call.name](expert, bound) for expert in range(expert_count(lift))}
    if len(met) != 1:
        raise Refusal(f"a predicate on the expert id ({call.name} {bound}) that tells experts apart")
    lift.legal_ids_assumed = True
    return Value(Kind.MASK, value.dims, value.sizes, torch.bool, truth=met.pop())


@rule("logical_not", "bitwise_not", "invert")
def negate(lift: Lifter, call: Call):
    value = call.args[0]
    return value.but(truth=not value.truth) if isinstance(value, Value) and value.kind is Kind.MASK else None


@rule("floordiv", "floor_divide", "div")
def token_of_pair(lift: Lifter, call: Call):
    value = call.args[0]
    if not isinstance(value, Value) or value.kind is not Kind.ORDER:
        return None
    floors = call.name != "div" or call.kwargs.get("rounding_mode") in ("floor", "trunc")
    if not floors or not same_as(call.args[1], lift.choices):
        raise Refusal(f"divides the sort order by {call.args[1]}, expected k = {lift.choices}")
    return value.but(kind=Kind.TOKEN_OF)


def expert_count(lift: Lifter) -> int:
    experts = lift.sizes.get(Dim.EXPERT)
    if not isinstance(experts, int):
        raise Refusal(f"a number of experts that is not fixed ({experts})")
    return experts
