"""The launches around the search: column sums before it, quotas and exact shares of the best candidate after it.

`finish` is `planner.shares.split_quotas`, in closed form: every physical expert is a query against the list of slots,
so there is no scan and no sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.codegen.copies_kernel import CODE_SHIFT
from ultraep_compile.codegen.search_kernel import NONE

TOKENS_MASK = tl.constexpr(2**40 - 1)


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def prepare(
    counts_p, load_p, own_p, column_p, before_p, key_p, heat_p, keys_p, rank, R, E, D: tl.constexpr, M: tl.constexpr,
    DOMAINS: tl.constexpr, G_BITS: tl.constexpr, M_BITS: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ALL: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of BLOCK experts, in int64: load [M, R], own [M, R]: tokens that their home or other domains have for them,
    before [E] (or [R, E] if ALL): tokens of lower ranks; and column int32 [R, MP, GP]: what the GP lanes of the home's
    domain have for each of its experts, last one first, as keys of `search`: tokens << G_BITS | GP - 1 - lane.

    KEYS: of one rank's experts, BLOCK >= M, also what `hottest_kernels` reads instead of registers: heat [3, R], the rank's
    load and its two hottest experts' keys, and keys [R, MP], by the experts' codes.

    Example: counts [[3, 1], [4, 0]] give load [[7, 1]], own [[3, 0]], before [[0, 0], [3, 1]], and in column the
    tokens [[[3, 4]], [[1, 0]]].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    local = tl.arange(0, BLOCK)
    e = tl.program_id(0) * BLOCK + local
    if KEYS:
        e = tl.where(local < M, tl.program_id(0) * M + local, E)
    r = tl.arange(0, RP)
    inside = (r[:, None] < R) & (e[None, :] < E)
    n = tl.load(counts_p + r[:, None] * E + e[None, :], mask=inside, other=0)
    wide = n.to(tl.int64)
    home = (e // M)[None, :]
    elsewhere = (r[:, None] // D == home // D) & (r[:, None] != home)
    load, other, below = tl.reduce(
        (wide, tl.where(elsewhere, wide, 0), tl.where(r[:, None] < rank, wide, 0)), 0, _add3
    )
    tl.store(load_p + e % M * R + e // M, load, mask=e < E)
    tl.store(own_p + e % M * R + e // M, load - other, mask=e < E)
    lane = r[:, None] % D
    column = (home << M_BITS) + ((1 << M_BITS) - 1 - e % M)[None, :]
    demand = (n << G_BITS) + ((1 << G_BITS) - 1 - lane)
    tl.store(column_p + (column << G_BITS) + lane, demand, mask=inside & (r[:, None] // D == home // D))
    if ALL:
        tl.store(before_p + r[:, None] * E + e[None, :], tl.cumsum(wide, 0) - wide, mask=inside)
    else:
        tl.store(before_p + e, below, mask=e < E)
    if KEYS:
        home_rank = tl.program_id(0)
        key = tl.where(local < M, (load << M_BITS) + (BLOCK - 1 - local), -1)
        hottest = tl.max(key, 0)
        tl.store(keys_p + home_rank * BLOCK + (BLOCK - 1 - local), key)
        tl.store(heat_p + home_rank, tl.sum(load, 0))
        tl.store(heat_p + R + home_rank, hottest)
        tl.store(heat_p + 2 * R + home_rank, tl.max(tl.where(key == hottest, -1, key), 0))
    if tl.program_id(0) == 0:
        for k in tl.static_range(3 * DOMAINS):
            tl.store(key_p + k, NONE if k < 2 * DOMAINS else 0)


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _expert(entry, first_rank, M: tl.constexpr, M_BITS: tl.constexpr):
    """The logical expert of a slot's entry, -1 where it is empty."""
    code = (entry >> CODE_SHIFT).to(tl.int32)
    expert = (first_rank + (code >> M_BITS)) * M + ((1 << M_BITS) - 1 - (code & ((1 << M_BITS) - 1)))
    return tl.where(code >= 0, expert, -1)


@triton.jit
def _shares(
    q, table_p, found, counts_p, load_p, before_p, slot_expert_p, quota_p, shares_p, first_rank, rank, write, E, R,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, M_BITS: tl.constexpr, XP: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """Quota and share of instances q of a domain: masters 0..D*M-1, then slots; INT holds every sum."""
    X: tl.constexpr = D * S
    j = tl.arange(0, XP)
    entry_j = tl.load(table_p + j, mask=(j < X) & found, other=-1)
    e_j = _expert(entry_j, first_rank, M, M_BITS)
    q_j = tl.where(e_j >= 0, entry_j & TOKENS_MASK, 0).to(INT)
    host_j = first_rank + j // S
    f_j = tl.minimum(tl.load(counts_p + host_j * E + e_j, mask=e_j >= 0, other=0).to(INT), q_j)  # served at home

    slot = q - D * M
    is_slot = (slot >= 0) & (slot < X)
    slot = tl.where(is_slot, slot, 0)
    entry = tl.load(table_p + slot, mask=is_slot & found, other=-1)
    held = _expert(entry, first_rank, M, M_BITS)
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
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, M_BITS: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr,
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
    best = tl.where(fine != NONE, fine, coarse) & 255
    table = table_p + (domain * ALL_C + tl.where(found, best, 0)).to(tl.int64) * (D * S)
    slots = slot_expert_p + domain * D * S
    write = tl.program_id(1) == 0
    if tl.load(flag_p + domain) != 0:
        _shares(q, table, found, counts_p, load_p, before_p, slots, quota_p, shares_p, domain * D,
                rank, write, E, R, D, M, S, M_BITS, XP, tl.int32)  # fmt: skip
    else:
        _shares(q, table, found, counts_p, load_p, before_p, slots, quota_p, shares_p, domain * D,
                rank, write, E, R, D, M, S, M_BITS, XP, tl.int64)  # fmt: skip
