"""Checks of a router's choice that nobody waits for: the device notes what is wrong, the host looks later.

References: `ultraep_compile.ops.routing._check_ids`, `_check_scores`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ultraep_compile.codegen.waits import has_failed
from ultraep_compile.symmetric import SymmetricPool, control

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
def poison(rows_p, physical_p, control_p, n, width, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """NaN into all rows if a wait of this rank has failed, else into those with one of their PAIRS pairs that travelled
    nowhere (physical < 0)."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lost = (i < n) & has_failed(control_p)
    for k in tl.static_range(PAIRS):
        lost = lost | (tl.load(physical_p + i * PAIRS + k, mask=i < n, other=0) < 0)
    if tl.max(lost.to(tl.int32), 0) > 0:
        c = 0
        while c < width:
            column = c + tl.arange(0, BLOCK)
            at = rows_p + i[:, None] * width + column[None, :]
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


def refuse(rows: Tensor, pool: SymmetricPool, physical_TK: Tensor | None = None) -> Tensor:
    """Make a floating [N, ...] NaN where it cannot be right: everywhere after a wait for another rank has failed, and in
    the rows (one a pair, or one a token) of pairs without a physical expert. Returns it.

    Example: physical [[3], [-1]] leaves row 0 as it is and makes row 1 NaN.
    """
    n, width = rows.shape[0], rows.shape[1:].numel()
    if rows.numel():
        pairs = rows if physical_TK is None else physical_TK.contiguous()
        control_p = pool.region(control.CONTROL)
        each = 0 if physical_TK is None else pairs.numel() // n
        poison[(triton.cdiv(n, 16),)](rows, pairs, control_p, n, width, each, 16, 256)
    return rows
