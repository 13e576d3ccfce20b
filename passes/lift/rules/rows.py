"""Ops on row data that need more than probing: constant masks, and the sum over K by index_add."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ultraep_compile.passes.lift.nodes import held, op_name, tensor
from ultraep_compile.passes.lift.rules.table import rule
from ultraep_compile.passes.lift.sizes import same
from ultraep_compile.passes.lift.values import Call, Dim, Kind, Refusal, Value, describe

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter


@rule("type_as", "to")
def cast_like(lift: Lifter, call: Call):
    """A cast to the dtype of another tensor, which need not be one of the rows."""
    value, like = call.args[0], call.arg(1, "other")
    if not isinstance(value, Value) or value.kind is not Kind.ROWS or tensor(like) is None:
        return None
    return lift.rows(lift.cast(lift.data(value), held(call.node).dtype), value.dims, call.node, value.uses)


@rule("masked_fill")
def masked_fill(lift: Lifter, call: Call):
    value, mask = call.args[0], call.arg(1, "mask")
    if not isinstance(mask, Value) or mask.kind is not Kind.MASK:
        return None
    if mask.truth:
        raise Refusal("a fill that covers all legal ids")
    return lift.known(value)


@rule("where")
def where(lift: Lifter, call: Call):
    mask = call.args[0]
    if not isinstance(mask, Value) or mask.kind is not Kind.MASK or len(call.args) != 3:
        return None
    chosen = lift.known(call.args[1] if mask.truth else call.args[2])
    if chosen.sizes != lift.facts.shape(call.node) or chosen.dtype != getattr(tensor(call.node), "dtype", None):
        raise Refusal(f"where that changes the shape or dtype of {describe(chosen)}")
    return chosen


@rule("index_add", "scatter_add")
def add_to_tokens(lift: Lifter, call: Call):
    """zeros(T, D).index_add(0, token of pair, rows): the sum over K."""
    base, index, source = (
        call.args[0],
        call.arg(2, "index"),
        call.arg(3, "src" if call.name == "scatter_add" else "source"),
    )
    if not isinstance(index, Value) or index.kind is not Kind.TOKEN_OF or not isinstance(source, Value):
        return None
    if call.arg(1, "dim") != 0 or call.kwargs.get("alpha", 1) != 1 or not _is_zeros(base):
        raise Refusal(f"{call.name} into {describe(base)}, expected zeros [tokens, width]")
    wide = call.name == "index_add" or (index.dims[1:] == (None,) and same(index.sizes[1], source.sizes[1]))
    if source.kind is not Kind.ROWS or source.dims != (index.dims[0], None) or not wide:
        raise Refusal(f"{call.name} of {describe(source)}, expected rows in the order of the index")
    if lift.single:
        return lift.note(source.but(dims=(Dim.PAIR, None)))
    sizes = (lift.tokens, lift.choices, source.sizes[1])
    split = lift.as_shape(source, (Dim.TOKEN, Dim.CHOICE, None), sizes)
    total = lift.emit("call_method", "sum", (split.node, 1))
    return lift.rows(total, (Dim.TOKEN, None), base, source.uses)


def _is_zeros(node: object) -> bool:
    return isinstance(node, fx.Node) and op_name(node) in ("zeros", "new_zeros", "zeros_like")
