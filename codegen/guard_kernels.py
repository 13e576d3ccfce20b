"""Checks of a router's choice that nobody waits for: the device notes what is wrong, the host looks later.

References: `ultraep_compile.ops.routing._check_ids`, `_check_scores`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NOTHING = 2**62
"""The position that is noted while everything is right."""


@triton.jit
def first_bad(values_p, note_p, n, limit, IDS: tl.constexpr, BLOCK: tl.constexpr):
    """note = min(note, position of the first id outside 0..limit-1, or of the first score that is not finite)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values_p + i, mask=i < n, other=0)
    if IDS:
        bad = (x < 0) | (x >= limit)
    else:
        bad = ~(tl.abs(x.to(tl.float32)) < float("inf"))
    first = tl.min(tl.where(bad & (i < n), i, 4611686018427387904), 0)
    if first < 4611686018427387904:
        tl.atomic_min(note_p, first)


@triton.jit
def poison(rows_p, physical_p, n, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """NaN into the rows of pairs that travelled nowhere (physical < 0)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lost = tl.load(physical_p + i, mask=i < n, other=0) < 0
    if tl.max(lost.to(tl.int32), 0) > 0:
        c = 0
        while c < width:
            column = c + tl.arange(0, BLOCK)
            at = rows_p + i[:, None].to(tl.int64) * width + column[None, :]
            nan = tl.full((ROWS, BLOCK), float("nan"), rows_p.dtype.element_ty)
            tl.store(at, nan, mask=lost[:, None] & (column < width)[None, :])
            c += BLOCK


def note_bad(ids: Tensor, scores: Tensor | None, experts: int, note: Tensor) -> None:
    """note int64 [2]: position of the first bad id and of the first bad score; NOTHING where there is none.

    Example: ids [[0, 2], [5, 1]] with 4 experts and finite scores leave [2, NOTHING].
    """
    for at, values, is_ids in ((0, ids, True), (1, scores, False)):
        if values is not None and values.numel():
            blocks = triton.cdiv(values.numel(), 4096)
            first_bad[(blocks,)](values.contiguous(), note[at:], values.numel(), experts, is_ids, 4096)


def poison_lost_rows(rows: Tensor, physical_TK: Tensor) -> None:
    """rows [T*K, ...]: those of pairs without a physical expert become NaN.

    Example: physical [[3], [-1]] leaves row 0 as it is and makes row 1 NaN.
    """
    n, width = rows.shape[0], rows.shape[1:].numel()
    if rows.numel():
        poison[(triton.cdiv(n, 16),)](rows, physical_TK.contiguous(), n, width, 16, 256)
