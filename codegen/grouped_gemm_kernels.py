"""Grouped products whose group sizes only the device knows: nothing here is read on the host.

    row_tiles    offsets of the groups -> table of tiles of rows, none of which crosses a group
    product      y = x @ weight[group], weights in two tensors: masters in place, then slots
    weight_grad  x[group].T @ grad[group] of every group
    take_grad    sums of the rows of every group (gradients of biases and scales), in two launches

Persistent programs walk over tiles. A row's result depends on that row and its weight alone: the tile shape and the
order over the inner dim are fixed by dtype, so neither the size of a group nor its neighbours can change a bit.
Masters' tiles come first; tiles of slots may wait until their slot is filled (`Ready`), so that copying weights hides
behind the masters' products.

16-bit operands are loaded by the tensor memory accelerator where sizes and strides are multiples of 16 bytes, fp32
and odd sizes through pointers. fp32 is multiplied in fp32, not in tf32.

G = Gm + Gs groups, N rows, IN inner and OUT outer width. References: `ultraep_compile.ops.grouped_gemm`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAKE_ROWS = 512  # rows that one program of `take_part` sums


class Tile(NamedTuple):
    """Rows, columns and inner width of one tile, and how it is run."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    span: int = 8


TENSOR_CORE_TILE = Tile(128, 256, 64, 8, 4)  # by descriptors, 16-bit operands, on Hopper
BLACKWELL_TILE = TENSOR_CORE_TILE._replace(stages=3)  # results pass through shared memory there
POINTER_TILE = Tile(128, 128, 32, 8, 3)  # 16-bit operands of odd sizes
FP32_TILE = Tile(128, 128, 16, 8, 3)


class Ready(NamedTuple):
    """Slot s may be read once flags[s] >= epoch[0]; both in device memory, so that a replayed graph waits anew."""

    flags: Tensor  # int32 [Gs]
    epoch: Tensor  # int32 [1]


@triton.jit(do_not_specialize=["G", "size"])
def row_tiles(offsets_p, table_p, G, size, GP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """Program g lists the tiles of group g: table = first tile of each group [G+1], group [size], first row [size].

    Example: offsets [0, 3, 3, 5], BM=2, size=5 give [0, 2, 2, 3 | 0, 0, 2, ... | 0, 2, 3, ...].
    """
    g = tl.program_id(0)
    all_g = tl.arange(0, GP)
    length = tl.load(offsets_p + all_g + 1, mask=all_g < G, other=0) - tl.load(
        offsets_p + all_g, mask=all_g < G, other=0
    )
    first = tl.sum(tl.where(all_g < g, tl.cdiv(length, BM), 0))
    tl.store(table_p + g, first)
    if g < G:
        start = tl.load(offsets_p + g)
        tiles = tl.cdiv(tl.load(offsets_p + g + 1) - start, BM)
        done = 0
        while done < tiles:
            i = done + tl.arange(0, BLOCK)
            at = table_p + G + 1 + first + i
            tl.store(at, tl.zeros((BLOCK,), tl.int32) + g, mask=i < tiles)
            tl.store(at + size, start + i * BM, mask=i < tiles)
            done += BLOCK


@triton.jit
def _wait_for_slot(flags_p, epoch, slot, ON_GPU: tl.constexpr):
    while tl.atomic_add(flags_p + slot, 0, sem="acquire", scope="sys") < epoch:
        pass
    if ON_GPU:  # the tensor memory accelerator reads by another path than the flag's
        tl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _operands(x, w, row, rows, group, column, k, sx, sg, sk, sn, IN: tl.constexpr, OUT: tl.constexpr,
              TMA: tl.constexpr, INNER_LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Tiles [BM, BK] of rows and [BK, BN] of a group's weight; zero outside the inner dim."""
    if TMA:
        a = x.load([row, k])
        if INNER_LAST:
            b = w.load([group, column, k]).reshape(BN, BK).T
        else:
            b = w.load([group, k, column]).reshape(BK, BN)
    else:
        r, c, i = row + tl.arange(0, BM), column + tl.arange(0, BN), k + tl.arange(0, BK)
        a = tl.load(
            x + r[:, None].to(tl.int64) * sx + i[None, :], mask=(r < rows)[:, None] & (i < IN)[None, :], other=0
        )
        at = w + group.to(tl.int64) * sg + i[:, None].to(tl.int64) * sk + c[None, :].to(tl.int64) * sn
        b = tl.load(at, mask=(i < IN)[:, None] & (c < OUT)[None, :], other=0)
    return a, b


@triton.jit
def _product_tiles(
    x, w, y_p, group_p, row_p, offsets_p, flags_p, epoch_p, pid, first, row_tiles, first_group, rows, sx, sg, sk, sn,
    IN: tl.constexpr, OUT: tl.constexpr, TMA: tl.constexpr, INNER_LAST: tl.constexpr, WAIT: tl.constexpr,
    ON_GPU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """This program's share of some tiles of rows, from the entry `first` of the table, whose weights are
    w[group - first_group]. Programs next to each other share a weight tile over SPAN tiles of rows."""
    columns: tl.constexpr = (OUT + BN - 1) // BN
    for t in tl.range(pid, row_tiles * columns, tl.num_programs(0), flatten=not WAIT):
        above = t // (SPAN * columns) * SPAN
        height = tl.minimum(row_tiles - above, SPAN)
        within = t % (SPAN * columns)
        tile = first + above + within % height
        column = within // height * BN
        group, row = tl.load(group_p + tile), tl.load(row_p + tile)
        end = tl.load(offsets_p + group + 1)
        if WAIT:
            _wait_for_slot(flags_p, tl.load(epoch_p), group - first_group, ON_GPU)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, IN, BK):
            a, b = _operands(
                x, w, row, rows, group - first_group, column, k, sx, sg, sk, sn, IN, OUT, TMA, INNER_LAST, BM, BN, BK
            )
            if ON_GPU:
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:  # the interpreter multiplies bf16 wrongly
                acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        at = y_p + r[:, None].to(tl.int64) * OUT + c[None, :]
        tl.store(at, acc.to(y_p.dtype.element_ty), mask=(r < end)[:, None] & (c < OUT)[None, :])


@triton.jit(do_not_specialize=["rows", "G", "GM", "size"])
def product(
    x, masters, slots, y_p, table_p, offsets_p, flags_p, epoch_p, rows, sx, mg, mk, mn, sg, sk, sn, G, GM, size,
    MASTERS: tl.constexpr, SLOTS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TMA: tl.constexpr,
    MASTERS_INNER_LAST: tl.constexpr, SLOTS_INNER_LAST: tl.constexpr, WAIT: tl.constexpr, ON_GPU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """y[N, OUT]: products of the masters' tiles, then of the slots', then zeros past the last group."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    group_p, row_p = table_p + G + 1, table_p + G + 1 + size
    columns: tl.constexpr = (OUT + BN - 1) // BN
    split, stop = tl.load(table_p + GM), tl.load(table_p + G)
    if MASTERS:
        _product_tiles(
            x, masters, y_p, group_p, row_p, offsets_p, flags_p, epoch_p, pid, 0, split, 0, rows, sx, mg, mk, mn,
            IN, OUT, TMA, MASTERS_INNER_LAST, False, ON_GPU, BM, BN, BK, SPAN,
        )  # fmt: skip
    if SLOTS:
        turned = (pid + programs - split * columns % programs) % programs  # goes on where the masters' walk ended
        _product_tiles(
            x, slots, y_p, group_p, row_p, offsets_p, flags_p, epoch_p, turned, split, stop - split, GM, rows,
            sx, sg, sk, sn, IN, OUT, TMA, SLOTS_INNER_LAST, WAIT, ON_GPU, BM, BN, BK, SPAN,
        )  # fmt: skip
    used = tl.load(offsets_p + G)
    tail = tl.cdiv(rows - used, BM) * columns
    t = pid
    while t < tail:
        r, c = used + t // columns * BM + tl.arange(0, BM), t % columns * BN + tl.arange(0, BN)
        at = y_p + r[:, None].to(tl.int64) * OUT + c[None, :]
        tl.store(at, tl.zeros((BM, BN), y_p.dtype.element_ty), mask=(r < rows)[:, None] & (c < OUT)[None, :])
        t += programs


@triton.jit
def _outer_product(x_p, g_p, acc, row, end, i0, o0, sx, sg, IN, OUT, ON_GPU: tl.constexpr,
                   BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """acc + x[rows].T @ grad[rows] for BK rows, those at and past `end` left out."""
    r, i, o = row + tl.arange(0, BK), i0 + tl.arange(0, BI), o0 + tl.arange(0, BO)
    a = tl.load(x_p + r[:, None].to(tl.int64) * sx + i[None, :], mask=(r < end)[:, None] & (i < IN)[None, :], other=0)
    b = tl.load(g_p + r[:, None].to(tl.int64) * sg + o[None, :], mask=(r < end)[:, None] & (o < OUT)[None, :], other=0)
    if ON_GPU:
        return tl.dot(a.T, b, acc, input_precision="ieee")
    return tl.dot(a.to(tl.float32).T, b.to(tl.float32), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["G"])
def weight_grad(
    x_d, g_d, x_p, g_p, out_p, offsets_p, G, sx, sg, IN: tl.constexpr, OUT: tl.constexpr, TMA: tl.constexpr,
    ON_GPU: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[G, IN, OUT]: first the group's last rows that fill no whole step of BK, masked, then the whole steps."""
    wide: tl.constexpr = (OUT + BO - 1) // BO
    each: tl.constexpr = (IN + BI - 1) // BI * wide
    for t in tl.range(tl.program_id(0), G * each, tl.num_programs(0), flatten=True):
        group = t // each
        i0, o0 = t % each // wide * BI, t % wide * BO
        row, end = tl.load(offsets_p + group), tl.load(offsets_p + group + 1)
        whole = row + (end - row) // BK * BK
        acc = tl.zeros((BI, BO), tl.float32)
        acc = _outer_product(x_p, g_p, acc, whole, end, i0, o0, sx, sg, IN, OUT, ON_GPU, BI, BO, BK)
        for r in tl.range(row, whole, BK):
            if TMA:
                acc = tl.dot(x_d.load([r, i0]).T, g_d.load([r, o0]), acc)
            else:
                acc = _outer_product(x_p, g_p, acc, r, whole, i0, o0, sx, sg, IN, OUT, ON_GPU, BI, BO, BK)
        i, o = i0 + tl.arange(0, BI), o0 + tl.arange(0, BO)
        at = out_p + group.to(tl.int64) * IN * OUT + i[:, None].to(tl.int64) * OUT + o[None, :]
        tl.store(at, acc.to(out_p.dtype.element_ty), mask=(i < IN)[:, None] & (o < OUT)[None, :])


@triton.jit(do_not_specialize=["G", "size"])
def take_part(g_p, part_p, table_p, offsets_p, G, C, size, BM: tl.constexpr, STEP: tl.constexpr, BC: tl.constexpr):
    """part[tile, C] = sum of the tile's rows, in fp32."""
    tile = tl.program_id(0)
    if tile < tl.load(table_p + G):
        group, row = tl.load(table_p + G + 1 + tile), tl.load(table_p + G + 1 + size + tile)
        end = tl.minimum(tl.load(offsets_p + group + 1), row + BM)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        acc = tl.zeros((STEP, BC), tl.float32)
        while row < end:
            r = row + tl.arange(0, STEP)
            at = g_p + r[:, None].to(tl.int64) * C + c[None, :]
            acc += tl.load(at, mask=(r < end)[:, None] & (c < C)[None, :], other=0).to(tl.float32)
            row += STEP
        tl.store(part_p + tile.to(tl.int64) * C + c, tl.sum(acc, 0), mask=c < C)


@triton.jit
def take_sum(part_p, out_p, table_p, C, BC: tl.constexpr):
    """out[group, C] = sum of its tiles' parts, in order."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tile, stop = tl.load(table_p + group), tl.load(table_p + group + 1)
    acc = tl.zeros((BC,), tl.float32)
    while tile < stop:
        acc += tl.load(part_p + tile.to(tl.int64) * C + c, mask=c < C, other=0)
        tile += 1
    tl.store(out_p + group.to(tl.int64) * C + c, acc.to(out_p.dtype.element_ty), mask=c < C)


@lru_cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _tile(x: Tensor, tma: bool) -> Tile:
    if not tma:
        return FP32_TILE if x.element_size() == 4 else POINTER_TILE
    return TENSOR_CORE_TILE if torch.cuda.get_device_capability(x.device)[0] == 9 else BLACKWELL_TILE


def _table(offsets: Tensor, rows: int, tile_rows: int) -> tuple[Tensor, int]:
    """The tiles of `row_tiles`, and how many there can be."""
    groups = offsets.shape[0] - 1
    size = rows // tile_rows + groups
    table = offsets.new_empty(groups + 1 + 2 * size)
    row_tiles[(groups + 1,)](offsets, table, groups, size, max(2, triton.next_power_of_2(groups)), tile_rows, 128)
    return table, size


def _describable(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: last dim dense, everything else in steps of 16 bytes."""
    steps = [s * t.element_size() for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


def _descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    # the stride of a dim of size 1 is never used, but it must be legal
    legal = [s if s * t.element_size() % 16 == 0 and s > 0 else 16 for s in t.stride()[:-1]]
    return TensorDescriptor(t, list(t.shape), [*legal, 1], block)


def _inner_last(weight_GIO: Tensor) -> bool:
    return weight_GIO.stride(-2) == 1 and weight_GIO.stride(-1) != 1


def _weight_operand(weight_GIO: Tensor, tile: Tile) -> tuple[TensorDescriptor, bool]:
    if _inner_last(weight_GIO):
        return _descriptor(weight_GIO.transpose(-2, -1), [1, tile.columns, tile.inner]), True
    return _descriptor(weight_GIO, [1, tile.inner, tile.columns]), False


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense_in_one_dim(weight_GIO: Tensor) -> Tensor:
    return weight_GIO if 1 in weight_GIO.stride()[1:] else weight_GIO.contiguous()


def grouped_product(
    x: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor, ready: Ready | None = None, out: Tensor | None = None
) -> Tensor:
    """x[g] @ weight[g] for the rows offsets[g] .. offsets[g+1]-1 of every group, zero past the last: [N, OUT].

    Args:
        x: [N, IN] bf16, fp16 or fp32; masters: [Gm, IN, OUT], slots: [Gs, IN, OUT] with any strides, transposed views too.
        offsets: int32 [Gm + Gs + 1], ascending, on the device.
        ready: tiles of a slot wait for it. out: contiguous [N, OUT] to write into.

    Example: x = [[1], [2], [3], [9]], masters [[[10]]], slots [[[100]]], offsets [0, 2, 3] give [10, 20, 300, 0].
    """
    (rows, inner), outer, on_gpu = x.shape, masters.shape[-1], x.is_cuda
    y = x.new_empty(rows, outer) if out is None else out
    if rows == 0 or outer == 0:
        return y
    if inner == 0:
        return y.zero_()
    x, masters, slots = _rows_dense(x), _dense_in_one_dim(masters), _dense_in_one_dim(slots)
    parts = [w for w in (masters, slots) if w.shape[0]]
    turned = [w.transpose(-2, -1) if _inner_last(w) else w for w in parts]
    tma = on_gpu and x.element_size() == 2 and all(map(_describable, [x, *turned]))
    tile = _tile(x, tma)
    table, size = _table(offsets, rows, tile.rows)
    operands: list[Any] = [x, masters, slots]
    inner_last = [_inner_last(masters), _inner_last(slots)]
    if tma:
        described = [_weight_operand(w, tile) if w.shape[0] else None for w in (masters, slots)]
        present = next(d for d in described if d is not None)
        filled = [d or present for d in described]  # an empty tensor's descriptor is not used
        operands = [_descriptor(x, [tile.rows, tile.inner]), filled[0][0], filled[1][0]]
        inner_last = [filled[0][1], filled[1][1]]
    flags, epoch = ready or (offsets, offsets)
    groups = offsets.shape[0] - 1
    programs = min(_programs(x.device), (rows // tile.rows + groups) * triton.cdiv(outer, tile.columns))
    product[(programs,)](
        *operands, y, table, offsets, flags, epoch, rows, x.stride(0), *masters.stride(), *slots.stride(),
        groups, masters.shape[0], size, masters.shape[0] > 0, slots.shape[0] > 0, inner, outer, tma, *inner_last, ready is not None, on_gpu,
        tile.rows, tile.columns, tile.inner, tile.span, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def grouped_weight_grad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """x[g].T @ grad[g] of every group, zero for an empty one, accumulated in fp32 in a fixed order: [G, IN, OUT].

    Example: x = [[1], [2], [9]], grad = [[10], [20], [9]], offsets [0, 2, 2] give [[[50]], [[0]]].
    """
    groups, inner, outer, on_gpu = offsets.shape[0] - 1, x.shape[1], grad.shape[1], x.is_cuda
    out = x.new_empty(groups, inner, outer)
    if x.shape[0] == 0 or out.numel() == 0:
        return out.zero_()
    x, grad = _rows_dense(x), _rows_dense(grad)
    tma = on_gpu and x.element_size() == 2 and _describable(x) and _describable(grad)
    tile = _tile(x, tma)
    operands: list[Any] = [x, grad]
    if tma:
        operands = [_descriptor(x, [tile.inner, tile.rows]), _descriptor(grad, [tile.inner, tile.columns])]
    tiles = groups * triton.cdiv(inner, tile.rows) * triton.cdiv(outer, tile.columns)
    weight_grad[(min(_programs(x.device), tiles),)](
        *operands, x, grad, out, offsets, groups, x.stride(0), grad.stride(0), inner, outer, tma, on_gpu,
        tile.rows, tile.columns, tile.inner, num_warps=tile.warps, num_stages=min(3, tile.stages),
    )  # fmt: skip
    return out


def grouped_row_sum(grad: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the rows of every group in fp32, tile by tile in a fixed order: [G, ...].

    Example: rows [1, 2, 4, 9], offsets [0, 2, 2, 3] give [3, 0, 4].
    """
    groups = offsets.shape[0] - 1
    out = grad.new_empty(groups, *grad.shape[1:])
    width = out[0].numel() if groups else 0
    if grad.shape[0] == 0 or width == 0:
        return out.zero_()
    grad = grad.contiguous()
    table, size = _table(offsets, grad.shape[0], TAKE_ROWS)
    part = torch.empty(size, width, dtype=torch.float32, device=grad.device)
    block = min(128, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    take_part[(size, blocks)](grad, part, table, offsets, groups, width, size, TAKE_ROWS, 16, block)
    take_sum[(groups, blocks)](part, out, table, width, block)
    return out
