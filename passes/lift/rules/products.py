"""The expert products. Both forms, grouped by sorted rows and batched over gathered weights, become
`expert_mm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ultraep_compile.passes.lift.markers import expert_mm
from ultraep_compile.passes.lift.nodes import held
from ultraep_compile.passes.lift.outside import dispatch
from ultraep_compile.passes.lift.rules.table import rule
from ultraep_compile.passes.lift.sizes import same
from ultraep_compile.passes.lift.values import Call, Dim, Kind, Refusal, Value, describe

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter

GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
PRODUCTS = frozenset({*GROUPED, "bmm", "matmul", "mm", "einsum", "baddbmm", "linear", "addmm"})


def product(lift: Lifter, call: Call, x: Value, weight: Value, transposed: bool, uses: frozenset) -> Value:
    """expert_mm of x, with one row [.., I] for each pair, and weight [E, I, O] (or [E, O, I]): rows [N, O].

    The compute dtype is the one of the user's node: under autocast the casts are not in the graph.
    """
    dtype = held(call.node).dtype
    assert weight.node is not None
    layout = x.dims[0] if x.dims[0] is Dim.SORTED else Dim.PAIR
    width_in, width_out = weight.sizes[-2:] if not transposed else weight.sizes[:-3:-1]
    rows = lift.as_shape(x.but(node=lift.data(x)), (layout, None), (lift.pairs, width_in)) if len(x.dims) != 2 else x
    rows_node = lift.data(rows) if x.dtype == dtype else lift.cast(lift.data(rows), dtype)
    matrix = lift.graph.call_method("transpose", (weight.node, -2, -1)) if transposed else weight.node
    matrix = matrix if weight.dtype == dtype else lift.cast(matrix, dtype)
    node = lift.graph.call_function(expert_mm, (rows_node, matrix, lift.id_in))
    return lift.note(Value(Kind.ROWS, (layout, None), (lift.pairs, width_out), dtype, node, uses))


@rule(*GROUPED)
def grouped(lift: Lifter, call: Call):
    x, weight, offsets = call.args[0], lift.param(call.arg(1, "weight")), call.arg(2, "offs")
    if call.kwargs.get("bias") is not None:
        raise Refusal("grouped product with a bias argument")
    x = lift.known(x)
    if x.kind is not Kind.ROWS or x.dims != (Dim.SORTED, None):
        raise Refusal(f"grouped product of {describe(x)}, expected sorted rows")
    if weight is None or weight.dims != (Dim.EXPERT, None, None):
        raise Refusal(f"grouped product with {call.node.args[1]}, expected a parameter [experts, in, out]")
    if not isinstance(offsets, Value) or offsets.kind is not Kind.OFFSETS:
        raise Refusal(f"grouped product with offsets {describe(offsets)}, expected cumulated counts of the ids")
    return product(lift, call, x, weight, False, x.uses | {call.node})


@rule("bmm", "matmul")
def batched(lift: Lifter, call: Call):
    """weight[ids] @ x[..., None], or x[:, None] @ weight[ids]."""
    left, right = call.args[0], call.arg(1, "mat2")
    weight_left = _is_taken(left)
    weight, x = (left, right) if weight_left else (right, left)
    if not _is_taken(weight):
        return None
    x = lift.known(x)
    column = -1 if weight_left else -2
    single_row = x.dims == (*weight.dims[:-2], None, None) and same(x.sizes[column], 1)
    if not single_row or weight.dims[-2:] != (None, None):
        raise Refusal(f"batched product of {describe(weight)} and {describe(x)}, expected one row for each matrix")
    y = product(lift, call, x, weight, weight_left, x.uses | weight.uses)
    return lift.as_shape(y, x.dims, lift.facts.shape(call.node))


@rule("einsum")
def einsum(lift: Lifter, call: Call):
    """`td,tkfd->tkf` and the like: one operand is weight[ids], the other the tokens or their rows."""
    equation, operands = call.args[0], call.args[1:]
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not any(map(_is_taken, operands)):
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or all(map(_is_taken, operands)) or "." in equation or not out:
        raise Refusal(f"einsum {equation} with expert weights, expected two operands and an output")
    at = 0 if _is_taken(operands[0]) else 1
    weight, x, of_weight, of_x = operands[at], operands[1 - at], letters[at], letters[1 - at]
    batch, matrix = of_weight[:-2], of_weight[-2:]
    summed = [c for c in matrix if c in of_x and c not in out]
    if len(summed) != 1 or weight.dims[-2:] != (None, None) or out != batch + matrix.replace(summed[0], ""):
        raise Refusal(f"einsum {equation} is no product of rows and matrices")
    if of_x == batch[:1] + summed[0] and len(batch) == 2 and isinstance(x, fx.Node):
        x = dispatch(lift, x, Dim.PAIR)  # tokens, the same for all choices
    elif of_x == batch + summed[0]:
        x = lift.known(x)
        if x.dims[:-1] != weight.dims[:-2]:
            raise Refusal(f"einsum of {describe(x)} and {describe(weight)}, expected a row for each matrix")
    else:
        raise Refusal(f"einsum {equation} is no product of rows and matrices")
    y = product(lift, call, x, weight, matrix[1] == summed[0], x.uses | weight.uses)
    return lift.as_shape(y, (*weight.dims[:-2], None), lift.facts.shape(call.node))


def _is_taken(operand: object) -> bool:
    return isinstance(operand, Value) and operand.kind is Kind.TAKEN
