"""The experts of every rank, hottest first, as the search for copies keeps them.

An expert is a key, tokens << M_BITS | MP - 1 - local index. A rank is a lane (GP lanes); `rows` is a tuple of keys by
lane, of which rows[0] is always the hottest and rows[1] the second one.

Where a thread holds few of them (`in_registers`), `rows` has them all, sorted; when one changes, that is two instructions
for each. This code is unrolled, and Triton takes a time for it that grows with the square of its length. Else `rows`
has the two hottest, `prepare` has made the keys, and every candidate a copy of its own in memory, `keys_p` int64 [D, MP]
by the experts' codes (rank in the domain << M_BITS | MP - 1 - local index): a step reads the row of one rank.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def in_registers(masters: int, lanes: int) -> bool:
    """Whether `rows` has all experts: up to 8 registers a thread, or what `rows` has anyway."""
    return masters <= 2 or masters * lanes <= 256


@triton.jit
def _exchanged(rows, size: tl.constexpr, apart: tl.constexpr):
    """One layer of `hottest_first`: rows at this distance change places, in alternate blocks of 2^size the other way."""
    after = ()
    for i in tl.static_range(len(rows)):
        if (((i >> size) & 1) == 0) == ((i & apart) == 0):
            after += (tl.maximum(rows[i], rows[i ^ apart]),)
        else:
            after += (tl.minimum(rows[i], rows[i ^ apart]),)
    return after


@triton.jit
def hottest_first(rows, BITS: tl.constexpr):
    """A tuple of 2^BITS tensors, sorted in descending order at every place: a bitonic network.

    Example: ([3, 1], [5, 0]) gives ([5, 1], [3, 0]).
    """
    for size in tl.static_range(1, BITS + 1):
        for step in tl.static_range(size):
            rows = _exchanged(rows, size, 1 << (size - 1 - step))
    return rows


@triton.jit
def replaced(rows, value):
    """Sorted rows with `value` in the place of the first, sorted again."""
    after = ()
    for i in tl.static_range(1, len(rows)):
        after += (tl.maximum(value, rows[i]),)
        value = tl.minimum(value, rows[i])
    after += (value,)
    return after


@triton.jit
def lost(rows, own_p, first_rank, R, D: tl.constexpr, M: tl.constexpr, GP: tl.constexpr, M_BITS: tl.constexpr, KEY: tl.constexpr):
    """[GP]: of own [M, R], tokens at home, those that masters in registers no longer compute."""
    MP: tl.constexpr = 1 << M_BITS
    g = tl.arange(0, GP)
    out = tl.zeros((GP,), KEY)
    for i in tl.static_range(M):
        local = (MP - 1 - (rows[i] & (MP - 1))).to(tl.int32)
        had = tl.load(own_p + local * R + first_rank + g, mask=g < D, other=0).to(KEY)
        out += tl.maximum(had - (rows[i] >> M_BITS), 0)
    return out


@triton.jit
def copied(from_p, to_p, SIZE: tl.constexpr):
    """Keys of all experts, copied for one candidate."""
    TILE: tl.constexpr = 1024
    for first in range(0, SIZE, TILE):
        at = first + tl.arange(0, TILE)
        tl.store(to_p + at, tl.load(from_p + at, mask=at < SIZE), mask=at < SIZE)
    tl.debug_barrier()  # from now on other lanes read them


@triton.jit
def row_of(keys_p, rank, MP: tl.constexpr, KEY: tl.constexpr):
    """The keys of one rank's experts, last one first, whatever their heat."""
    at = tl.arange(0, 32 if MP < 32 else MP)  # at least one for each lane: a maximum is then one instruction
    return tl.load(keys_p + rank * MP + at, mask=at < MP, other=-1).to(KEY)


@triton.jit
def stored(rows, row, keys_p, code, hot, key, hottest, source):
    """`rows` when `hot`, the hottest of the rank `source`, becomes `key`, and then `hottest` is. row: of `row_of`."""
    tl.store(keys_p + code, key.to(tl.int64))
    tl.debug_barrier()
    row = tl.where(row == hot, key, row)
    second = tl.max(tl.where(row == hottest, -1, row), 0)
    return tl.where(source, hottest, rows[0]), tl.where(source, second, rows[1])
