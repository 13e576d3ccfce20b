"""What one MoE layer costs, as formulas over the symbolic number of tokens: printed by `explain`, evaluated by planners."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Integer, Symbol, ceiling

from ultraep_compile.ops.grouped_gemm import ROW_ALIGNMENT

T = Symbol("T", integer=True, nonnegative=True)
"""Tokens of the whole layer (all ranks)."""
R = Symbol("R", integer=True, positive=True)
"""Ranks."""
S = Symbol("S", integer=True, nonnegative=True)
"""Redundant experts (slots) per rank."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Formulas of one layer. Bytes and FLOPs are of all ranks together unless they say per rank."""

    flops: Expr
    """Multiplications and additions of the expert products, forward; backward takes twice as many."""
    dispatch_bytes: Expr
    """Rows to the experts and results back, forward, if every pair leaves its rank."""
    capacity: Expr
    """Rows that one rank's buffer holds in a round."""
    buffer_bytes: Expr
    """Memory of the expert buffers of one rank: the rows, and what is kept for backward."""
    slot_bytes: Expr
    """Memory of the slots of one rank; shared by all layers, never saved for backward."""
    replica_bytes: Integer
    """Bytes that travel for one copy of one expert."""

    def items(self) -> list[tuple[str, Expr]]:
        return [(name, getattr(self, name)) for name in self.__slots__]

    def at(self, tokens: int, ranks: int, slots: int) -> dict[str, int]:
        """The formulas' values."""
        return {name: int(f.subs({T: tokens, R: ranks, S: slots})) for name, f in self.items()}


def layer_cost(
    *, experts: int, top_k: int, flops_per_row: int, row_bytes: int, out_bytes: int, kept_bytes: int, expert_bytes: int
) -> LayerCost:
    """Formulas of a layer from its sizes: bytes of one row in and out, of one row kept for backward, of one expert.

    Example: 8 experts, top-2, 100 FLOPs a row give flops = 200*T.
    """
    pairs = top_k * T
    mean = ceiling(pairs / R)
    capacity = mean + ceiling(mean / 8) + 16
    padding = (ROW_ALIGNMENT - 1) * (sympy.Rational(experts) / R + S)
    return LayerCost(
        flops=sympy.sympify(flops_per_row) * pairs,
        dispatch_bytes=pairs * (row_bytes + out_bytes),
        capacity=capacity,
        buffer_bytes=(capacity + padding) * (row_bytes + kept_bytes),
        slot_bytes=S * expert_bytes,
        replica_bytes=Integer(expert_bytes),
    )
