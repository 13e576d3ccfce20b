"""A split barrier among all ranks: `arrive` tells every peer, `await_all` waits until every peer has told.

Both count on the device, so a captured graph may be replayed. n calls of `await_all` pass once every rank has called
`arrive` n times. Reference: `SymmetricPool._host_barrier`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ultraep_compile.codegen.waits import has_failed, publish, wait_all
from ultraep_compile.symmetric import control
from ultraep_compile.symmetric.pool import SymmetricPool


@triton.jit
def _arrive(counts_p, control_p, rank, R, RP: tl.constexpr):
    mine_p = tl.load(counts_p + rank).to(tl.pointer_type(tl.int32))
    if not has_failed(tl.load(control_p + rank).to(tl.pointer_type(tl.int64))):
        count = tl.load(mine_p + R) + 1
        tl.store(mine_p + R, count)
        publish()
        peer = tl.arange(0, RP)
        peers_p = tl.load(counts_p + peer, mask=peer < R, other=0).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(peers_p + rank, tl.zeros((RP,), tl.int32) + count, mask=peer < R, sem="release", scope="sys")


@triton.jit
def _await(counts_p, control_p, rank, site, lag, R, RP: tl.constexpr, PHASE_CODE: tl.constexpr):
    mine_p = tl.load(counts_p + rank).to(tl.pointer_type(tl.int32))
    my_control_p = tl.load(control_p + rank).to(tl.pointer_type(tl.int64))
    turn = tl.load(mine_p + R + 1) + 1
    tl.store(mine_p + R + 1, turn)
    peer = tl.arange(0, RP)
    expected = tl.zeros((RP,), tl.int32) + turn - lag
    wait_all(mine_p + peer, expected, peer < R, peer, my_control_p, site, PHASE_CODE, True, RP)


@triton.jit(do_not_specialize=["rank0"])
def arrive_kernel(counts_p, control_p, rank0, R, RP: tl.constexpr):
    """Program i, of rank rank0 + i: add 1 to this rank's count and store it at every peer. One warp.

    Example: the third arrival of rank 1 stores 3 in counts[1] of every rank.
    """
    _arrive(counts_p, control_p, rank0 + tl.program_id(0), R, RP)


@triton.jit(do_not_specialize=["rank0", "site", "lag"])
def await_kernel(counts_p, control_p, rank0, site, lag, R, RP: tl.constexpr, PHASE_CODE: tl.constexpr):
    """Program i, of rank rank0 + i: wait until every rank's count has reached this rank's turn - lag. One warp."""
    _await(counts_p, control_p, rank0 + tl.program_id(0), site, lag, R, RP, PHASE_CODE)


@triton.jit(do_not_specialize=["rank", "site"])
def meet_kernel(counts_p, control_p, rank, site, R, RP: tl.constexpr, PHASE_CODE: tl.constexpr):
    """Both in one launch, for a process of one rank."""
    _arrive(counts_p, control_p, rank, R, RP)
    _await(counts_p, control_p, rank, site, 0, R, RP, PHASE_CODE)


def warp_width(n: int) -> int:
    """At least a warp, so that no two lanes of it hold the same element."""
    return max(32, triton.next_power_of_2(n))


def hosted_pools(pools: SymmetricPool | Sequence[SymmetricPool]) -> list[SymmetricPool]:
    """The pools that this process drives: consecutive ranks of one group."""
    hosted = [pools] if isinstance(pools, SymmetricPool) else list(pools)
    assert hosted and [p.rank for p in hosted] == list(range(hosted[0].rank, hosted[0].rank + len(hosted)))
    return hosted


def arrive(pools: SymmetricPool | Sequence[SymmetricPool], name: str) -> None:
    """Tell every rank that this one's earlier work on the stream is done. `name`: a region made by `counters`."""
    hosted = hosted_pools(pools)
    first = hosted[0]
    counts, controls = first.addresses(name), first.addresses(control.CONTROL)
    arrive_kernel[(len(hosted),)](counts, controls, first.rank, first.ranks, warp_width(first.ranks), num_warps=1)


def await_all(pools: SymmetricPool | Sequence[SymmetricPool], name: str, phase: str, site: int = 0, lag: int = 0) -> None:
    """Later work on the stream starts after every rank's matching `arrive`: the n-th wait needs n - lag arrivals.

    `phase` (one of `control.PHASES`) and `site` name it in the error if that takes longer than the deadline.
    """
    hosted = hosted_pools(pools)
    first = hosted[0]
    counts, controls = first.addresses(name), first.addresses(control.CONTROL)
    code = control.phase_code(phase)
    await_kernel[(len(hosted),)](
        counts, controls, first.rank, site, lag, first.ranks, warp_width(first.ranks), code, num_warps=1
    )


def meet(pool: SymmetricPool, name: str, phase: str, site: int = 0) -> None:
    """`arrive` and `await_all` of one rank."""
    counts, controls = pool.addresses(name), pool.addresses(control.CONTROL)
    code = control.phase_code(phase)
    meet_kernel[(1,)](counts, controls, pool.rank, site, pool.ranks, warp_width(pool.ranks), code, num_warps=1)
