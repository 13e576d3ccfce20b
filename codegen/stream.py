"""The inner parts of the streaming kernels: tiles from one source to many slots, and the news that they have arrived."""

from __future__ import annotations

import triton
import triton.language as tl

from ultraep_compile.codegen.waits import publish, wait


@triton.jit
def copy_tiles(
    source, targets_p, slots_p, fan, first, last, OFFSET: tl.constexpr,
    ELEMENT: tl.constexpr, ELEMENTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tiles first..last-1 of one tensor of one expert: each is read once and written to all targets.

    source: its address. OFFSET: where slot 0 of the tensor starts in a rank's memory. Example: with TILE 4 and 10
    elements, tiles 0..2 hold elements 0-3, 4-7 and 8-9; nothing beyond element 9 is touched.
    """
    source_p = tl.multiple_of(source.to(tl.pointer_type(ELEMENT)), ALIGN)
    lane = tl.arange(0, TILE)
    tile = first
    while tile < last:
        start = tile.to(tl.int64) * TILE
        inside = lane < ELEMENTS - start
        value = tl.load(source_p + start + lane, mask=inside, eviction_policy="evict_first")
        d = 0
        while d < fan:
            slot = tl.load(slots_p + d).to(tl.int64)
            target = tl.load(targets_p + d) + OFFSET + slot * (ELEMENTS * WIDTH)
            target_p = tl.multiple_of(target.to(tl.pointer_type(ELEMENT)), ALIGN)
            tl.store(target_p + start + lane, value, mask=inside)
            d += 1
        tile += 1


@triton.jit
def announce_chunk(
    targets_p, slots_p, fan, epoch, chunk, part,
    FLAGS: tl.constexpr, ARRIVED: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, FANS: tl.constexpr,
):  # fmt: skip
    """Tell all targets that a chunk is there: its flag becomes the epoch, and the count of its tensor grows by 1."""
    publish()
    d = tl.arange(0, FANS)
    base = tl.load(targets_p + d, mask=d < fan, other=0)
    slot = tl.load(slots_p + d, mask=d < fan, other=0)
    flag_p = (base + FLAGS + (slot * CHUNKS + chunk) * 4).to(tl.pointer_type(tl.int32))
    arrived_p = (base + ARRIVED + (slot * PARTS + part) * 4).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(flag_p, tl.zeros((FANS,), tl.int32) + epoch, mask=d < fan, sem="relaxed", scope="sys")
    tl.atomic_add(arrived_p, tl.zeros((FANS,), tl.int32) + 1, mask=d < fan, sem="relaxed", scope="sys")


@triton.jit
def wait_part(arrived_p, slot, part, chunks, control_p, PARTS: tl.constexpr, PHASE_CODE: tl.constexpr, owner, site):
    """1 once all chunks of one tensor of one own slot have arrived; 0 when the deadline has passed.

    For consumers such as a grouped product: arrived_p is the bundle's `arrived` region of this rank.
    """
    return wait(arrived_p + slot * PARTS + part, chunks, control_p, PHASE_CODE, owner, site, slot)


@triton.jit
def _load_copy(
    targets_p, slots_p, d, fan, start, inside, OFFSET: tl.constexpr, TYPE: tl.constexpr, ELEMENTS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of target d's copy, or nothing if there are not so many."""
    here = d < fan
    slot = tl.load(slots_p + d, mask=here, other=0).to(tl.int64)
    address = tl.load(targets_p + d, mask=here, other=0) + OFFSET + slot * (ELEMENTS * WIDTH)
    copy_p = tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGN)
    return tl.load(copy_p + start + tl.arange(0, TILE), mask=inside & here, other=0).to(tl.float32)


@triton.jit
def add_tile(
    grad_p, targets_p, slots_p, fan, tile, failed, OFFSET: tl.constexpr, TYPE: tl.constexpr, OWN: tl.constexpr,
    ELEMENTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient: own part, then the copies in the order of the targets, summed in fp32.

    grad_p: the address of the own part, of type OWN. Four copies are loaded together, then added one by one. NaN if a
    wait has failed.
    """
    grad_p = tl.multiple_of(grad_p.to(tl.pointer_type(OWN)), ALIGN)
    start = tile * TILE
    lane = tl.arange(0, TILE)
    inside = lane < ELEMENTS - start
    total = tl.load(grad_p + start + lane, mask=inside, other=0).to(tl.float32)
    d = 0
    while d < fan:
        c0 = _load_copy(targets_p, slots_p, d, fan, start, inside, OFFSET, TYPE, ELEMENTS, TILE, WIDTH, ALIGN)
        c1 = _load_copy(targets_p, slots_p, d + 1, fan, start, inside, OFFSET, TYPE, ELEMENTS, TILE, WIDTH, ALIGN)
        c2 = _load_copy(targets_p, slots_p, d + 2, fan, start, inside, OFFSET, TYPE, ELEMENTS, TILE, WIDTH, ALIGN)
        c3 = _load_copy(targets_p, slots_p, d + 3, fan, start, inside, OFFSET, TYPE, ELEMENTS, TILE, WIDTH, ALIGN)
        total = total + c0
        total = tl.where(d + 1 < fan, total + c1, total)  # adding 0 would turn -0 into +0
        total = tl.where(d + 2 < fan, total + c2, total)
        total = tl.where(d + 3 < fan, total + c3, total)
        d += 4
    total = tl.where(failed, float("nan"), total)
    tl.store(grad_p + start + lane, total.to(OWN), mask=inside)
