"""Which labels survive a reshape, from the sizes before and after.

A label keeps its own dim, or PAIR splits into TOKEN, CHOICE, or these two merge into PAIR. Unlabelled dims
between two labelled ones may be regrouped freely. Sizes decide nothing beyond that, so coincidences (T = D)
do no harm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ultraep_compile.passes.lift.sizes import Size, product, same
from ultraep_compile.passes.lift.values import Dim, Dims


def reshape_labels(dims: Dims, before: Sequence[Size], after: Sequence[Size], of: dict[Dim, Size]) -> Dims | None:
    """Labels of the result, or None if a labelled dim was merged with another."""
    fits: list[tuple[bool, Dims]] = []
    for variant, sizes in _variants(dims, before, of):
        labels = _align(variant, sizes, after)
        if labels is not None:
            exact = len(sizes) == len(after) and all(same(a, b) for a, b in zip(sizes, after, strict=True))
            fits.append((exact, labels))
    if not fits:
        return None
    # With T = 1 (or no tokens at all) PAIR fits where CHOICE belongs, too: the spelling that fits dim by dim is meant.
    return next((labels for exact, labels in fits if exact), fits[0][1])


def _variants(dims: Dims, sizes: Sequence[Size], of: dict[Dim, Size]) -> list[tuple[Dims, tuple[Size, ...]]]:
    plain, at = (tuple(dims), tuple(sizes)), None
    if Dim.CHOICE not in of:
        return [plain]
    if Dim.PAIR in dims:
        at = dims.index(Dim.PAIR)
        new = (Dim.TOKEN, Dim.CHOICE)
        old = 1
    elif (Dim.TOKEN, Dim.CHOICE) in itertools.pairwise(dims):
        at = dims.index(Dim.TOKEN)
        new = (Dim.PAIR,)
        old = 2
    else:
        return [plain]
    relabelled = (*dims[:at], *new, *dims[at + old :])
    resized = (*sizes[:at], *(of[dim] for dim in new), *sizes[at + old :])
    return [plain, (relabelled, resized)]


def _align(dims: Dims, before: Sequence[Size], after: Sequence[Size]) -> Dims | None:
    """Give each labelled dim a place in `after` so that the plain dims between two of them have equal
    products.
    """
    first = next((i for i, dim in enumerate(dims) if dim), None)
    if first is None:
        return (None,) * len(after) if same(product(before), product(after)) else None
    ahead = product(before[:first])
    for j, size in enumerate(after):
        if same(size, before[first]) and same(product(after[:j]), ahead):
            rest = _align(dims[first + 1 :], before[first + 1 :], after[j + 1 :])
            if rest is not None:
                return (*(None,) * j, dims[first], *rest)
    return None
