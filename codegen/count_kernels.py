"""Tokens per expert from top-k ids, in two Triton launches without atomics: the same counts on every run.

Reference: `torch.bincount(ids.flatten(), minlength=experts)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultraep_compile.codegen.waits import has_failed

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


@triton.jit
def post(counts_p, boards_p, page_p, rank, R, E, BLOCK: tl.constexpr):
    """Program r writes this rank's counts to row `rank` of the current page of rank r's board [2, R, E]."""
    board_p = tl.load(boards_p + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    row_p = board_p + (tl.load(page_p) % 2 * R + rank) * E
    e = 0
    while e < E:
        i = e + tl.arange(0, BLOCK)
        tl.store(row_p + i, tl.load(counts_p + i, mask=i < E), mask=i < E)
        e += BLOCK


@triton.jit
def read(board_p, out_p, page_p, control_p, R, E, BLOCK: tl.constexpr):
    """Program r copies row r of the current page; zeros after a wait has failed, which nothing can go wrong with."""
    there = not has_failed(control_p)
    row_p = board_p + (tl.load(page_p) % 2 * R + tl.program_id(0)) * E
    e = 0
    while e < E:
        i = e + tl.arange(0, BLOCK)
        tl.store(out_p + tl.program_id(0) * E + i, tl.load(row_p + i, mask=(i < E) & there, other=0), mask=i < E)
        e += BLOCK


def post_counts(counts_E: Tensor, boards: Tensor, page: Tensor, rank: int, ranks: int) -> None:
    """Write int32 [E] to every rank's board; `boards` int64 [R] addresses of int32 [2, R, E], `page` int64 [1]."""
    post[(ranks,)](counts_E, boards, page, rank, ranks, counts_E.shape[0], 1024)


def read_counts(board: Tensor, page: Tensor, control: Tensor) -> Tensor:
    """int32 [R, E]: a copy of the current page of the own board; turns the page. `control`: the pool's control block."""
    _, ranks, experts = board.shape
    out = board.new_empty(ranks, experts)
    read[(ranks,)](board, out, page, control, ranks, experts, 1024)
    page.add_(1)
    return out
