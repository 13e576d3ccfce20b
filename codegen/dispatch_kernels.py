"""The Triton kernels behind `dispatch`: rows of whole words over a table of peers' addresses.

A row is WORDS words of 1, 2, 4 or 8 bytes, whatever its elements are. A program takes ROWS pairs at a time, BLOCK words
at a time; which rank and row each pair belongs to is computed once for all of its words. Offsets within a buffer have
64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.ops.grouped_gemm import ROW_ALIGNMENT

ALIGN = tl.constexpr(ROW_ALIGNMENT)
SCALED = tl.constexpr(128)  # elements that share a scale


@triton.jit
def _rows_of(pair, pairs, physical_p, position_p, places_p, peers_p, rows, L: tl.constexpr):
    """Of each pair: does it travel in this round, buffer address on its destination rank, row there, padding rows
    that follow the group (counted at the group's first row only), first of these rows."""
    physical = tl.load(physical_p + pair, mask=pair < pairs, other=-1)
    position = tl.load(position_p + pair, mask=pair < pairs, other=-1)
    at = tl.where(physical >= 0, physical, 0)
    base = tl.load(places_p + at * 4)
    first = tl.load(places_p + at * 4 + 1)
    count = tl.load(places_p + at * 4 + 2)
    buffer = tl.load(peers_p + at // L)
    row = base + position
    travels = (physical >= 0) & (position >= first) & (position < first + count) & (row < rows)
    padding = tl.where(travels & (position == first), (0 - count) & (ALIGN - 1), 0)
    return travels, buffer, row, padding, row + count


@triton.jit
def push(
    source_p, physical_p, position_p, lead_p, places_p, peers_p, references_p, pairs, rows, K: tl.constexpr,
    DIVISOR: tl.constexpr, L: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ONCE: tl.constexpr, GRADIENT: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """Row pair // DIVISOR of the source to the place of every pair that travels; then the padding behind it.

    ONCE: only leading pairs' rows travel; every row of the receiver's references gets the row that it repeats.
    """
    Word: tl.constexpr = source_p.dtype.element_ty
    SIZE: tl.constexpr = Word.primitive_bitwidth // 8
    w = tl.arange(0, BLOCK)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(pairs, ROWS), tl.num_programs(0)):
        pair = block * ROWS + tl.arange(0, ROWS)
        travels, buffer, row, padding, behind = _rows_of(
            pair, pairs, physical_p, position_p, places_p, peers_p, rows, L
        )
        carries = travels
        if ONCE:
            lead = tl.load(lead_p + pair, mask=pair < pairs, other=0).to(tl.int32)
            leader = pair // K * K + lead
            carries = travels & (leader == pair)
            physical = tl.load(physical_p + leader, mask=travels, other=0)
            original = tl.load(position_p + leader, mask=travels, other=0)
            original += tl.load(places_p + physical * 4, mask=travels, other=0)
            table = tl.load(references_p + tl.maximum(tl.load(physical_p + pair, mask=travels, other=0), 0) // L)
            table = table.to(tl.pointer_type(tl.int32))
            tl.store(table + row, original, mask=travels)
            for i in tl.static_range(ALIGN - 1):
                tl.store(table + behind + i, original, mask=i < padding)
        to = tl.multiple_of((buffer + row.to(tl.int64) * (WORDS * SIZE)).to(tl.pointer_type(Word)), HINT)
        after = tl.multiple_of((buffer + behind.to(tl.int64) * (WORDS * SIZE)).to(tl.pointer_type(Word)), HINT)
        most = tl.max(padding, 0)
        if ONCE:
            most = 0
        here = source_p + (pair // DIVISOR).to(tl.int64) * WORDS
        for start in tl.static_range(0, WORDS, BLOCK):
            x = tl.load(here[:, None] + start + w, mask=carries[:, None] & (start + w < WORDS))
            tl.store(to[:, None] + start + w, x, mask=carries[:, None] & (start + w < WORDS))
            if most > 0:
                if GRADIENT:
                    x = tl.zeros((ROWS, BLOCK), Word)
                for n in range(0, most):
                    tl.store(
                        after[:, None] + n * WORDS + start + w, x, mask=(n < padding)[:, None] & (start + w < WORDS)
                    )


@triton.jit
def pull(
    out_p, physical_p, position_p, places_p, peers_p, pairs, rows, L: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """Row `pair` of out from the place of every pair that travels. ZERO: the other rows become zero."""
    Word: tl.constexpr = out_p.dtype.element_ty
    SIZE: tl.constexpr = Word.primitive_bitwidth // 8
    w = tl.arange(0, BLOCK)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(pairs, ROWS), tl.num_programs(0)):
        pair = block * ROWS + tl.arange(0, ROWS)
        travels, buffer, row, _, _ = _rows_of(pair, pairs, physical_p, position_p, places_p, peers_p, rows, L)
        at = tl.multiple_of((buffer + row.to(tl.int64) * (WORDS * SIZE)).to(tl.pointer_type(Word)), HINT)
        to = out_p + pair.to(tl.int64) * WORDS
        writes = travels
        if ZERO:
            writes = pair < pairs
        for start in tl.static_range(0, WORDS, BLOCK):
            inside = start + w < WORDS
            x = tl.load(at[:, None] + start + w, mask=travels[:, None] & inside, other=0)
            tl.store(to[:, None] + start + w, x, mask=writes[:, None] & inside)


@triton.jit
def pull_sum(
    out_p, weight_p, physical_p, position_p, places_p, peers_p, tokens, rows, D: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, L: tl.constexpr, WEIGHTED: tl.constexpr, SIZE: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row t of out: the sum of the token's rows in top-k order, in fp32; products and sums are rounded one by one."""
    Element: tl.constexpr = out_p.dtype.element_ty
    k = tl.arange(0, KP)
    d = tl.arange(0, BLOCK)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        pair = tl.where(k < K, token * K + k, tokens * K)
        travels, buffer, row, _, _ = _rows_of(pair, tokens * K, physical_p, position_p, places_p, peers_p, rows, L)
        address = tl.where(travels, buffer + row.to(tl.int64) * (D * SIZE), 0)
        for start in tl.static_range(0, D, BLOCK):
            total = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(K):
                at = tl.sum(tl.where(k == i, address, 0), 0)
                there = tl.multiple_of(at.to(tl.pointer_type(Element)), HINT) + start + d
                x = tl.load(there, mask=(at != 0) & (start + d < D), other=0).to(tl.float32)
                if WEIGHTED:
                    x = x * tl.load(weight_p + token * K + i).to(tl.float32)
                total += x
            tl.store(out_p + tl.cast(token, tl.int64) * D + start + d, total.to(Element), mask=start + d < D)


@triton.jit
def sum_choices(pairs_p, out_p, tokens, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Row t of out: the sum of rows t * K .. t * K + K - 1 in this order, in fp32: the bits of `pull_sum`."""
    d = tl.arange(0, BLOCK)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        for start in tl.static_range(0, D, BLOCK):
            total = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(K):
                row = tl.cast(token, tl.int64) * K + i
                total += tl.load(pairs_p + row * D + start + d, mask=start + d < D, other=0).to(tl.float32)
            at = out_p + tl.cast(token, tl.int64) * D + start + d
            tl.store(at, total.to(out_p.dtype.element_ty), mask=start + d < D)


@triton.jit
def spread(buffer_p, references_p, offsets_p, L: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Of all used rows of the own buffer, those that repeat another one."""
    used = tl.load(offsets_p + L)
    w = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), used, tl.num_programs(0)):
        original = tl.load(references_p + row)
        if original != row:
            for start in tl.static_range(0, WORDS, BLOCK):
                inside = start + w < WORDS
                x = tl.load(buffer_p + original.to(tl.int64) * WORDS + start + w, mask=inside)
                tl.store(buffer_p + tl.cast(row, tl.int64) * WORDS + start + w, x, mask=inside)


@triton.jit
def clear(buffer_p, offsets_p, rows, L: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero in the rows behind the last group."""
    w = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), buffer_p.dtype.element_ty)
    for row in range(tl.load(offsets_p + L) + tl.program_id(0), rows, tl.num_programs(0)):
        for start in tl.static_range(0, WORDS, BLOCK):
            tl.store(buffer_p + tl.cast(row, tl.int64) * WORDS + start + w, zero, mask=start + w < WORDS)


@triton.jit
def _e4m3(x):
    """The byte of each fp32 of at most 448, rounded to nearest even; NaN for what is not finite.

    In integers, because the interpreter's own cast does not carry into the exponent.
    """
    bits = x.to(tl.int32, bitcast=True)
    most = bits & 0x7FFFFFFF
    normal = ((most + 0x7FFFF + ((most >> 20) & 1)) >> 20) - (120 << 3)
    small = (most.to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(most < 0x3C800000, small, normal)  # below 2^-6
    return (tl.where(most < 0x7F800000, code, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def pack(
    rows_p, wire_p, rows, D: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows to e4m3 with a scale for every 128 elements; see `wire.pack_rows_reference`."""
    b = tl.arange(0, BLOCKS)[None, :, None]
    d = b * SCALED + tl.arange(0, SCALED)[None, None, :]
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None, None]
        inside = (row < rows) & (d < D)
        x = tl.load(rows_p + row.to(tl.int64) * D + d, mask=inside, other=0).to(tl.float32)
        finite = tl.abs(x) < float("inf")
        most = tl.max(tl.where(finite, tl.abs(x), 0.0), 2, keep_dims=True)
        bits = most.to(tl.int32, bitcast=True)
        # 2^(e - 8) where the largest is at most 1.75 * 2^e, else 2^(e - 7): the largest becomes at most 448
        exponent = tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        y = _e4m3(tl.where(finite, x * inverse, x))
        at = wire_p + row.to(tl.int64) * ROW
        tl.store(at + d, y, mask=inside)
        scale = (at + SCALES + b * 4).to(tl.pointer_type(tl.int32))
        tl.store(scale, exponent << 23, mask=(row < rows) & (b * SCALED < D))


@triton.jit
def _unpacked(at, row_live, D: tl.constexpr, SCALES: tl.constexpr, BLOCKS: tl.constexpr):
    """fp32 [ROWS, BLOCKS, 128] of the packed rows at the byte pointers `at` [ROWS, 1, 1]."""
    b = tl.arange(0, BLOCKS)[None, :, None]
    d = b * SCALED + tl.arange(0, SCALED)[None, None, :]
    code = tl.load(at + d, mask=row_live & (d < D), other=0).to(tl.int32)
    most = code & 0x7F
    bits = tl.where(most == 0x7F, 0x7F800001, most << 20) | ((code & 0x80) << 24)
    x = bits.to(tl.float32, bitcast=True) * 2.0**120  # the exponent's bias; exact for small numbers, too
    scale = tl.load((at + SCALES + b * 4).to(tl.pointer_type(tl.float32)), mask=row_live & (b * SCALED < D), other=0)
    return x * scale


@triton.jit
def unpack(
    wire_p, out_p, offsets_p, rows, L: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Packed rows back to rows: all, or those of the own groups."""
    d = tl.arange(0, BLOCKS)[None, :, None] * SCALED + tl.arange(0, SCALED)[None, None, :]
    used = rows
    if not ALL:
        used = tl.load(offsets_p + L)
    for block in range(tl.program_id(0), tl.cdiv(used, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)[:, None, None]).to(tl.int64)
        x = _unpacked(wire_p + row * ROW, row < used, D, SCALES, BLOCKS)
        tl.store(out_p + row * D + d, x.to(out_p.dtype.element_ty), mask=(row < used) & (d < D))


@triton.jit
def pull_packed(
    out_p, physical_p, position_p, places_p, peers_p, pairs, rows, L: tl.constexpr, D: tl.constexpr,
    ROW: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """`pull` of packed rows, unpacked on arrival."""
    d = tl.arange(0, BLOCKS)[None, :, None] * SCALED + tl.arange(0, SCALED)[None, None, :]
    for block in range(tl.program_id(0), tl.cdiv(pairs, ROWS), tl.num_programs(0)):
        pair = block * ROWS + tl.arange(0, ROWS)
        travels, buffer, row, _, _ = _rows_of(pair, pairs, physical_p, position_p, places_p, peers_p, rows, L)
        at = tl.multiple_of((buffer + row.to(tl.int64) * ROW).to(tl.pointer_type(tl.uint8)), 16)
        x = _unpacked(at[:, None, None], travels[:, None, None], D, SCALES, BLOCKS)
        writes = travels
        if ZERO:
            writes = pair < pairs
        to = out_p + pair.to(tl.int64)[:, None, None] * D + d
        tl.store(to, x.to(out_p.dtype.element_ty), mask=writes[:, None, None] & (d < D))
