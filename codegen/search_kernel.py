"""The search for copies as one Triton launch: `planner.quota` and `planner.search`, every candidate side by side.

A candidate is a method at a threshold, for one domain; it is one program of one warp. First come the methods at the
good enough threshold, then those of the ladder, then the refinement, whose programs wait until all candidates of the
ladder have ended, and leave at once where the good enough threshold was reached. (Programs start in the order of
their numbers, so what is waited for runs.)

A rank is a lane (GP lanes, ranks first), the experts of a rank are a tuple of registers, hottest first. Every choice
is the minimum or maximum of a packed key, value * GP + lane: one instruction over a warp where keys have 32 bits.
Loads whose keys do not fit are planned with 64 bits by the second branch of the same kernel.

Candidate c writes table c of [ALL_C, D*S] and offers its key, class | cost | c, to an atomic minimum: class 0 is the
good enough threshold, class 1 + i the i-th of the ladder, or of the refinement, which has a minimum of its own. TIMED:
all candidates but the refinement run to their end, and the key is time | c, with the time in tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.planner.quota import COPY_WORTH, FEW_COPIES, LADDER, LOW_LOAD
from ultraep_compile.planner.search import Method

NONE = tl.constexpr(2**63 - 1)  # the key where no candidate was found
CODE_SHIFT = tl.constexpr(40)  # a slot's entry = code of its expert << 40 | tokens, -1 where it is empty
CLASS_SHIFT = tl.constexpr(51)  # key = class << 51 | (cost + 2^42) << 8 | candidate
COST_BIAS = tl.constexpr(2**42)
FEW = tl.constexpr(len(FEW_COPIES))
LOW = tl.constexpr(len(LOW_LOAD))
RUNGS = tl.constexpr(LADDER)
WORTH = tl.constexpr(COPY_WORTH)
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
def _exchanged(rows, size: tl.constexpr, apart: tl.constexpr):
    """One layer of `_hottest_first`: rows at this distance change places, in alternate blocks of 2^size the other way."""
    after = ()
    for i in tl.static_range(len(rows)):
        if (((i >> size) & 1) == 0) == ((i & apart) == 0):
            after += (tl.maximum(rows[i], rows[i ^ apart]),)
        else:
            after += (tl.minimum(rows[i], rows[i ^ apart]),)
    return after


@triton.jit
def _hottest_first(rows, BITS: tl.constexpr):
    """A tuple of 2^BITS tensors, sorted in descending order at every place: a bitonic network.

    Example: ([3, 1], [5, 0]) gives ([5, 1], [3, 0]).
    """
    for size in tl.static_range(1, BITS + 1):
        for step in tl.static_range(size):
            rows = _exchanged(rows, size, 1 << (size - 1 - step))
    return rows


@triton.jit
def _replaced(rows, value):
    """Sorted rows with `value` in the place of the first, sorted again."""
    after = ()
    for i in tl.static_range(1, len(rows)):
        after += (tl.maximum(value, rows[i]),)
        value = tl.minimum(value, rows[i])
    after += (value,)
    return after


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _any(values):
    """The bits that are set anywhere along axis 0."""
    return tl.reduce(values, 0, _or)


@triton.jit
def _find_copies(
    rows, load, tau, mean, worst, total, c, class_, copy_tokens, sign, near, near_full, best_fit, slots, own_p, counts_p,
    column_p, key_p, table_p, first_rank, R, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr,
    M_BITS: tl.constexpr, SP: tl.constexpr, EVEN: tl.constexpr, TIMED: tl.constexpr, FILL: tl.constexpr,
    KEY: tl.constexpr,
):  # fmt: skip
    """`planner.search.find_copies` for one method and threshold; keys and loads have type KEY. Whether it found them.

    rows: of every rank's experts, hottest first, tokens << M_BITS | MP - 1 - local index. The code of an expert is its
        rank in the domain << M_BITS | MP - 1 - local index.
    sign: -1 for the least load first, 1 for the most load first.
    FILL: one of LOW_LOAD (hottest first, every copy fills its target up), else one of FEW_COPIES.
    """
    GP: tl.constexpr = 1 << G_BITS
    MP: tl.constexpr = 1 << M_BITS
    BIG: tl.constexpr = 2**31 - 1 if KEY == tl.int32 else 2**63 - 1
    UNSIGNED: tl.constexpr = tl.uint32 if KEY == tl.int32 else tl.uint64
    near = ((tau >> 10) * near + ((tau & 1023) * near >> 10)).to(KEY)
    near_full = near_full.to(KEY) << (22 if KEY == tl.int32 else 54)  # 1/1024 as the upper half of a product

    g = tl.arange(0, GP)
    lane, s = g[None, :], tl.arange(0, SP)[:, None]
    table = table_p + c * (D * S)
    tl.store(table + lane * S + s, tl.full((SP, GP), -1, tl.int64), mask=(lane < D) & (s < S))
    tl.debug_barrier()  # other lanes may write there
    over = load - tau
    # what a rank can take; 0 when it is above tau, or has no slot left
    slack = tl.where(slots > 0, tl.maximum(-over, 0), 0)
    free = slots
    sent = slots - slots
    last = tl.where(sign < 0, 0, worst - tau)
    kept = near * 0
    copies = 0
    found = near >= 0  # always
    wanted = found

    # bring the columns that are read first into the L1 cache, all at once: they have 8 ranks to a sector
    columns = column_p + first_rank * (MP * GP)
    touched = tl.zeros((GP,), tl.int32)
    if KEY == tl.int32:
        sector = tl.arange(0, GP // 8)[:, None] * 8
        first = ((g << M_BITS) + (rows[0] & (MP - 1))) << G_BITS
        touched |= _any(tl.load(columns + first[None, :] + sector, mask=(over > 0)[None, :] & (sector < D), other=0))
        if M > 1:  # the second one's, where the hottest alone cannot do
            second = ((g << M_BITS) + (rows[1] & (MP - 1))) << G_BITS
            also = over > rows[0] >> M_BITS
            touched |= _any(tl.load(columns + second[None, :] + sector, mask=also[None, :] & (sector < D), other=0))
        m = tl.arange(0, MP)[:, None]
        own = tl.load(own_p + m * R + first_rank + lane, mask=(m < M) & (lane < D), other=0)
        touched |= _any((own & 1).to(tl.int32))

    # `next_` is the rank that exports, `hot` its hottest expert and, if FILL, `need` what it must shed. What follows from
    # the other ranks' state is looked up while this one's target is still sought: few lookups depend on each other.
    value = worst - (rows[0] >> M_BITS) if FILL else last - sign * over
    turn = tl.where(over > 0, (value << G_BITS) + g, BIG)
    next_ = tl.min(turn, 0)
    hot = tl.max(tl.where(g == (next_ & (GP - 1)).to(tl.int32), rows[0], 0), 0)
    need = tl.max(tl.where(g == (next_ & (GP - 1)).to(tl.int32), over, 0), 0)
    while found & wanted & (next_ != BIG):
        from_ = (next_ & (GP - 1)).to(tl.int32)
        source = g == from_
        available = hot >> M_BITS
        if not FILL:
            need = (last - (next_ >> G_BITS)) * sign
        want = tl.minimum(need, available)
        code = (from_ << M_BITS) + (hot & (MP - 1)).to(tl.int32)
        if KEY == tl.int32:
            demand = tl.load(columns + (code << G_BITS) + g)
        else:
            which = (first_rank + from_) * M + (MP - 1 - (code & (MP - 1)))
            demand = tl.load(counts_p + (first_rank + g) * (R * M) + which, mask=g < D, other=0).to(KEY)
            demand = (demand << G_BITS) + (GP - 1 - g)

        # the tightest slack that takes all; where there is none, BIG less the largest slack
        enough = tl.where(best_fit, want, BIG) if FILL else want
        fit = tl.min(tl.where(slack >= enough, slack, BIG - slack), 0)
        fits = fit < BIG // 2
        most = BIG - fit
        found = fit != BIG
        if FILL:
            rival = slack == tl.where(fits, fit, most)
        else:
            low = tl.where(fits, fit, most - tl.umulhi(most, near_full))
            rival = (slack - low).to(UNSIGNED) <= tl.where(fits, near, BIG).to(UNSIGNED)  # none is below
        chosen = tl.max(tl.where(rival, demand, -1), 0)
        at = (GP - 1 - (chosen & (GP - 1))).to(tl.int32)
        target = g == at

        full = free == 1 if S > 1 else tl.full((GP,), True, tl.int1)
        fill = full
        if FILL:
            fill = slots >= 0
        if not EVEN:  # the rank that exports must have slots
            fill = fill & (tl.max(tl.where(source, slots, 0), 0) > 0)
        takes = tl.minimum(tl.where(fill, available, want), slack)
        tokens = tl.max(tl.where(target, takes, 0), 0)

        # the other ranks' next, and the exporting rank's second expert
        turn = tl.where(source, BIG, turn)
        other = tl.min(turn, 0)
        is_other = g == (other & (GP - 1)).to(tl.int32)
        other_hot = tl.max(tl.where(is_other, rows[0], 0), 0)
        left = hot - (tokens << M_BITS)
        if M > 1:
            left = tl.maximum(left, tl.max(tl.where(source, rows[1], 0), 0))
        rest = need - tokens
        if FILL:
            again = ((worst - (left >> M_BITS)) << G_BITS) + from_
            other_need = tl.max(tl.where(is_other, over, 0), 0)
            over = tl.where(source, tl.maximum(rest, 0), over)
            if not TIMED:  # until something of a lower class is found
                wanted = (tl.load(key_p, volatile=True) >> CLASS_SHIFT) >= class_
        else:
            again = next_ + sign * (tokens << G_BITS)
        again = tl.where(rest > 0, again, BIG)
        turn = tl.where(source, again, turn)

        slack = tl.where(target, tl.where(full, 0, slack - takes), slack)
        slack = tl.where(source, tl.maximum(-rest, 0), slack)
        rows = _replaced(rows, rows[0] - tl.where(source, tokens << M_BITS, 0))
        slot = tl.max(tl.where(target, slots - free, 0), 0) if S > 1 else 0
        entry = (code.to(tl.int64) << CODE_SHIFT) | tokens.to(UNSIGNED).to(tl.int64)
        tl.store(table + at * S + slot, entry, mask=found)
        free -= target.to(tl.int32)
        if TIMED:
            sent += source.to(tl.int32)
        copies += 1
        kept += tl.minimum(tokens, chosen >> G_BITS)
        stays = again < other
        next_ = tl.minimum(again, other)
        hot = tl.where(stays, left, other_hot)
        if FILL:
            need = tl.where(stays, rest, other_need)

    found = found & (next_ == BIG)
    if found:
        lost = tl.zeros((GP,), KEY)
        for i in tl.static_range(M):
            local = (MP - 1 - (rows[i] & (MP - 1))).to(tl.int32)
            had = tl.load(own_p + local * R + first_rank + g, mask=g < D, other=0).to(KEY)
            lost += tl.maximum(had - (rows[i] >> M_BITS), 0)
        stay = kept - tl.sum(lost, 0)
        shift = 0
        if KEY == tl.int64:
            while (total >> (31 + shift)) > 0:
                shift += 1
        cost = (mean >> shift).to(tl.int64) * copies - WORTH * (stay >> shift).to(tl.int64)
        key = (class_.to(tl.int64) << CLASS_SHIFT) + ((cost + COST_BIAS) << 8) + c
        if TIMED:
            moved = tl.max(tl.maximum(sent, slots - free), 0)
            key = ((tau + copy_tokens.to(tl.int64) * moved) << 8) + c
        key += tl.min(touched >> 31, 0)  # zero, for nothing is negative: uses what was prefetched
        tl.atomic_min(key_p, key, sem="relaxed")
    return found


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
    rows, c, sign, near, near_full, best_fit, slots, own_p, counts_p, column_p, key_p, fine_p, done_p, table_p, tolerance,
    copy_tokens, first_rank, R, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr,
    M_BITS: tl.constexpr, SP: tl.constexpr, EVEN: tl.constexpr, TIMED: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """The threshold and the class of candidate c, and its search. rows: the experts' tokens, by local index."""
    MP: tl.constexpr = 1 << M_BITS
    load = rows[0].to(KEY)
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
        order = _hottest_first(packed, M_BITS)[:M]
        if c < FEW:
            found = _find_copies(order, load, good, mean, worst, total, c, c * 0, copy_tokens, sign, near, near_full, best_fit,
                                 slots, own_p, counts_p, column_p, key_p, table_p, first_rank, R, D, M, S, G_BITS, M_BITS,
                                 SP, EVEN, TIMED, False, KEY)  # fmt: skip
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
                _find_copies(order, load, tau, mean, worst, total, c, class_, copy_tokens, sign, near, near_full, best_fit,
                             slots, own_p, counts_p, column_p, key_here, table_p, first_rank, R, D, M, S, G_BITS, M_BITS,
                             SP, EVEN, TIMED, True, KEY)  # fmt: skip
            if c < LADDER_ENDS:
                tl.atomic_add(done_p, 1, sem="acq_rel")


@triton.jit
def search(
    own_p, load_p, counts_p, column_p, slots_p, methods_p, key_p, flag_p, table_p, tolerance, copy_tokens, R,
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
    rows = (tl.load(load_p + first_rank + g, mask=g < D, other=0),)
    load = rows[0]
    for m in tl.static_range(1, M):
        rows += (tl.load(load_p + m * R + first_rank + g, mask=g < D, other=0),)
        load += rows[m]
    narrow = tl.max(tl.minimum(load, MOST).to(tl.int32), 0) < MOST
    if c == 0:
        tl.store(flag_p + domain, narrow.to(tl.int32))
    keys, fine, done = key_p + domain, key_p + DOMAINS + domain, key_p + 2 * DOMAINS + domain
    table = table_p + domain.to(tl.int64) * ALL_C * (D * S)
    if narrow:
        _candidate(rows, c, sign, near, near_full, best_fit, slots, own_p, counts_p, column_p, keys, fine, done, table,
                   tolerance, copy_tokens, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, TIMED, tl.int32)  # fmt: skip
    else:
        _candidate(rows, c, sign, near, near_full, best_fit, slots, own_p, counts_p, column_p, keys, fine, done, table,
                   tolerance, copy_tokens, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, TIMED, tl.int64)  # fmt: skip
