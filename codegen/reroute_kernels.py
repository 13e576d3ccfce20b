"""The Triton kernels behind `reroute.reroute_and_place`.

    mark      tiles of 64 tokens: which tokens chose which expert, one bit a token; beside them, in the same launch,
              the tables of the plan: where each physical expert's rows lie, and the copies of each expert
    add_up    only with more than 128 tiles: counts of all tiles before each 128th
    deal      number of every pair among those of its expert, its copy, its position
    lead      where a token may choose an expert twice: which of its pairs travel together

Only `mark` uses atomics, on bits that are set once: the same result on every run. Programs run each instruction once, so
what they wait for is often their own code: tiles are small and reductions lie along threads to keep it short.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.ops.grouped_gemm import ROW_ALIGNMENT

TILE = tl.constexpr(64)  # tokens of a tile: the bits of a word
GROUP = tl.constexpr(128)  # tiles whose counts one program of `deal` adds up
ALIGN = tl.constexpr(ROW_ALIGNMENT)


@triton.jit
def _ones(x):
    """Number of bits set in each int64."""
    x = x.to(tl.uint64)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return (x & 0x7F).to(tl.int32)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _places(
    shares_p, places_p, offsets_p, loads_p, rank, low, high, block, R,
    M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, GP: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Places, own offsets and loads of BLOCK ranks; see `reroute.Window`."""
    L: tl.constexpr = M + S
    r = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    g = tl.arange(0, GP)[None, :]
    p = r * L + g
    live = (r < R) & (g < L)
    quota = tl.zeros((BLOCK, GP), tl.int32)
    below = tl.zeros((BLOCK, GP), tl.int32)
    for start in range(0, R, SOURCES):
        s = start + tl.arange(0, SOURCES)[:, None, None]
        share = tl.load(shares_p + s * (R * L) + p[None], mask=live[None] & (s < R), other=0)
        more, less = tl.reduce((share, tl.where(s < rank, share, 0)), 0, _add2)
        quota += more
        below += less
    start = tl.cumsum(quota, 1) - quota
    first = tl.maximum(start, low)
    count = tl.maximum(tl.minimum(start + quota, high) - first, 0)
    padded = (count + ALIGN - 1) // ALIGN * ALIGN
    end = tl.cumsum(padded, 1)
    tl.store(places_p + p * 4, end - padded - first, mask=live)
    tl.store(places_p + p * 4 + 1, first, mask=live)
    tl.store(places_p + p * 4 + 2, count, mask=live)
    tl.store(places_p + p * 4 + 3, start + below, mask=live)
    own = offsets_p + p - rank * L
    tl.store(own + 1, end, mask=live & (r == rank))
    tl.store(own, tl.zeros((BLOCK, GP), tl.int32), mask=live & (r == rank) & (g == 0))
    tl.store(loads_p + r, tl.sum(quota, 1)[:, None], mask=r < R)


@triton.jit(do_not_specialize=["rank", "capacity"])
def tabulate(
    shares_p, places_p, offsets_p, loads_p, index_p, rank, capacity, R,
    M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, GP: tl.constexpr, SOURCES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`reroute.Window` of the round whose number lies at index_p."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    low = tl.load(index_p).to(tl.int32) * capacity
    _places(shares_p, places_p, offsets_p, loads_p, rank, low, low + capacity, tl.program_id(0), R, M, S, BLOCK, GP,
            SOURCES)  # fmt: skip


@triton.jit
def _copies(
    own_p, slot_expert_p, first_p, order_p, upto_p, block, E, R,
    M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, GP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The physical experts of BLOCK ranks in their places among all, sorted by (expert, physical).

    order: physical expert; upto: own shares of the expert's copies up to and with it; first [E + 1]: where each
    expert's copies begin. Every physical expert is a query against the list of slots: nothing is sorted.
    """
    L: tl.constexpr = M + S
    g = tl.arange(0, BLOCK * GP) % GP
    r = block * BLOCK + tl.arange(0, BLOCK * GP) // GP
    p = r * L + g
    live = (r < R) & (g < L)
    own = tl.load(own_p + p, mask=live, other=0)
    e = r * M + g
    upto = own
    at = e
    lower = tl.zeros((BLOCK * GP,), tl.int32)
    used = tl.zeros((BLOCK * GP,), tl.int32)
    if S > 0:
        is_slot = g >= M
        e = tl.where(is_slot, tl.load(slot_expert_p + r * S + g - M, mask=live & is_slot, other=-1), e)
        live &= e >= 0
        home = e // M * L + e % M
        after_home = live & is_slot & (home < p)
        upto = own + tl.load(own_p + home, mask=after_home, other=0)
        at = e + after_home.to(tl.int32)
        for start in range(0, R * S, SLOTS):
            x = start + tl.arange(0, SLOTS)
            p_x = x // S * L + M + x % S
            e_x = tl.load(slot_expert_p + x, mask=x < R * S, other=-1)[:, None]
            n_x = tl.load(own_p + p_x, mask=x < R * S, other=0)[:, None]
            held = (e_x >= 0) & (at[None, :] >= 0)
            same = (e_x == e[None, :]) & (p_x[:, None] < p[None, :])
            under = held & (e_x < e[None, :])
            shares, equal, less, all_ = tl.reduce(
                (tl.where(same, n_x, 0), same.to(tl.int32), under.to(tl.int32), held.to(tl.int32)), 0, _add4
            )
            upto += shares
            at += equal + less
            lower += less
            used += all_
    tl.store(order_p + at, p, mask=live)
    tl.store(upto_p + at, upto, mask=live)
    tl.store(first_p + e, e + lower, mask=live & (g < M))
    tl.store(first_p + E + 0 * g, E + used, mask=p == 0)


@triton.jit(do_not_specialize=["rank", "low", "high", "T"])
def mark(
    ids_p, shares_p, slot_expert_p, bits_p, counts_p, places_p, offsets_p, loads_p, first_p, order_p, upto_p,
    rank, low, high, T, E, R, COUNTS: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    GP: tl.constexpr, SOURCES: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """bits int64 [tiles, E]: bit t of a word is set where token t of the tile chose the expert; counts uint8
    [tiles, COUNTS]: bits set. The programs before the tiles make the tables, which take longest.

    Example: tokens [[2, 0], [2, 1]] give bits [1, 2, 3] and counts [1, 1, 2].
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: what came before `mark` is then complete for `deal`, too
    block = tl.program_id(0)
    blocks = tl.cdiv(R, BLOCK)
    if block < blocks:
        _places(shares_p, places_p, offsets_p, loads_p, rank, low, high, block, R, M, S, BLOCK, GP, SOURCES)
    elif block < 2 * blocks:
        _copies(shares_p + rank * R * (M + S), slot_expert_p, first_p, order_p, upto_p, block - blocks, E, R,
                M, S, BLOCK, GP, SLOTS)  # fmt: skip
    else:
        tile = block - 2 * blocks
        e = tl.arange(0, EP)
        row = bits_p + tile.to(tl.int64) * E
        tl.store(row + e, tl.zeros((EP,), tl.int64), mask=e < E)
        k = tl.arange(0, TILE * KP) % KP
        t = tl.arange(0, TILE * KP) // KP
        token = tile * TILE + t
        id = tl.load(ids_p + token.to(tl.int64) * K + k, mask=(token < T) & (k < K), other=-1).to(tl.int32)
        tl.debug_barrier()
        bit = tl.full((TILE * KP,), 1, tl.int64) << t.to(tl.int64)
        tl.atomic_or(row + id, bit, mask=(id >= 0) & (id < E), sem="relaxed", scope="gpu")
        tl.debug_barrier()
        word = tl.load(row + e, mask=e < E, other=0, cache_modifier=".cg")
        tl.store(counts_p + tile.to(tl.int64) * COUNTS + e, _ones(word).to(tl.uint8), mask=e < COUNTS)


@triton.jit
def add_up(counts_p, base_p, E, COUNTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """base int32 [groups, E]: pairs of each expert in all tiles before the group's first."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, group * GROUP, GROUP):
        t = (start + tl.arange(0, GROUP)[:, None]).to(tl.int64)
        total += tl.sum(tl.load(counts_p + t * COUNTS + e[None, :], mask=(e < E)[None, :], other=0).to(tl.int32), 0)
    tl.store(base_p + group * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["capacity", "T"])
def deal(
    ids_p, bits_p, counts_p, base_p, places_p, first_p, order_p, upto_p, physical_p, position_p, lead_p, capacity, T, E,
    COUNTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SPAN: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr,
    L: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr, LEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`ops.routing.deal` for a tile of tokens, and what `Positions` knows of its pairs; see `reroute.Routing`.

    WORDS: power of two that holds the words of four counts each; of SPAN tiles, TILES are read at once. MANY: `add_up`
    has run. WIDE: 64-bit products.
    """
    tile = tl.program_id(0)
    k = tl.arange(0, TILE * KP) % KP
    t = tl.arange(0, TILE * KP) // KP
    token = tile * TILE + t
    pair = token.to(tl.int64) * K + k
    inside = (token < T) & (k < K)
    id = tl.load(ids_p + pair, mask=inside, other=-1).to(tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    live = (id >= 0) & (id < E)
    e = tl.where(live, id, 0)
    word = tl.load(bits_p + tile.to(tl.int64) * E + e, mask=live, other=0)
    a = tl.load(first_p + e)
    b = tl.load(first_p + e + 1)

    # counts of the earlier tiles of the group: four experts to a word, sums of 16 bits
    w = tl.arange(0, WORDS)
    group = tile // GROUP
    even = tl.zeros((WORDS,), tl.int32)
    odd = tl.zeros((WORDS,), tl.int32)
    for start in tl.static_range(0, SPAN, TILES):
        earlier = group * GROUP + start + tl.arange(0, TILES)[:, None]
        four = tl.load(counts_p.to(tl.pointer_type(tl.int32)) + earlier.to(tl.int64) * (COUNTS // 4) + w[None, :],
                       mask=(earlier < tile) & (w < COUNTS // 4)[None, :], other=0)  # fmt: skip
        even += tl.sum(four & 0x00FF00FF, 0)
        odd += tl.sum((four >> 8) & 0x00FF00FF, 0)
    sums = tl.where((e & 1) == 0, tl.gather(even, e >> 2, 0), tl.gather(odd, e >> 2, 0))
    number = (sums >> ((e & 2) * 8)) & 0xFFFF
    number += _ones(word & ((tl.full((TILE * KP,), 1, tl.int64) << t.to(tl.int64)) - 1))
    if MANY:
        number += tl.load(base_p + group * E + e)

    low = tl.zeros((TILE * KP,), tl.int32)
    high = tl.load(upto_p + b - 1)
    while tl.max(tl.where(live, b - a, 0), 0) > 1:
        middle = (a + b) // 2
        open_ = live & (b - a > 1)
        cut = tl.load(upto_p + middle - 1, mask=open_, other=0)
        left = cut - low
        size = tl.where(open_, high - low, 1)
        if WIDE:
            share = number.to(tl.int64) * left
            lefts = share // size
            steps = share - lefts * size + left >= size
            lefts = lefts.to(tl.int32)
        else:
            share = number.to(tl.uint32) * left.to(tl.uint32)
            lefts = (share // size.to(tl.uint32)).to(tl.int32)
            steps = (share.to(tl.int32) - lefts * size) + left >= size
        goes_left = open_ & steps
        goes_right = open_ & (steps == 0)
        number = tl.where(goes_left, lefts, tl.where(goes_right, number - lefts, number))
        b = tl.where(goes_left, middle, b)
        high = tl.where(goes_left, cut, high)
        a = tl.where(goes_right, middle, a)
        low = tl.where(goes_right, cut, low)
    physical = tl.load(order_p + a, mask=live, other=-1)
    position = number + tl.load(places_p + physical * 4 + 3, mask=live, other=0)
    tl.store(physical_p + pair, physical, mask=inside)
    tl.store(position_p + pair, tl.where(live, position, -1), mask=inside)
    if LEAD:
        _lead(physical, position, live, lead_p, tile, capacity, T, K, KP, L)


@triton.jit
def _lead(physical, position, live, lead_p, tile, capacity, T, K: tl.constexpr, KP: tl.constexpr, L: tl.constexpr):
    """The first choice of the same token that travels to the same rank in the same round."""
    k = tl.arange(0, KP)
    trip = ((physical // L).to(tl.int64) << 32) + position // capacity
    trip = tl.reshape(tl.where(live, trip, -1 - (tl.arange(0, TILE * KP) % KP)), (TILE, KP))
    same = trip[:, :, None] == trip[:, None, :]
    lead = tl.min(tl.where(same, k[None, None, :], KP), 2)
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    tl.store(lead_p + token.to(tl.int64) * K + k[None, :], lead.to(tl.uint8), mask=(token < T) & (k < K)[None, :])


@triton.jit(do_not_specialize=["capacity", "T"])
def lead(
    physical_p, position_p, lead_p, capacity, T, K: tl.constexpr, KP: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first choice of the same token with the same destination rank and round, of BLOCK tokens; see `reroute.Routing`.

    Example: physical [[0, 5, 1]] with L=3 and one round give leads [[0, 1, 0]].
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.arange(0, KP)[None, :]
    pair = t.to(tl.int64) * K + k
    inside = (t < T) & (k < K)
    physical = tl.load(physical_p + pair, mask=inside, other=-1)
    position = tl.load(position_p + pair, mask=inside, other=0)
    trip = ((physical // L).to(tl.int64) << 32) | (position // capacity).to(tl.int64)
    trip = tl.where(physical >= 0, trip, -1 - k.to(tl.int64))  # travels nowhere: like no other
    same = trip[:, :, None] == trip[:, None, :]
    first = tl.min(tl.where(same, tl.arange(0, KP)[None, None, :], KP), 2)
    tl.store(lead_p + pair, first.to(tl.uint8), mask=inside)
