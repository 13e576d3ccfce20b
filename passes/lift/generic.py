"""Any op without a rule: label its result by probing, and copy it into the lifted graph."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ultraep_compile.passes.lift.nodes import CASTS, VIEWS, example
from ultraep_compile.passes.lift.outside import with_sides
from ultraep_compile.passes.lift.probe import Probed, check_dims, check_labels, probe
from ultraep_compile.passes.lift.values import STRUCTURE_ONLY, Call, Dim, Kind, Refusal, Value, describe, flat

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter


def generic(lift: Lifter, call: Call) -> Value | tuple[Value, ...]:
    """Label an op's result by probing it and copy the op into the lifted graph."""
    if call.target is None:
        raise Refusal("writes in place in a way that is not understood")
    call = with_sides(lift, call)
    values = [v for v in flat((call.args, list(call.kwargs.values()))) if isinstance(v, Value)]
    kinds = {v.kind for v in values if v.kind is not Kind.ROWS or "const" not in v.uses}
    if kinds & STRUCTURE_ONLY:
        if len(values) > 1 or call.name not in VIEWS:
            raise Refusal(f"computes with {describe(values[0])}")
    elif not kinds <= {Kind.ROWS, Kind.TAKEN, Kind.PARAM}:
        raise Refusal(f"computes with {describe(values[0])}")
    elif Kind.PARAM in kinds and (len(values) > 1 or call.name not in VIEWS | CASTS):
        raise Refusal("combines a per-expert parameter that was not selected by id")
    check_dims(call.name, values, call.args, call.kwargs)
    result = _copy(lift, call, values)
    dtype = values[0].dtype
    if call.in_place and isinstance(result, Value) and result.node is not None and result.dtype != dtype:
        result = lift.note(result.but(node=lift.cast(result.node, dtype), dtype=dtype))
    return result


def _copy(lift: Lifter, call: Call, values: list[Value]) -> Value | tuple[Value, ...]:
    kind = values[0].kind
    if kind is Kind.TAKEN and not (len(values) == 1 and _is_view_of_each(call, values[0])):
        kind = Kind.ROWS
    op = "call_method" if isinstance(call.target, str) else "call_function"
    call, probed = _probed(lift, call, op, values)
    labelled = [v for v in values if "const" not in v.uses]
    uses = frozenset().union(*(v.uses for v in values)) - {"const"}
    node = None
    if kind not in STRUCTURE_ONLY:
        take = (lambda v: v.node) if kind in (Kind.TAKEN, Kind.PARAM) else lift.data
        swap = lambda a: take(a) if isinstance(a, Value) else a  # noqa: E731
        node = lift.emit(op, call.target, map_aggregate(call.args, swap), map_aggregate(call.kwargs, swap))

    def wrap(result: Probed, node: fx.Node | None) -> Value:
        check_labels(call.name, labelled, result)
        sizes = tuple(lift.sizes[d] if d else s for d, s in zip(result.dims, result.sizes, strict=True))
        value = Value(kind, result.dims, sizes, result.dtype, node, uses, values[0].truth)
        return lift.note(value if result.alias is None else value.but(storage=values[result.alias].storage))

    if isinstance(probed, Probed):
        return wrap(probed, node)
    parts = [node and lift.graph.call_function(operator.getitem, (node, i)) for i in range(len(probed))]
    return tuple(wrap(p, n) for p, n in zip(probed, parts, strict=True))


def _probed(lift: Lifter, call: Call, op: str, values: list[Value]) -> tuple[Call, Any]:
    """Probe. Where the dtype is not the user's graph's, autocast was at work: do its casts explicitly."""
    assert call.target is not None
    probed = probe(op, call.target, call.args, call.kwargs)
    wants = [v.dtype for v in flat(example(call.node)) if isinstance(v, torch.Tensor)]
    gives = [v.dtype for v in flat(probed)]
    if gives == wants or call.in_place:
        return call, probed
    dtype = wants[0]
    if len(wants) != 1 or len(gives) != 1 or not dtype.is_floating_point or values[0].kind is not Kind.ROWS:
        raise Refusal(f"gives {gives} where the model has {wants}")

    def cast(a: Any) -> Any:
        if not isinstance(a, Value) or not a.dtype.is_floating_point or a.dtype == dtype:
            return a
        return a.but(kind=Kind.ROWS, node=lift.cast(lift.data(a), dtype), dtype=dtype)

    call = Call(
        call.node, call.name, call.target, False, map_aggregate(call.args, cast), map_aggregate(call.kwargs, cast)
    )
    probed = probe(op, call.target, call.args, call.kwargs)  # type: ignore[arg-type]
    if not isinstance(probed, Probed) or probed.dtype != dtype:
        raise Refusal(f"does not give {dtype}, as it does in the model")
    return call, probed


def _is_view_of_each(call: Call, taken: Value) -> bool:
    """Can a view of parameters taken by id be made on the parameter before it is taken?

    The expert dim stands where the pairs stand. Ids [T, K] shift the dims behind, unless these are counted
    from the end.
    """
    if call.name in CASTS or (call.name in VIEWS and taken.dims[0] is not Dim.TOKEN):
        return True
    dims = [d for d in flat((call.args[1:], list(call.kwargs.values())))]
    if call.name == "getitem":
        return isinstance(call.args[1], tuple) and call.args[1][0] is Ellipsis
    return call.name in ("transpose", "swapaxes", "unsqueeze") and all(isinstance(d, int) and d < 0 for d in dims)
