"""Signals and waits between ranks, for use inside kernels: every wait ends.

A flag is an int32 in pool memory that only grows; the waiter polls its own memory. `publish` makes everything that this
program wrote visible to all ranks; a plain atomic store of the flag may follow. `wait` returns 0 when its deadline has
passed, or when an earlier wait of this rank failed: the kernel must then return without using the data and without
signalling. The first failure of a rank is recorded for `SymmetricPool.check`.

Counts compare by difference, so they may wrap. The device clock goes through an atomic because Triton needs a scalar
to be the same in all threads of a program, which `globaltimer` alone is not.
"""

from __future__ import annotations

import os
import time

import triton
import triton.language as tl

from ultraep_compile.symmetric import control

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
CLOCK, LIMIT, FAILED, RECORD = (tl.constexpr(w) for w in (control.CLOCK, control.LIMIT, control.FAILED, control.RECORD))
SEEN_BY_RANK = tl.constexpr(control.SEEN_BY_RANK)
VALID, PHASE, PEER, EXPECTED = (tl.constexpr(w) for w in (control.VALID, control.PHASE, control.PEER, control.EXPECTED))
SEEN, SITE, INDEX, MISSING = (tl.constexpr(w) for w in (control.SEEN, control.SITE, control.INDEX, control.MISSING))

if INTERPRETED:

    def now(control_p):
        """Nanoseconds; lets another process run."""
        time.sleep(0)
        return time.monotonic_ns()

else:

    @triton.jit
    def now(control_p):
        """Nanoseconds of the device's clock, the same in all threads."""
        tl.atomic_max(control_p + CLOCK, tl.extra.cuda.globaltimer().to(tl.int64), sem="relaxed")
        return tl.atomic_add(control_p + CLOCK, 0, sem="relaxed")


@triton.jit
def publish():
    """Order this program's earlier writes before its later atomic stores, for all ranks."""
    tl.debug_barrier()
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def signal(flag_p, value):
    """Set a flag, of any rank, after everything that this program wrote."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_p, value, sem="release", scope="sys")


@triton.jit
def has_failed(control_p):
    """Whether a wait of this rank has failed: nothing may be trusted or signalled any more."""
    return tl.atomic_add(control_p + FAILED, 0, sem="relaxed") != 0


@triton.jit
def record_failure(control_p, PHASE_CODE: tl.constexpr, peer, expected, seen, site, index, missing):
    """Leave the first failure of this rank to the host."""
    if tl.atomic_xchg(control_p + FAILED, 1, sem="acq_rel", scope="gpu") == 0:
        record_p = tl.load(control_p + RECORD).to(tl.pointer_type(tl.int64))
        tl.store(record_p + PHASE, PHASE_CODE)
        tl.store(record_p + PEER, peer)
        tl.store(record_p + EXPECTED, expected)
        tl.store(record_p + SEEN, seen)
        tl.store(record_p + SITE, site)
        tl.store(record_p + INDEX, index)
        tl.store(record_p + MISSING, missing)
        publish()
        tl.store(record_p + VALID, 1)


@triton.jit
def wait(flag_p, expected, control_p, PHASE_CODE: tl.constexpr, peer, site, index):
    """1 once the flag in this rank's memory has reached `expected`; 0 if that did not happen in time.

    Example: with the flag at 3, wait(flag, 3) returns 1 at once; wait(flag, 4) returns 1 after a peer's signal(flag, 4).
    """
    seen = tl.atomic_add(flag_p, 0, sem="acquire", scope="sys")
    good = 1
    waiting = (seen - expected) < 0
    if waiting:
        start = now(control_p)
        limit = tl.load(control_p + LIMIT)
        while waiting:
            seen = tl.atomic_add(flag_p, 0, sem="acquire", scope="sys")
            waiting = (seen - expected) < 0
            if waiting:
                late = now(control_p) - start > limit
                if late:
                    record_failure(control_p, PHASE_CODE, peer, expected, seen, site, index, 0)
                if late | has_failed(control_p):
                    good = 0
                    waiting = False
    return good


@triton.jit
def wait_all(
    flags_p, expected, wanted, peer, control_p, site, PHASE_CODE: tl.constexpr, BY_RANK: tl.constexpr, N: tl.constexpr
):
    """`wait` for a vector of N >= 32 flags at once, by a program of one warp (so that no two lanes poll one flag).

    BY_RANK: flag i comes from rank i, and the record keeps all counts, so that the error can name every missing rank.
    """
    lane = tl.arange(0, N)
    good = 1
    waiting = not has_failed(control_p)
    if not waiting:
        good = 0
    start = now(control_p)
    limit = tl.load(control_p + LIMIT)
    while waiting:
        seen = tl.atomic_add(flags_p, 0, mask=wanted, sem="acquire", scope="sys")
        absent = wanted & ((seen - expected) < 0)
        missing = tl.sum(absent.to(tl.int32), 0)
        waiting = missing > 0
        if waiting:
            late = now(control_p) - start > limit
            if late:
                first = tl.min(tl.where(absent, lane, N), 0)
                here = lane == first
                if BY_RANK:
                    if not has_failed(control_p):
                        record_p = tl.load(control_p + RECORD).to(tl.pointer_type(tl.int64))
                        tl.store(record_p + SEEN_BY_RANK + lane, seen.to(tl.int64), mask=wanted)
                else:
                    missing = 0
                record_failure(
                    control_p, PHASE_CODE, tl.sum(tl.where(here, peer, 0), 0), tl.sum(tl.where(here, expected, 0), 0),
                    tl.sum(tl.where(here, seen, 0), 0), site, first, missing,
                )  # fmt: skip
            if late | has_failed(control_p):
                good = 0
                waiting = False
    return good
