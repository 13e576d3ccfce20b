"""Tokens per expert from top-k ids, in two Triton launches without atomics: the same counts on every run.

Reference: `torch.bincount(ids.flatten(), minlength=experts)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 64  # partial histograms; the sum over them is one tile


@triton.jit
def count_part(ids_p, part_p, n, E, EP: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, PDL: tl.constexpr):
    """Histogram of PER blocks of ids; ids outside 0..E-1 are left out."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    counts = tl.zeros((EP,), tl.int32)
    for block in tl.static_range(PER):
        i = (tl.program_id(0) * PER + block) * BLOCK + tl.arange(0, BLOCK)
        ids = tl.load(ids_p + i, mask=i < n, other=-1).to(tl.int32)
        counts += tl.histogram(ids, EP, mask=(ids >= 0) & (ids < E))
    e = tl.arange(0, EP)
    tl.store(part_p + tl.program_id(0) * E + e, counts, mask=e < E)


@triton.jit
def count_sum(part_p, counts_p, E, P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sums of the parts for BLOCK experts."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(part_p + tl.arange(0, P)[:, None] * E + e[None, :], mask=e[None, :] < E, other=0)
    tl.store(counts_p + e, tl.sum(part, 0), mask=e < E)


def expert_counts(ids: Tensor, experts: int) -> Tensor:
    """int32 [E]: how often each expert occurs in the integer ids, which lie on a CUDA device.

    Example: ids [[0, 2], [2, 1]] with 4 experts give [1, 1, 2, 0].
    """
    part = ids.new_empty(PROGRAMS, experts, dtype=torch.int32)
    counts = ids.new_empty(experts, dtype=torch.int32)
    on_gpu = ids.is_cuda
    launch = {"launch_pdl": True} if on_gpu else {}
    width = triton.next_power_of_2(experts)
    block = min(1024, max(128, triton.next_power_of_2(triton.cdiv(ids.numel(), PROGRAMS))))
    per = max(1, triton.cdiv(ids.numel(), PROGRAMS * block))
    count_part[(PROGRAMS,)](ids.contiguous(), part, ids.numel(), experts, width, block, per, on_gpu, **launch)
    count_sum[(triton.cdiv(experts, 32),)](part, counts, experts, PROGRAMS, 32, on_gpu, **launch)
    return counts
