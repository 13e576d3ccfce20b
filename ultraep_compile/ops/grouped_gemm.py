"""Products of expert-sorted rows with masters and slots: `ultraep::grouped_gemm`, its weight gradient, row takes.

Rows of group g lie at `offsets[g] .. offsets[g + 1]`; groups 0..Gm-1 use `masters`, the rest use `slots`, so the
masters are read in place and never copied beside the slots. Rows at and past `offsets[-1]` come out as zero (plain
`torch._grouped_mm` leaves them uninitialised, and its gradient with them).

A row has the same bits whatever else shares its group, which is what makes balancing invisible in the forward values.
On a CPU that takes offsets that are multiples of `ROW_ALIGNMENT`, so that products see whole blocks of rows; on a GPU
`codegen/grouped_gemm_kernels` sees to it, and reads nothing on the host. What it does not know (fp64) is multiplied
group by group.
"""

from __future__ import annotations

import functools
import itertools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ROW_ALIGNMENT = 8
WIDTH_ALIGNMENT = 4
"""With other widths a row's bits depend on its place in the block on a CPU; such products are padded with zeros."""
CUDA_BLOCK = 128
"""Rows of one product of the library's: one shape, hence one kernel, hence the same bits."""


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _compute_dtype(x: Tensor) -> torch.dtype:
    """bf16 and fp16 products on a CPU without the instructions are tens of times slower than fp32 ones."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies_bf16():
        return torch.float32
    return x.dtype


def _kernels(x: Tensor) -> Any:
    """The Triton kernels where they apply, else None."""
    if x.device.type != "cuda" or find_spec("triton") is None:
        return None
    from ultraep_compile.codegen import grouped_gemm_kernels

    return grouped_gemm_kernels if x.dtype in grouped_gemm_kernels.DTYPES else None


def _blockwise(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight in blocks of `CUDA_BLOCK` rows: cuBLAS picks its kernel by shape, and a row's bits with it."""
    for i in range(0, x.shape[0], CUDA_BLOCK):
        block = x[i : i + CUDA_BLOCK]
        missing = CUDA_BLOCK - block.shape[0]
        if missing:
            block = torch.cat([block, block.new_zeros(missing, block.shape[1])])
        out[i : i + CUDA_BLOCK] = (block @ weight)[: CUDA_BLOCK - missing]


def _whole(matrix: Tensor, rows: int) -> Tensor:
    """Zeros up to multiples of `WIDTH_ALIGNMENT`, in columns, and if `rows` in rows too."""
    missing = [-n % WIDTH_ALIGNMENT for n in matrix.shape]
    return torch.nn.functional.pad(matrix, (0, missing[1], 0, missing[0] if rows else 0))


def _grouped_product(x: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.grouped_product(x, masters, slots, offsets)
    rows, outer = x.shape[0], masters.shape[-1]
    split = masters.shape[0]
    dtype = _compute_dtype(x)
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    bounds = offsets.tolist()
    for g, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a == b:
            continue
        weight = masters[g] if g < split else slots[g - split]
        if x.device.type == "cuda":
            _blockwise(x[a:b], weight, y[a:b])
        elif x.shape[1] % WIDTH_ALIGNMENT or outer % WIDTH_ALIGNMENT:
            y[a:b] = torch.mm(_whole(x[a:b].to(dtype), 0), _whole(weight.to(dtype), 1))[:, :outer]
        elif dtype == x.dtype:
            torch.mm(x[a:b], weight, out=y[a:b])
        else:
            y[a:b] = torch.mm(x[a:b].to(dtype), weight.to(dtype))
    y[bounds[-1] :] = 0
    return y


def grouped_product_into(x: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor, out: Tensor) -> None:
    """`grouped_gemm` with the result in a contiguous tensor [N, O] that is there already."""
    kernels = _kernels(x)
    if kernels is not None:
        kernels.grouped_product(x, masters, slots, offsets, out=out)
    else:
        out.copy_(_grouped_product(x, masters, slots, offsets))


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
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.grouped_weight_grad(x, grad, offsets)
    groups = offsets.shape[0] - 1
    bounds = offsets.tolist()
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
    if masters.stride(-2) == 1 and masters.stride(-1) != 1:  # stored as [O, I]: the gradient, too, or it would be copied
        dw = grouped_gemm_weight_grad(grad, x, offsets).transpose(-2, -1)
    else:
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
    kernels = _kernels(grad)
    if kernels is not None:
        return kernels.grouped_row_sum(grad, offsets)
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
