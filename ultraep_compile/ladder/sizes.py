"""Integers that Python computes from the sizes of its inputs: the function, from its values in several recordings.

Products and quotients are told by two recordings. Capacities, `ceil(tokens * factor / experts)` and the like, need more of
them, and are accepted only where arithmetic in floats cannot have rounded otherwise than ours in integers.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx

_ENOUGH = 6
"""Recordings before a rounded quotient is believed."""
_DENOMINATORS = 64
"""Largest denominator of the factor per token and expert."""
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class SizeFunction:
    """max(`least`, `multiple` * round(size * `factor`)) + `more`, where round goes up or down.

    Example:
        >>> SizeFunction(Fraction(5, 32), up=True, least=4)(100)
        16
    """

    factor: Fraction
    up: bool = False
    least: int | None = None
    multiple: int = 1
    more: int = 0

    def __call__(self, size: int) -> int:
        scaled = size * self.factor.numerator + (self.factor.denominator - 1 if self.up else 0)
        value = self.multiple * (scaled // self.factor.denominator)
        return (value if self.least is None else max(self.least, value)) + self.more

    def write(self, graph: fx.Graph, size: fx.Node) -> fx.Node:
        """The nodes that compute it."""

        def call(op: Any, *args: Any) -> fx.Node:
            return graph.call_function(op, args)

        out, top, bottom = size, self.factor.numerator, self.factor.denominator
        out = call(operator.mul, out, top) if top != 1 else out
        if bottom != 1:
            out = call(operator.add, out, bottom - 1) if self.up else out
            out = call(operator.floordiv, out, bottom)
        out = call(operator.mul, out, self.multiple) if self.multiple != 1 else out
        out = out if self.least is None else call(max, self.least, out)
        return call(operator.add, out, self.more) if self.more else out


def size_function(values: tuple[int, ...], sizes: tuple[int, ...], experts: int) -> SizeFunction | None:
    """The function with these values at these sizes, if there is a simple one.

    Example: with 8 experts, capacities 4, 13, 26, 41, 63, 128 at 8, 80, 161, 260, 400, 819 tokens are
        max(4, ceil(tokens * 5 / 32)), a factor of 1.25.
    """
    if (plain := _plain(values, sizes)) is not None:
        return plain
    if len(set(sizes)) < _ENOUGH:
        return None
    for more in (0, -1, 1):  # the last of so many places, or one place too many
        for found in _rounded(tuple(v - more for v in values), sizes, experts):
            made = dataclasses.replace(found, more=more)
            if all(made(s) == v for s, v in zip(sizes, values, strict=True)):
                return made
    return None


def _plain(values: tuple[int, ...], sizes: tuple[int, ...]) -> SizeFunction | None:
    if any(v % s for v, s in zip(values, sizes, strict=True)) and any(s % v if v else 1 for v, s in zip(values, sizes, strict=True)):
        return None
    ratios = {Fraction(v, s) for v, s in zip(values, sizes, strict=True)}
    return SizeFunction(ratios.pop()) if len(ratios) == 1 else None


def _rounded(values: tuple[int, ...], sizes: tuple[int, ...], experts: int) -> Iterator[SizeFunction]:
    for least in (None, min(values)):
        free = [(v, s) for v, s in zip(values, sizes, strict=True) if v != least]
        if len({s for _, s in free}) < _ENOUGH - 2:
            continue
        for multiple in _MULTIPLES:
            if any(v % multiple for v, _ in free):
                continue
            for up in (False, True):
                low = max(Fraction(v // multiple - up, s) for v, s in free)
                high = min(Fraction(v // multiple + (not up), s) for v, s in free)
                if (factor := _simplest(low, high, up, experts)) is not None:
                    yield SizeFunction(factor, up, least, multiple)


def _simplest(low: Fraction, high: Fraction, up: bool, experts: int) -> Fraction | None:
    """The fraction with the smallest denominator in [low, high), or in (low, high] for `up`.

    Only denominators of powers of two and divisors of the number of experts: then `tokens * factor / experts`, in floats and
    in any order, is a whole number exactly where the fraction says so. A factor of 1.1 is not.
    """
    for denominator in range(1, _DENOMINATORS * experts + 1):
        numerator = math.floor(high * denominator) if up else math.ceil(low * denominator)
        found = Fraction(numerator, denominator)
        inside = low < found <= high if up else low <= found < high
        if inside and numerator > 0:
            odd = denominator // (denominator & -denominator)
            return found if experts % odd == 0 else None
    return None
