"""The loop over copies of one candidate: `planner.search.find_copies`, by one warp.

A rank is a lane (GP lanes, ranks first). Every choice is the minimum or maximum of a packed key, value * GP + lane: one
instruction over a warp where keys have 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.codegen.hottest_kernels import in_registers, lost, replaced, row_of, stored
from ultraep_compile.planner.quota import COPY_WORTH

CODE_SHIFT = tl.constexpr(40)  # a slot's entry = code of its expert << 40 | tokens, -1 where it is empty
CLASS_SHIFT = tl.constexpr(51)  # key = class << 51 | (cost + 2^42) << 8 | candidate
COST_BIAS = tl.constexpr(2**42)
WORTH = tl.constexpr(COPY_WORTH)


@triton.jit
def find_copies(
    rows, load, tau, mean, worst, total, c, class_, copy_tokens, sign, near, near_full, best_fit, slots, own_p, counts_p,
    column_p, key_p, table_p, keys_p, first_rank, R, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr,
    M_BITS: tl.constexpr, SP: tl.constexpr, EVEN: tl.constexpr, TIMED: tl.constexpr, FILL: tl.constexpr,
    KEY: tl.constexpr,
):  # fmt: skip
    """`planner.search.find_copies` for one method and threshold; keys and loads have type KEY. Whether it found them.

    rows, keys_p: the experts of every rank, of `hottest_kernels`.
    sign: -1 for the least load first, 1 for the most load first.
    FILL: one of LOW_LOAD (hottest first, every copy fills its target up), else one of FEW_COPIES.
    """
    GP: tl.constexpr = 1 << G_BITS
    MP: tl.constexpr = 1 << M_BITS
    REGISTERS: tl.constexpr = in_registers(M, GP)
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

    # bring the columns that are read first into the L1 cache, all at once: they have 8 ranks to a sector. The loads are
    # written out, so that no lane's values move to another; for more ranks that would be too much code
    columns = column_p + first_rank * (MP * GP)
    touched = tl.zeros((GP,), tl.int32)
    if KEY == tl.int32 and D <= 128:
        first = columns + (((g << M_BITS) + (rows[0] & (MP - 1))) << G_BITS)
        for sector in tl.static_range(0, D, 8):
            touched |= tl.load(first + sector, mask=over > 0, other=0)
        if M > 1:  # the second one's, where the hottest alone cannot do
            second = columns + (((g << M_BITS) + (rows[1] & (MP - 1))) << G_BITS)
            for sector in tl.static_range(0, D, 8):
                touched |= tl.load(second + sector, mask=over > rows[0] >> M_BITS, other=0)
        if REGISTERS:
            for m in tl.static_range(M):
                own = tl.load(own_p + m * R + first_rank + g, mask=g < D, other=0)
                touched |= (own & 1).to(tl.int32)

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
        if not REGISTERS:
            row = row_of(keys_p, from_, MP, KEY)
            had = tl.load(own_p + (MP - 1 - (code & (MP - 1))) * R + first_rank + from_).to(KEY)
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
        lowered = left
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
        if REGISTERS:
            rows = replaced(rows, rows[0] - tl.where(source, tokens << M_BITS, 0))
        else:
            rows = stored(rows, row, keys_p, code, hot, lowered, left, source)
        slot = tl.max(tl.where(target, slots - free, 0), 0) if S > 1 else 0
        entry = (code.to(tl.int64) << CODE_SHIFT) | tokens.to(UNSIGNED).to(tl.int64)
        tl.store(table + at * S + slot, entry, mask=found)
        free -= target.to(tl.int32)
        if TIMED:
            sent += source.to(tl.int32)
        copies += 1
        kept += tl.minimum(tokens, chosen >> G_BITS)
        if not REGISTERS:
            kept -= tl.minimum(tl.maximum(had - (lowered >> M_BITS), 0), tokens)
        stays = again < other
        next_ = tl.minimum(again, other)
        hot = tl.where(stays, left, other_hot)
        if FILL:
            need = tl.where(stays, rest, other_need)

    found = found & (next_ == BIG)
    if found:
        stay = kept
        if REGISTERS:
            stay -= tl.sum(lost(rows, own_p, first_rank, R, D, M, GP, M_BITS, KEY), 0)
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
