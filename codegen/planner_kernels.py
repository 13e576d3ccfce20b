"""The planner `quota` as four Triton launches, from all-gathered counts to placement, quotas and shares.

    prepare   column sums, the counts by expert, prefix sums over source ranks
    search    one program of one warp per candidate: every method at every threshold, side by side
    refine    the thresholds in the step below the lowest that was reached; returns at once where 1% was reached
    finish    the chosen candidate's slots, quotas and exact shares

Same integers, same ties, so the same plan bit for bit as `ultraep_compile.planner.quota` (the reference, in plain
Python). Nothing is read on the host, shapes are fixed, the launches can be captured in a CUDA graph.

In `search` a rank is a lane (GP lanes, ranks first), the experts of a rank lie along axis 0, in registers. Every
choice is the minimum or maximum of a packed key, value * GP + lane: one instruction over a warp where keys have
32 bits. Loads whose keys do not fit are planned with 64 bits by the second branch of the same kernel.

Candidate c of a domain writes table c of [C, D*S] and offers its key, class | cost | c, to an atomic minimum:
class 0 is the good enough threshold, class 1 + i the i-th of the ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultraep_compile.planner.quota import COPY_WORTH, FEW_COPIES, LADDER, LOW_LOAD, TOLERANCE
from ultraep_compile.planner.search import Method

NONE = tl.constexpr(2**63 - 1)  # the key where no candidate was found
EXPERT_SHIFT = tl.constexpr(40)  # a slot's entry = expert << 40 | tokens, -1 where it is empty
TOKENS_MASK = tl.constexpr(2**40 - 1)
CLASS_SHIFT = tl.constexpr(51)  # key = class << 51 | (cost + 2^42) << 8 | candidate
COST_BIAS = tl.constexpr(2**42)
FEW = tl.constexpr(len(FEW_COPIES))
LOW = tl.constexpr(len(LOW_LOAD))
RUNGS = tl.constexpr(LADDER)
WORTH = tl.constexpr(COPY_WORTH)
CANDIDATES = len(FEW_COPIES) + LADDER * len(LOW_LOAD)
REFINED = LADDER * len(LOW_LOAD)
BLOCK = 16  # experts of a program of `prepare`
INSTANCES = 8  # of a program of `finish`


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def prepare(
    counts_p, load_p, own_p, column_p, before_p, key_p, rank, R, E, D: tl.constexpr, M: tl.constexpr,
    DOMAINS: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of BLOCK experts, in int64: load [M, R], own [M, R]: tokens that their home or other domains have for them,
    before [E] (or [R, E] if ALL): tokens of lower ranks; and column int32 [E, R].

    Example: counts [[3, 1], [4, 0]] give load [[7, 1]], own [[3, 0]], column [[3, 4], [1, 0]] and
    before [[0, 0], [3, 1]].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RP)
    inside = (r[:, None] < R) & (e[None, :] < E)
    n = tl.load(counts_p + r[:, None] * E + e[None, :], mask=inside, other=0)
    wide = n.to(tl.int64)
    home = (e // M)[None, :]
    elsewhere = (r[:, None] // D == home // D) & (r[:, None] != home)
    load, other, below = tl.reduce((wide, tl.where(elsewhere, wide, 0), tl.where(r[:, None] < rank, wide, 0)), 0, _add3)
    tl.store(load_p + e % M * R + e // M, load, mask=e < E)
    tl.store(own_p + e % M * R + e // M, load - other, mask=e < E)
    tl.store(column_p + e[None, :] * R + r[:, None], n, mask=inside)
    if ALL:
        tl.store(before_p + r[:, None] * E + e[None, :], tl.cumsum(wide, 0) - wide, mask=inside)
    else:
        tl.store(before_p + e, below, mask=e < E)
    if tl.program_id(0) == 0:
        for k in tl.static_range(2 * DOMAINS):
            tl.store(key_p + k, NONE)


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
def _find_copies(
    left, tau, mean, worst, total, c, class_, sign, near, near_full, best_fit, slots, own_p, column_p, key_p, table_p,
    first_rank, R, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr, M_BITS: tl.constexpr,
    SP: tl.constexpr, EVEN: tl.constexpr, FILL: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """`planner.search.find_copies` for one method and threshold; keys and loads have type KEY.

    left [MP, GP]: tokens of each expert of each rank. A rank's `room` is tau less its load, negative above tau.
    sign: -1 for the least load first, 1 for the most load first.
    FILL: one of LOW_LOAD (hottest first, every copy fills its target up), else one of FEW_COPIES.
    """
    GP: tl.constexpr = 1 << G_BITS
    MP: tl.constexpr = 1 << M_BITS
    BIG: tl.constexpr = 2**31 - 1 if KEY == tl.int32 else 2**63 - 1
    near = ((tau >> 10) * near + ((tau & 1023) * near >> 10)).to(KEY)

    g = tl.arange(0, GP)
    m = tl.arange(0, MP)[:, None]
    s = tl.arange(0, SP)[:, None]
    lane = g[None, :]
    mine = (lane < D) & (m < M)
    table = table_p + c * (D * S)
    tl.store(table + lane * S + s, tl.full((SP, GP), -1, tl.int64), mask=(lane < D) & (s < S))
    tl.debug_barrier()  # other lanes may write there
    room = tau - tl.sum(left, 0)
    own = tl.load(own_p + m * R + first_rank + lane, mask=mine, other=0).to(KEY)
    free = slots
    kept = near * 0
    copies = 0
    may_import = near >= 0  # always: the rank that exports has slots
    found = may_import
    wanted = may_import

    packed = (left << M_BITS) + (MP - 1 - m)
    hottest = tl.max(packed, 0)
    # bring the columns that are read first into the L1 cache, all at once: they have 8 ranks to a sector
    touched = tl.zeros((GP,), tl.int32)
    first_column = ((first_rank + g) * M + (MP - 1 - (hottest & (MP - 1))).to(tl.int32)) * R + first_rank
    for sector in tl.static_range(0, D, 8):
        touched |= tl.load(column_p + first_column + sector, mask=(g < D) & (room < 0), other=0)
    last = tl.where(sign < 0, 0, worst - tau)
    turn = worst - (hottest >> M_BITS) if FILL else last + sign * room
    next_ = tl.min(tl.where(room < 0, (turn << G_BITS) + g, BIG), 0)
    while found & wanted & (next_ != BIG):
        source = g == (next_ & (GP - 1)).to(tl.int32)
        need = tl.max(tl.where(source, -room, 0), 0)
        hot = tl.max(tl.where(source, hottest, 0), 0)
        if not EVEN:
            may_import = tl.max(tl.where(source, slots, 0), 0) > 0
        available = hot >> M_BITS
        want = tl.minimum(need, available)
        which = (first_rank + (next_ & (GP - 1)).to(tl.int32)) * M + (MP - 1 - (hot & (MP - 1))).to(tl.int32)
        demand = tl.load(column_p + which * R + first_rank + g, mask=g < D, other=0).to(KEY)

        # the tightest slack that takes all; where there is none, BIG less the largest slack
        slack = tl.where(free > 0, tl.maximum(room, 0), 0)
        enough = tl.where(best_fit, want, BIG)
        fit = tl.min(tl.where(slack >= enough, slack, BIG - slack), 0)
        fits = fit < BIG // 2
        most = BIG - fit
        found = fit != BIG
        low = most - ((most >> 10) * near_full + ((most & 1023) * near_full >> 10))
        low = tl.where(fits, fit, tl.maximum(low, 1))
        high = tl.where(fits, fit + near, BIG)
        rival = (slack >= low) & (slack <= high)
        chosen = tl.max(tl.where(rival, (demand << G_BITS) + (GP - 1 - g), -1), 0)
        at = (GP - 1 - (chosen & (GP - 1))).to(tl.int32)
        target = g == at
        fill = may_import if FILL else (free == 1) & may_import
        tokens = tl.max(tl.where(target, tl.minimum(tl.where(fill, available, want), slack), 0), 0)

        slot = tl.max(tl.where(target, slots - free, 0), 0)
        tl.store(table + at * S + slot, (which.to(tl.int64) << EXPERT_SHIFT) + tokens, mask=found)
        free -= target.to(tl.int32)
        copies += 1
        kept += tl.minimum(tokens, chosen >> G_BITS)
        room += tl.where(source, tokens, 0) - tl.where(target, tokens, 0)
        packed -= tl.where(source[None, :] & (packed == hot), tokens << M_BITS, 0)
        hottest = tl.max(packed, 0)
        turn = worst - (hottest >> M_BITS) if FILL else last + sign * room
        next_ = tl.min(tl.where(room < 0, (turn << G_BITS) + g, BIG), 0)
        if FILL:  # until something of a lower class is found
            wanted = (tl.load(key_p, volatile=True) >> CLASS_SHIFT) >= class_

    if found & (next_ == BIG):
        lost = tl.maximum(own - (packed >> M_BITS), 0)
        local = kept - tl.sum(tl.sum(lost, 0), 0)
        shift = 0
        if KEY == tl.int64:
            while (total >> (31 + shift)) > 0:
                shift += 1
        cost = (mean >> shift).to(tl.int64) * copies - WORTH * (local >> shift).to(tl.int64)
        cost += tl.min(touched >> 31, 0)  # zero: uses what was prefetched
        key = (class_.to(tl.int64) << CLASS_SHIFT) + ((cost + COST_BIAS) << 8) + c
        tl.atomic_min(key_p, key, sem="relaxed")


@triton.jit
def _candidate(
    left, c, reached, sign, near, near_full, best_fit, slots, own_p, column_p, key_p, table_p, tolerance, first_rank, R,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr, M_BITS: tl.constexpr,
    SP: tl.constexpr, EVEN: tl.constexpr, REFINE: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """The threshold and the method of candidate c, and its search."""
    left = left.to(KEY)
    load = tl.sum(left, 0)
    total = tl.sum(load, 0)
    worst = tl.max(load, 0)
    mean = (total + D - 1) // D
    # total * (10000 + tolerance) // (10000 * D), without passing 2^63
    UNIT: tl.constexpr = 10000 * D
    whole = total.to(tl.int64)
    good = whole // UNIT * (10000 + tolerance) + whole % UNIT * (10000 + tolerance) // UNIT
    good = tl.maximum(mean, good.to(KEY))
    if worst > good:
        if REFINE:
            class_ = c // LOW
            below = _rung(good, mean, worst, reached - 2)
            step = (_rung(good, mean, worst, reached - 1) - below).to(tl.int64)
            tau = below + (step * (class_ + 1) // (RUNGS + 1)).to(KEY)
        else:
            class_ = tl.where(c < FEW, 0, (c - FEW) // LOW + 1)
            tau = _rung(good, mean, worst, tl.maximum(class_ - 1, 0))
        if REFINE:
            _find_copies(left, tau, mean, worst, total, c, class_, sign, near, near_full, best_fit, slots, own_p,
                         column_p, key_p, table_p, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, True,
                         KEY)  # fmt: skip
        elif c >= FEW:
            _find_copies(left, tau, mean, worst, total, c, class_, sign, near, near_full, best_fit, slots, own_p,
                         column_p, key_p, table_p, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, True,
                         KEY)  # fmt: skip
        else:
            _find_copies(left, tau, mean, worst, total, c, class_, sign, near, near_full, best_fit, slots, own_p,
                         column_p, key_p, table_p, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, False,
                         KEY)  # fmt: skip


@triton.jit
def search(
    own_p, load_p, column_p, slots_p, methods_p, key_p, flag_p, table_p, tolerance, R, DOMAINS,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, G_BITS: tl.constexpr, M_BITS: tl.constexpr, SP: tl.constexpr,
    EVEN: tl.constexpr, ALL_C: tl.constexpr, REFINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One candidate of one domain.

    REFINE: of the thresholds below the lowest rung that was reached.
    """
    GP: tl.constexpr = 1 << G_BITS
    MP: tl.constexpr = 1 << M_BITS
    MOST: tl.constexpr = 2**30 // (GP if GP > MP else MP)  # keys of 32 bits hold loads below this
    domain = tl.program_id(0)
    c = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first_rank = domain * D
    lane = tl.arange(0, GP)
    method = FEW + c % LOW if REFINE else tl.where(c < FEW, c, FEW + (c - FEW) % LOW)
    sign = tl.load(methods_p + method * 4)
    near = tl.load(methods_p + method * 4 + 1)
    near_full = tl.load(methods_p + method * 4 + 2)
    best_fit = tl.load(methods_p + method * 4 + 3) != 0
    slots = tl.load(slots_p + first_rank + lane, mask=lane < D, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    keys = key_p + domain
    table = domain.to(tl.int64) * ALL_C
    reached = 0
    go = c >= 0
    if REFINE:
        first = tl.load(keys)
        reached = (first >> CLASS_SHIFT).to(tl.int32)
        go = (first != NONE) & (reached > 1)
        keys += DOMAINS
        table += FEW + RUNGS * LOW
    if go:
        g = tl.arange(0, GP)[None, :]
        m = tl.arange(0, MP)[:, None]
        left = tl.load(load_p + m * R + first_rank + g, mask=(g < D) & (m < M), other=0)
        narrow = tl.max(tl.sum(tl.minimum(left, MOST).to(tl.int32), 0), 0) < MOST
        if c == 0:
            tl.store(flag_p + domain, narrow.to(tl.int32))
        tables = table_p + table * (D * S)
        if narrow:
            _candidate(left, c, reached, sign, near, near_full, best_fit, slots, own_p, column_p, keys, tables,
                       tolerance, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, REFINE, tl.int32)  # fmt: skip
        else:
            _candidate(left, c, reached, sign, near, near_full, best_fit, slots, own_p, column_p, keys, tables,
                       tolerance, first_rank, R, D, M, S, G_BITS, M_BITS, SP, EVEN, REFINE, tl.int64)  # fmt: skip


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _shares(
    q, table_p, found, counts_p, load_p, before_p, slot_expert_p, quota_p, shares_p, first_rank, rank, write, E, R,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, XP: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """Quota and share of instances q of a domain: masters 0..D*M-1, then slots; INT holds every sum."""
    X: tl.constexpr = D * S
    j = tl.arange(0, XP)
    entry_j = tl.load(table_p + j, mask=(j < X) & found, other=-1)
    e_j = (entry_j >> EXPERT_SHIFT).to(tl.int32)
    q_j = tl.where(e_j >= 0, entry_j & TOKENS_MASK, 0).to(INT)
    host_j = first_rank + j // S
    f_j = tl.minimum(tl.load(counts_p + host_j * E + e_j, mask=e_j >= 0, other=0).to(INT), q_j)  # served at home

    slot = q - D * M
    is_slot = (slot >= 0) & (slot < X)
    slot = tl.where(is_slot, slot, 0)
    entry = tl.load(table_p + slot, mask=is_slot & found, other=-1)
    held = (entry >> EXPERT_SHIFT).to(tl.int32)
    tokens = tl.where(held >= 0, entry & TOKENS_MASK, 0).to(INT)
    e = tl.where(q < D * M, first_rank * M + q, held)
    live = e >= 0
    home = e // M
    host = tl.where(is_slot, first_rank + slot // S, home)
    load = tl.load(load_p + e % M * R + home, mask=live, other=0).to(INT)
    before = tl.load(before_p + e, mask=live, other=0).to(INT)
    at_home = tl.load(counts_p + home * E + e, mask=live, other=0).to(INT)
    at_host = tl.load(counts_p + host * E + e, mask=live, other=0).to(INT)
    at_rank = tl.load(counts_p + rank * E + e, mask=live, other=0).to(INT)

    same = (e_j[:, None] == e[None, :]) & live[None, :]
    served = tl.where(same, f_j[:, None], 0)
    sent = tl.where(same, q_j[:, None], 0)
    host_2 = host_j[:, None]
    exported, served_below, served_here, line = tl.reduce(
        (
            sent,
            tl.where(host_2 < rank, served, 0),
            tl.where(host_2 == rank, served, 0),
            tl.where(host_2 < host[None, :], sent - served, 0),
        ),
        0,
        _add4,
    )
    master = load - exported
    master_served = tl.minimum(at_home, master)
    quota = tl.where(is_slot, tokens, master)
    own = tl.minimum(at_host, quota)
    # the rank's demand and the instance's room, as intervals on a line
    demand_from = before - served_below - tl.where(home < rank, master_served, 0)
    demand_to = demand_from + at_rank - served_here - tl.where(home == rank, master_served, 0)
    room_from = line + tl.where(home < host, master - master_served, 0)
    room_to = room_from + quota - own
    share = tl.maximum(tl.minimum(demand_to, room_to) - tl.maximum(demand_from, room_from), 0)
    share += tl.where(host == rank, own, 0)

    physical = host * (M + S) + tl.where(is_slot, M + slot % S, e % M)
    there = live | is_slot
    tl.store(shares_p + physical, tl.where(live, share, 0).to(tl.int32), mask=there)
    if write:
        tl.store(quota_p + physical, tl.where(live, quota, 0).to(tl.int64), mask=there)
        tl.store(slot_expert_p + (host - first_rank) * S + slot % S, held, mask=is_slot)


@triton.jit
def finish(
    counts_p, load_p, before_p, key_p, flag_p, table_p, slot_expert_p, quota_p, shares_p, rank, E, R, DOMAINS,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr,
    PER_DOMAIN: tl.constexpr, ALL_C: tl.constexpr, ALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`planner.shares.split_quotas` for the best candidate: shares of `rank`, or of all ranks if ALL."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    domain = tl.program_id(0) // PER_DOMAIN
    q = tl.program_id(0) % PER_DOMAIN * BLOCK + tl.arange(0, BLOCK)
    if ALL:
        rank = tl.program_id(1)
        before_p += rank * E
        shares_p += rank.to(tl.int64) * (R * (M + S))
    coarse = tl.load(key_p + domain)
    fine = tl.load(key_p + DOMAINS + domain)
    found = coarse != NONE
    best = tl.where(fine != NONE, FEW + RUNGS * LOW + (fine & 255), coarse & 255)
    table = table_p + (domain * ALL_C + tl.where(found, best, 0)).to(tl.int64) * (D * S)
    slots = slot_expert_p + domain * D * S
    write = tl.program_id(1) == 0
    if tl.load(flag_p + domain) != 0:
        _shares(q, table, found, counts_p, load_p, before_p, slots, quota_p, shares_p, domain * D,
                rank, write, E, R, D, M, S, XP, tl.int32)  # fmt: skip
    else:
        _shares(q, table, found, counts_p, load_p, before_p, slots, quota_p, shares_p, domain * D,
                rank, write, E, R, D, M, S, XP, tl.int64)  # fmt: skip


class DevicePlan(NamedTuple):
    """What the kernels compute, for R ranks with M masters and S slots each, P = R*(M+S)."""

    slot_expert_RS: Tensor  # int32 [R, S]: logical expert in each slot, -1 = empty
    quota_P: Tensor  # int64 [P]: tokens of each physical expert
    shares: Tensor  # int32 [P], what the given rank sends to each; or [R, P], what every rank sends


def plan_on_device(
    counts_RE: Tensor, slots_R: Sequence[int], rank: int | None, domain: int, tolerance: int = TOLERANCE
) -> DevicePlan:
    """The plan of `quota` for int32 counts on a CUDA device (or on the CPU in Triton's interpreter).

    Parameters:
        slots_R: slots of each rank.
        rank: whose shares to compute; None for those of all ranks.
        domain: D, ranks d*D..(d+1)*D-1 exchange copies among themselves only; divides R.
        tolerance: basis points of the mean that the largest load may exceed it by.

    Example: counts [[3, 1], [4, 0]], a slot each, tolerance 0: expert 0 is copied to rank 1, which computes three
    of its own four tokens: slots [[-1], [0]], quotas [4, 0, 1, 3], shares [[3, 0, 1, 0], [1, 0, 0, 3]].
    """
    made, stages = planning_stages(counts_RE, slots_R, rank, domain, tolerance)
    for launch in stages.values():
        launch()
    return made


def planning_stages(
    counts_RE: Tensor, slots_R: Sequence[int], rank: int | None, domain: int, tolerance: int = TOLERANCE
) -> tuple[DevicePlan, dict[str, Callable[[], object]]]:
    """Where the plan will be, and the launches that make it, by name and in order."""
    (ranks, experts), slots, domains = counts_RE.shape, max(slots_R), counts_RE.shape[0] // domain
    masters, device = experts // ranks, counts_RE.device
    assert counts_RE.dtype == torch.int32 and counts_RE.is_contiguous() and slots > 0, "checked by make_plan"
    new, power = counts_RE.new_empty, triton.next_power_of_2
    physical, tables = ranks * (masters + slots), CANDIDATES + REFINED
    everyone, row = rank is None, rank or 0
    made = DevicePlan(
        new(ranks, slots),
        new(physical, dtype=torch.int64),
        new((ranks, physical) if everyone else (physical,)),
    )
    load, own, column = new(experts, dtype=torch.int64), new(experts, dtype=torch.int64), new(experts, ranks)
    before = new(ranks if everyone else 1, experts, dtype=torch.int64)
    key, flag = new(2 * domains, dtype=torch.int64), new(domains)
    table = new(tables * ranks * slots, dtype=torch.int64)
    slots_on_device, methods = _on_device(tuple(slots_R), device), _on_device(_METHODS, device)
    per_domain = triton.cdiv(domain * (masters + slots), INSTANCES)
    on_gpu = counts_RE.is_cuda
    overlap = {"launch_pdl": True} if on_gpu else {}  # a kernel's launch overlaps the end of the one before

    def find(refine: bool) -> object:
        return search[(domains, REFINED if refine else CANDIDATES)](
            own, load, column, slots_on_device, methods, key, flag, table, tolerance, ranks,
            domains, domain, masters, slots, max(_bits(domain), 5), _bits(masters), power(slots),
            len(set(slots_R)) == 1, tables, refine, on_gpu, num_warps=1, **overlap,
        )  # fmt: skip

    return made, {
        "prepare": lambda: prepare[(triton.cdiv(experts, BLOCK),)](
            counts_RE, load, own, column, before, key, row, ranks, experts, domain, masters, domains, power(ranks), BLOCK,
            everyone, on_gpu, num_warps=4, **overlap,
        ),
        "search": lambda: find(False),
        "refine": lambda: find(True),
        "finish": lambda: finish[(domains * per_domain, ranks if everyone else 1)](
            counts_RE, load, before, key, flag, table, *made, row, experts, ranks, domains, domain,
            masters, slots, power(domain * slots), INSTANCES, per_domain, tables, everyone, on_gpu, num_warps=4, **overlap,
        ),
    }  # fmt: skip


def _bits(size: int) -> int:
    """Of the power of two that holds `size` entries."""
    return (size - 1).bit_length()


def _numbers(method: Method) -> tuple[int, ...]:
    return 1 if method.order == "largest" else -1, method.near, method.near_full, int(method.best_fit)


_METHODS = tuple(number for method in (*FEW_COPIES, *LOW_LOAD) for number in _numbers(method))
# what the kernels take for granted of the methods, so that their loops are short
assert not any(m.always_fill or m.order == "hottest" for m in FEW_COPIES)
assert all(m.always_fill and m.order == "hottest" for m in LOW_LOAD)


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant table, uploaded once: an upload while a CUDA graph is captured would fail."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)
