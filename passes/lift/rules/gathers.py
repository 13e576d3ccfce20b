"""Selecting by index: rows by the sort order, tokens by pair, parameters by id; and writing rows back by the order."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import fx

from ultraep_compile.passes.lift.nodes import held, op_name
from ultraep_compile.passes.lift.outside import dispatch, resolve
from ultraep_compile.passes.lift.rules.table import rule
from ultraep_compile.passes.lift.sizes import same
from ultraep_compile.passes.lift.values import Call, Dim, Kind, Refusal, Value, describe

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter

_INDICES = frozenset({Kind.IDS, Kind.ORDER, Kind.UNORDER, Kind.TOKEN_OF})
_REORDERS = {Kind.ORDER: (Dim.PAIR, Dim.SORTED), Kind.UNORDER: (Dim.SORTED, Dim.PAIR)}


@rule("getitem", "index_select")
def gather(lift: Lifter, call: Call):
    source, index = call.args[0], _row_index(call)
    if index is None:
        return None
    if index.kind is Kind.IDS:
        return _take(lift, source, index, call.node)
    by_token = index.kind is Kind.TOKEN_OF or (lift.single and index.kind is Kind.ORDER)
    if by_token and isinstance(source, fx.Node) and not _is_column(lift, source):
        return dispatch(lift, source, index.dims[0] or Dim.PAIR)
    return _reorder(resolve(lift, source) if isinstance(source, fx.Node) else source, index)


def _take(lift: Lifter, source: Any, ids: Value, node: fx.Node) -> Value:
    param = lift.param(source)
    if param is None or param.dims[0] is not Dim.EXPERT:
        what = describe(source)
        raise Refusal(f"selects from {what} by expert id, expected a parameter with a leading expert dim")
    dims, sizes = (*ids.dims, *param.dims[1:]), (*ids.sizes, *param.sizes[1:])
    return Value(Kind.TAKEN, dims, sizes, param.dtype, param.node, frozenset({node}))


def _reorder(source: Any, index: Value) -> Value:
    before, after = _REORDERS.get(index.kind, (None, None))
    if not isinstance(source, Value) or before is None or source.dims[:1] != (before,):
        raise Refusal(f"selects from {describe(source)} by {describe(index)}")
    return source.but(dims=(after, *source.dims[1:]), storage=object())


def _is_column(lift: Lifter, node: fx.Node) -> bool:
    """One number for each token: a routing weight of a top-1 layer."""
    return lift.single and all(same(size, 1) for size in lift.facts.shape(node)[1:])


def _row_index(call: Call) -> Value | None:
    """The tracked tensor that indexes dim 0, where the other dims are taken whole."""
    if call.name == "index_select":
        index = call.arg(2, "index") if call.arg(1, "dim") == 0 else None
    else:
        index = call.args[1]
        if isinstance(index, tuple) and index and all(_is_whole(i) for i in index[1:]):
            index = index[0]
    return index if isinstance(index, Value) and index.kind in _INDICES else None


def _is_whole(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))


@rule("gather")
def gather_rows(lift: Lifter, call: Call):
    """h.gather(0, token of pair, repeated along the width)."""
    source, index = call.args[0], call.arg(2, "index")
    if not isinstance(index, Value) or index.kind is not Kind.TOKEN_OF or not isinstance(source, fx.Node):
        return None
    wide = index.dims[1:] == (None,) and same(index.sizes[1], lift.facts.shape(source)[-1])
    if call.arg(1, "dim") != 0 or not wide:
        raise Refusal(f"gathers by {describe(index)}, expected whole rows")
    return dispatch(lift, source, index.dims[0] or Dim.PAIR)


# ---- writing by index -----------------------------------------------------------------------------------


@rule("empty_like", "zeros_like")
def blank(lift: Lifter, call: Call):
    """Something to write a permutation into."""
    value = call.args[0]
    if not isinstance(value, Value) or value.kind not in (Kind.ORDER, Kind.ROWS):
        return None
    if value.kind is Kind.ROWS and not _written_by_index(call.node):
        return None
    return Value(Kind.BLANK, value.dims, value.sizes, held(call.node).dtype)


def _written_by_index(node: fx.Node) -> bool:
    return any(user.target is operator.setitem and user.args[0] is node for user in node.users)


@rule("setitem")
def write_by_order(lift: Lifter, call: Call):
    """blank[order] = arange(T*K) inverts the order; blank[order] = rows puts rows back in pair order."""
    into, index, source = call.args
    into = _blank_rows(lift, into) if isinstance(into, fx.Node) else into
    if not isinstance(into, Value) or into.kind is not Kind.BLANK or not isinstance(index, Value):
        return None
    if index.kind is not Kind.ORDER:
        raise Refusal(f"writes at {describe(index)}, expected the sort order")
    if isinstance(source, fx.Node) and _is_arange(lift, source):
        return Value(Kind.UNORDER, (Dim.PAIR,), into.sizes, into.dtype)
    source = lift.known(source)
    fits = source.kind is Kind.ROWS and source.dims[:1] == (Dim.SORTED,) and source.dtype == into.dtype
    if not fits or len(source.sizes) != len(into.sizes) or not all(map(same, source.sizes, into.sizes)):
        raise Refusal(f"writes {describe(source)} by the sort order, expected sorted rows")
    return source.but(dims=(Dim.PAIR, *source.dims[1:]), storage=into.storage)


def _blank_rows(lift: Lifter, node: fx.Node) -> Value | None:
    """A new tensor with a row for each pair, all of which the sort order overwrites."""
    is_new = op_name(node) in ("zeros", "empty", "new_zeros", "new_empty")
    if not is_new or not lift.facts.has_shape(node, lift.pairs):
        return None
    shape = lift.facts.shape(node)
    return Value(Kind.BLANK, (Dim.SORTED, *(None,) * (len(shape) - 1)), shape, held(node).dtype)


def _is_arange(lift: Lifter, node: fx.Node) -> bool:
    from_zero = len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0)
    return op_name(node) == "arange" and bool(from_zero) and lift.facts.has_shape(node, lift.pairs)
