"""Ops that only regroup dims. Their sizes are read from the user's graph, never from arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultraep_compile.passes.lift.nodes import RESHAPES
from ultraep_compile.passes.lift.rules.table import rule
from ultraep_compile.passes.lift.sizes import same
from ultraep_compile.passes.lift.values import Call, Dim, Kind, Refusal, describe

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter


@rule("getitem")
def part_of_tuple(lift: Lifter, call: Call):
    if isinstance(call.args[0], tuple) and isinstance(call.args[1], int):
        return call.args[0][call.args[1]]
    return None


@rule(*RESHAPES, "squeeze")
def reshape(lift: Lifter, call: Call):
    return lift.reshaped(lift.known(call.args[0]), call.node)


@rule("expand", "expand_as")
def expand(lift: Lifter, call: Call):
    value, sizes = lift.known(call.args[0]), lift.facts.shape(call.node)
    pad = len(sizes) - len(value.dims)
    dims, before = (None,) * pad + value.dims, (1,) * pad + value.sizes
    for dim, old, new in zip(dims, before, sizes, strict=True):
        if (
            dim is None
            and not same(old, new)
            and same(new, lift.choices)
            and Dim.TOKEN in dims
            and Dim.CHOICE not in dims
        ):
            raise Refusal(f"expands {describe(value)} over the choices")
    if value.kind in (Kind.PARAM, Kind.TAKEN):
        raise Refusal(f"expands {describe(value)}")
    node = value.node and lift.resized(value.node, dims, sizes, "expand")
    return lift.note(value.but(dims=dims, sizes=sizes, node=node))
