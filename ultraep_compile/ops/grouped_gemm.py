"""Products of expert-sorted rows with masters and slots: `ultraep::grouped_gemm`, its weight gradient, row takes.

Rows of group g lie at `offsets[g] .. offsets[g + 1]`; groups 0..Gm-1 use `masters`, the rest use `slots`, so the
masters are read in place and never copied beside the slots. Rows at and past `offsets[-1]` come out as zero (plain
`torch._grouped_mm` leaves them uninitialised, and its gradient with them).

Offsets are multiples of `ROW_ALIGNMENT`: with whole blocks of rows a CPU product gives every row the same bits
whatever else shares its group, which is what makes balancing invisible in the forward values.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

ROW_ALIGNMENT = 8
CUDA_BLOCK = 128
"""Rows of one product where `torch._grouped_mm` does not apply: one shape, hence one kernel, hence the same bits."""


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _compute_dtype(x: Tensor) -> torch.dtype:
    """bf16 and fp16 products on a CPU without the instructions are tens of times slower than fp32 ones."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies_bf16():
        return torch.float32
    return x.dtype


def _cuda_grouped(x: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor | None:
    """`torch._grouped_mm` where it applies (bf16, 16-byte rows), else None."""
    inner, outer = weight_GIO.shape[-2:]
    if x.dtype != torch.bfloat16 or inner % 8 or outer % 8 or weight_GIO.shape[0] == 0 or x.shape[0] == 0:
        return None
    if weight_GIO.stride(-1) != 1 and weight_GIO.stride(-2) != 1:
        weight_GIO = weight_GIO.contiguous()
    return torch._grouped_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.contiguous(), weight_GIO, offs=ends_G.to(torch.int32)
    )


def _blockwise(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight in blocks of `CUDA_BLOCK` rows: cuBLAS picks its kernel by shape, and a row's bits with it."""
    for i in range(0, x.shape[0], CUDA_BLOCK):
        block = x[i : i + CUDA_BLOCK]
        missing = CUDA_BLOCK - block.shape[0]
        if missing:
            block = torch.cat([block, block.new_zeros(missing, block.shape[1])])
        out[i : i + CUDA_BLOCK] = (block @ weight)[: CUDA_BLOCK - missing]


def _grouped_product(x: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    rows, outer = x.shape[0], masters.shape[-1]
    split = masters.shape[0]
    if x.device.type == "cuda":
        # Two calls, one per weight tensor. In the second the masters' rows fall to a leading group of slot 0's weight
        # only by position, so it runs on the tail alone: its start must be known, hence one small read.
        start = int(offsets[split])
        first = _cuda_grouped(x[:start], masters, offsets[1 : split + 1])
        second = _cuda_grouped(x[start:], slots, offsets[split + 1 :] - start)
        if (first is not None or start == 0) and (second is not None or start == rows or slots.shape[0] == 0):
            y = x.new_zeros(rows, outer)
            end = int(offsets[-1])
            if first is not None:
                y[:start] = first
            if second is not None:
                y[start:end] = second[: end - start]
            return y
    dtype = _compute_dtype(x)
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    bounds = offsets.tolist()
    for g, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a == b:
            continue
        weight = masters[g] if g < split else slots[g - split]
        if x.device.type == "cuda":
            _blockwise(x[a:b], weight, y[a:b])
        elif dtype == x.dtype:
            torch.mm(x[a:b], weight, out=y[a:b])
        else:
            y[a:b] = torch.mm(x[a:b].to(dtype), weight.to(dtype))
    y[bounds[-1] :] = 0
    return y


@torch.library.custom_op("ultraep::grouped_gemm", mutates_args=())
def grouped_gemm(x: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    """y[offsets[g]:offsets[g+1]] = x[...] @ weight[g]; zero past the last offset.

    Args:
        x: [N, I] rows sorted by group.
        masters: [Gm, I, O]; slots: [Gs, I, O].
        offsets: int32 [Gm + Gs + 1], ascending.
    Returns: [N, O].

    Example:
        >>> x = torch.tensor([[1.], [2.], [3.], [9.]])
        >>> w = torch.tensor([[[10.]]]); s = torch.tensor([[[100.]]])
        >>> grouped_gemm(x, w, s, torch.tensor([0, 2, 3], dtype=torch.int32)).flatten().tolist()
        [10.0, 20.0, 300.0, 0.0]
    """
    return _grouped_product(x, masters, slots, offsets)


@grouped_gemm.register_fake
def _(x: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], masters.shape[-1])


@torch.library.custom_op("ultraep::grouped_gemm_weight_grad", mutates_args=())
def grouped_gemm_weight_grad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """Weight gradient of every group, x[g].T @ grad[g]: [G, I, O]; zero for a group without rows.

    Rows past the last offset are not read.
    """
    groups = offsets.shape[0] - 1
    bounds = offsets.tolist()
    if (
        x.device.type == "cuda"
        and x.shape[0]
        and x.dtype == torch.bfloat16
        and not (x.shape[1] % 8 or grad.shape[1] % 8)
    ):
        end = bounds[-1]
        if end:
            out = torch._grouped_mm(  # pyright: ignore[reportPrivateImportUsage]
                x[:end].t(), grad[:end].contiguous(), offs=offsets[1:].to(torch.int32)
            )
            empty = offsets[1:] == offsets[:-1]  # left uninitialised by some builds
            return torch.where(empty.view(-1, 1, 1), out.new_zeros(()), out)
    dtype = _compute_dtype(x)
    out = torch.empty(groups, x.shape[1], grad.shape[1], dtype=x.dtype, device=x.device)
    for g, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a == b:
            out[g] = 0
        elif dtype == x.dtype:
            torch.mm(x[a:b].t(), grad[a:b], out=out[g])
        else:
            out[g] = torch.mm(x[a:b].t().to(dtype), grad[a:b].to(dtype))
    return out


@grouped_gemm_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], grad.shape[1])


def _gemm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gemm_backward(ctx, grad):
    x, masters, slots, offsets = ctx.saved_tensors
    grad = grad.contiguous()  # an expanded gradient breaks grouped products
    dx = grouped_gemm(grad, masters.transpose(-2, -1), slots.transpose(-2, -1), offsets)
    dw = grouped_gemm_weight_grad(x, grad, offsets)
    return dx, dw[: masters.shape[0]], dw[masters.shape[0] :], None


grouped_gemm.register_autograd(_gemm_backward, setup_context=_gemm_setup)


@torch.library.custom_op("ultraep::expert_take", mutates_args=())
def expert_take(masters: Tensor, slots: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Each row's own entry of a per-expert tensor (a bias, a scale): [rows, ...]; zero past the last offset.

    Args: masters [Gm, ...], slots [Gs, ...], offsets int32 [Gm + Gs + 1], rows >= offsets[-1].

    Example:
        >>> expert_take(torch.tensor([5., 6.]), torch.tensor([7.]), torch.tensor([0, 1, 1, 3]), 4).tolist()
        [5.0, 7.0, 7.0, 0.0]
    """
    table = torch.cat([masters, slots, masters.new_zeros(1, *masters.shape[1:])])
    return table[group_of_row(offsets, rows)]


@expert_take.register_fake
def _(masters: Tensor, slots: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return masters.new_empty(rows, *masters.shape[1:])


@torch.library.custom_op("ultraep::expert_take_grad", mutates_args=())
def expert_take_grad(grad: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the gradient rows of every group, accumulated in fp32 (fp64 for fp64) in row order: [G, ...]."""
    lengths = (offsets[1:] - offsets[:-1]).to(torch.int64)
    used = int(offsets[-1])
    if used == 0 or grad.shape[1:].numel() == 0:
        return grad.new_zeros(lengths.shape[0], *grad.shape[1:])
    wide = grad[:used].to(torch.promote_types(grad.dtype, torch.float32)).reshape(used, -1)
    total = torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, initial=0.0)
    return total.to(grad.dtype).reshape(lengths.shape[0], *grad.shape[1:])


@expert_take_grad.register_fake
def _(grad: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, *grad.shape[1:])


def _take_setup(ctx, inputs, output):
    masters, _, offsets, _ = inputs
    ctx.split = masters.shape[0]
    ctx.save_for_backward(offsets)


def _take_backward(ctx, grad):
    total = expert_take_grad(grad.contiguous(), ctx.saved_tensors[0])
    return total[: ctx.split], total[ctx.split :], None, None


expert_take.register_autograd(_take_backward, setup_context=_take_setup)


def group_of_row(offsets: Tensor, rows: int) -> Tensor:
    """Group of every row, int64 [rows]; G for the rows past the last offset.

    Example: offsets [0, 2, 2, 3], 4 rows give [0, 0, 2, 3].
    """
    return torch.searchsorted(
        offsets[1:].contiguous(), torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True
    )
