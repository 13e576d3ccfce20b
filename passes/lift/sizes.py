"""Sizes of tensors as ints or sympy expressions.

A SymInt is never compared, converted or tested: that would add a guard to the user's compiled code. Its
expression is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import sympy
import torch

Size = int | sympy.Expr


def size_of(dim: int | torch.SymInt) -> Size:
    """The expression of a SymInt (an int where it is constant), or the int itself."""
    if isinstance(dim, torch.SymInt):
        expr = dim.node.expr
        return int(expr) if expr.is_Integer else expr
    return int(dim)


@functools.lru_cache(maxsize=4096)
def _same_expr(a: Size, b: Size) -> bool:
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def same(a: Size, b: Size) -> bool:
    """Are two sizes equal whatever the symbols stand for?"""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is b or _same_expr(a, b)


def product(sizes: Iterable[Size]) -> Size:
    return math.prod(sizes)
