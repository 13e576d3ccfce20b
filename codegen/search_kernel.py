"""The search for copies as one Triton launch: `planner.quota` and `planner.search`, every candidate side by side.

A candidate is a method at a threshold, for one domain; it is one program of one warp. First come the methods at the
good enough threshold, then those of the ladder, then the refinement, whose programs wait until all candidates of the
ladder have ended, and leave at once where the good enough threshold was reached. (Programs start in the order of
their numbers, so what is waited for runs.)

Loads whose keys do not fit 32 bits are planned with 64 by the second branch of the same kernel.

Candidate c writes table c of [ALL_C, D*S] and offers its key, class | cost | c, to an atomic minimum: class 0 is the
good enough threshold, class 1 + i the i-th of the ladder, or of the refinement, which has a minimum of its own. TIMED:
all candidates but the refinement run to their end, and the key is time | c, with the time in tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.codegen.copies_kernel import CLASS_SHIFT, find_copies
from ultraep_compile.codegen.hottest_kernels import copied, hottest_first, in_registers
from ultraep_compile.planner.quota import FEW_COPIES, LADDER, LOW_LOAD
from ultraep_compile.planner.search import Method

NONE = tl.constexpr(2**63 - 1)  # the key where no candidate was found
FEW = tl.constexpr(len(FEW_COPIES))
LOW = tl.constexpr(len(LOW_LOAD))
RUNGS = tl.constexpr(LADDER)
COARSE = len(FEW_COPIES) + LADDER * len(LOW_LOAD)
CANDIDATES = COARSE + LADDER * len(LOW_LOAD)
LADDER_ENDS = tl.constexpr(COARSE)  # the candidates from here on refine


def numbers(method: Method) -> tuple[int, ...]:
    """A method as a row of the table that the kernel reads."""
    return 1 if method.order == "largest" else -1, method.near, method.near_full, int(method.best_fit)


METHODS = tuple(number for method in (*FEW_COPIES, *LOW_LOAD) for number in numbers(method))
# what the kernel takes for granted of the methods, so that its loops are short
assert all(m.best_fit and not m.always_fill and m.order != "hottest" for m in FEW_COPIES)
assert all(m.always_fill and m.order == "hottest" and not m.near and not m.near_full for m in LOW_LOAD)


@triton.jit
def _rung(good, mean, worst, index):
    """Threshold `index` of `planner.quota.ladder`."""
    tau = good
    if index > 0:
        excess = tl.maximum(good - mean, 1 + (mean >> 8))
        i = 1
        while i < index:
            excess = tl.minimum(excess + 1 + (excess >> 2), worst)
            i += 1
        tau = tl.where(index == RUNGS - 1, worst, tl.minimum(mean + excess, worst))
    return tau


@triton.jit
def _wait_for_ladder(key_p, done_p):
    """The key of the lowest rung that was reached, once all candidates of the ladder have ended; else one of class 0."""
    key = tl.load(key_p, volatile=True)
    while ((key >> CLASS_SHIFT) > 0) & (tl.load(done_p, volatile=True) < LADDER_ENDS):
        key = tl.load(key_p, volatile=True)
    if (key >> CLASS_SHIFT) > 0:
        tl.atomic_add(done_p, 0, sem="acq_rel")  # what was offered before `done` was raised is seen now
        key = tl.load(key_p, volatile=True)
    return key


@triton.jit
def _candidate(
    rows, c, sign, near, near_full, best_fit, slots, own_p, counts_p, column_p, key_p, fine_p, done_p, table_p, keys_p,
    tolerance, copy_tokens, first_rank, R, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr,
    M_BITS: tl.constexpr, SP: tl.constexpr, EVEN: tl.constexpr, TIMED: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """The threshold and the class of candidate c, and its search.

    rows: the experts' tokens by local index; where they are not in registers, their sum and the two hottest ones' keys.
    """
    MP: tl.constexpr = 1 << M_BITS
    REGISTERS: tl.constexpr = in_registers(M, 1 << G_BITS)
    load = rows[0].to(KEY)
    if REGISTERS:
        packed = ((rows[0].to(KEY) << M_BITS) + (MP - 1),)
        for m in tl.static_range(1, MP):
            if m < M:
                load += rows[m].to(KEY)
                packed += ((rows[m].to(KEY) << M_BITS) + (MP - 1 - m),)
            else:
                packed += (tl.full((1 << G_BITS,), -1, KEY),)
    total = tl.sum(load, 0)
    worst = tl.max(load, 0)
    mean = (total + D - 1) // D
    # total * (10000 + tolerance) // (10000 * D), without passing 2^63
    UNIT: tl.constexpr = 10000 * D
    whole = (total // UNIT).to(tl.int64)
    rest = (total % UNIT).to(tl.int64)
    good = whole * (10000 + tolerance) + rest * (10000 + tolerance) // UNIT
    good = tl.maximum(mean, good.to(KEY))
    if worst > good:
        if REGISTERS:
            hottest = hottest_first(packed, M_BITS)[:M]
        else:
            hottest = (rows[1].to(KEY), rows[2].to(KEY))
        if c < FEW:
            found = find_copies(hottest, load, good, mean, worst, total, c, c * 0, copy_tokens, sign, near, near_full, best_fit,
                                slots, own_p, counts_p, column_p, key_p, table_p, keys_p, first_rank, R, D, M, S, G_BITS,
                                M_BITS, SP, EVEN, TIMED, False, KEY)  # fmt: skip
            if not found:
                tl.atomic_add(done_p, 1, sem="acq_rel")
        else:
            go = c >= 0
            key_here = key_p
            if c < LADDER_ENDS:
                class_ = (c - FEW) // LOW + 1
                tau = _rung(good, mean, worst, class_ - 1)
            else:
                reached = (_wait_for_ladder(key_p, done_p) >> CLASS_SHIFT).to(tl.int32)
                go = (reached > 1) & (reached <= RUNGS)
                class_ = (c - LADDER_ENDS) // LOW
                below = _rung(good, mean, worst, reached - 2)
                step = (_rung(good, mean, worst, reached - 1) - below).to(tl.int64)
                tau = below + (step * (class_ + 1) // (RUNGS + 1)).to(KEY)
                key_here = fine_p
            if go:
                find_copies(hottest, load, tau, mean, worst, total, c, class_, copy_tokens, sign, near, near_full, best_fit,
                            slots, own_p, counts_p, column_p, key_here, table_p, keys_p, first_rank, R, D, M, S, G_BITS,
                            M_BITS, SP, EVEN, TIMED, True, KEY)  # fmt: skip
            if c < LADDER_ENDS:
                tl.atomic_add(done_p, 1, sem="acq_rel")


@triton.jit
def search(
    own_p, load_p, counts_p, column_p, slots_p, methods_p, key_p, flag_p, table_p, heat_p, keys_p, tolerance, copy_tokens, R,
    DOMAINS, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr, M_BITS: tl.constexpr, SP: tl.constexpr,
    EVEN: tl.constexpr, ALL_C: tl.constexpr, TIMED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One candidate of one domain. key: int64 [3, DOMAINS], the best of the ladder, of the refinement, and `done`."""
    GP: tl.constexpr = 1 << G_BITS
    MP: tl.constexpr = 1 << M_BITS
    # keys of 32 bits hold loads below this
    MOST: tl.constexpr = 2**30 // (GP if GP > MP else MP)
    domain = tl.program_id(0)
    c = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first_rank = domain * D
    g = tl.arange(0, GP)
    method = tl.where(c < FEW, c, FEW + (c - FEW) % LOW)
    sign = tl.load(methods_p + method * 4)
    near = tl.load(methods_p + method * 4 + 1)
    near_full = tl.load(methods_p + method * 4 + 2)
    best_fit = tl.load(methods_p + method * 4 + 3) != 0
    slots = tl.load(slots_p + first_rank + g, mask=g < D, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if in_registers(M, GP):
        rows = (tl.load(load_p + first_rank + g, mask=g < D, other=0),)
        load = rows[0]
        for m in tl.static_range(1, M):
            rows += (tl.load(load_p + m * R + first_rank + g, mask=g < D, other=0),)
            load += rows[m]
    else:
        load = tl.load(heat_p + first_rank + g, mask=g < D, other=0)
        rows = (load,)
        for k in tl.static_range(1, 3):
            rows += (tl.load(heat_p + k * R + first_rank + g, mask=g < D, other=0),)
        all_keys = keys_p + first_rank * MP
        keys_p = all_keys + (c + 1).to(tl.int64) * (R * MP)
        copied(all_keys, keys_p, D * MP)
    narrow = tl.max(tl.minimum(load, MOST).to(tl.int32), 0) < MOST
    if c == 0:
        tl.store(flag_p + domain, narrow.to(tl.int32))
    best, fine, done = key_p + domain, key_p + DOMAINS + domain, key_p + 2 * DOMAINS + domain
    table = table_p + domain.to(tl.int64) * ALL_C * (D * S)
    if narrow:
        _candidate(rows, c, sign, near, near_full, best_fit, slots, own_p, counts_p, column_p, best, fine, done, table,
                   keys_p, tolerance, copy_tokens, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, TIMED, tl.int32)  # fmt: skip
    else:
        _candidate(rows, c, sign, near, near_full, best_fit, slots, own_p, counts_p, column_p, best, fine, done, table,
                   keys_p, tolerance, copy_tokens, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, TIMED, tl.int64)  # fmt: skip
