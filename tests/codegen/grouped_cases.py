"""Inputs for the grouped kernels, and the comparison with products in fp64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ultraep_compile.codegen import grouped_gemm_kernels as kernels
from ultraep_compile.ops.layout import rows_by_group

SIZES = {  # rows of every group, number of them that are slots, inner, outer
    "odd sizes": ([3, 0, 130, 7, 1], 2, 40, 24),
    "no slots": ([5, 2], 0, 16, 8),
    "slots alone": ([9, 1], 2, 16, 8),
    "no rows": ([0, 0, 0], 1, 16, 8),
    "one hot group": ([300, 0, 1, 8], 1, 24, 20),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def make(
    rows: list[int], inner: int, outer: int, dtype: torch.dtype, tail: int = 5, seed: int = 0, device: str = "cpu"
):
    """(x [N + tail, I] whose tail is NaN, weight [G, I, O] seen through a transpose, offsets int32 [G+1])."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(rows) + tail, inner, generator=g).to(dtype)
    x[sum(rows) :] = torch.nan
    weight = torch.randn(len(rows), outer, inner, generator=g).to(dtype)
    offsets = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    return x.to(device), weight.to(device).transpose(1, 2), offsets.to(device)


def exact_product(x: Tensor, weight_GIO: Tensor, offsets: Tensor) -> Tensor:
    group, used = rows_by_group(offsets), int(offsets[-1])
    y = torch.zeros(x.shape[0], weight_GIO.shape[2], dtype=torch.float64, device=x.device)
    for g in range(weight_GIO.shape[0]):
        y[:used][group == g] = x[:used][group == g].double() @ weight_GIO[g].double()
    return y


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.isfinite().all() and ours.shape == exact.shape
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def check_product(name: str, dtype: torch.dtype, device: str) -> None:
    """Both layouts of masters and slots, and weights that are parts of larger tensors."""
    rows, slots, inner, outer = SIZES[name]
    x, weight, offsets = make(rows, inner, outer, dtype, device=device)
    exact = exact_product(x, weight, offsets)
    split = len(rows) - slots
    wide = torch.cat([weight, torch.full_like(weight, torch.nan)], 2)[:, :, :outer]
    spread = torch.empty(*weight.shape, 2, dtype=dtype, device=device)[..., 0].copy_(weight)
    for masters in (weight, weight.contiguous(), wide, spread):
        for held in (weight, weight.contiguous()):
            y = kernels.grouped_product(x, masters[:split], held[split:], offsets)
            close(y, exact, TOLERANCE[dtype])
            assert not y[sum(rows) :].any()


def check_independence(dtype: torch.dtype, device: str, inner: int, outer: int) -> None:
    """The same row and weight give the same bits whatever the group's size, the group's place and the neighbours."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(700, inner, generator=g).to(dtype).to(device)
    weight = torch.randn(3, outer, inner, generator=g).to(dtype).to(device).transpose(1, 2)
    whole = kernels.grouped_product(x, weight[:1], weight[:0], torch.tensor([0, 700], dtype=torch.int32, device=device))
    for start, count in ((0, 1), (17, 130), (3, 8), (200, 500)):
        for masters, held, at in ((weight, weight[:0], 0), (weight[1:], weight[:1], 2), (weight[2:], weight[:2], 1)):
            lengths = [11, 11, 11]
            lengths[at] = count
            part = torch.randn(sum(lengths), inner, generator=g).to(dtype).to(device)
            begin = sum(lengths[:at])
            part[begin : begin + count] = x[start : start + count]
            offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
            y = kernels.grouped_product(part, masters, held, offsets)
            assert torch.equal(y[begin : begin + count], whole[start : start + count]), (start, count, at)


def check_weight_grad(name: str, dtype: torch.dtype, device: str) -> None:
    rows, _, inner, outer = SIZES[name]
    x, _, offsets = make(rows, inner, outer, dtype, device=device)
    grad = torch.randn(x.shape[0], outer, generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    grad[sum(rows) :] = torch.nan
    out = kernels.grouped_weight_grad(x, grad, offsets)
    bounds = offsets.tolist()
    exact = torch.stack([x[a:b].double().T @ grad[a:b].double() for a, b in itertools.pairwise(bounds)])
    close(out, exact, TOLERANCE[dtype])
    assert all(not out[g].any() for g, n in enumerate(rows) if n == 0)
    assert torch.equal(out, kernels.grouped_weight_grad(x, grad, offsets))


def check_row_sum(dtype: torch.dtype, device: str) -> None:
    rows = [700, 0, 3, 512, 1]
    x, _, offsets = make(rows, 37, 1, dtype, device=device)
    bounds = offsets.tolist()
    exact = torch.stack([x[a:b].double().sum(0) for a, b in itertools.pairwise(bounds)])
    close(kernels.grouped_row_sum(x, offsets), exact, TOLERANCE[dtype])
    one = kernels.grouped_row_sum(x[:, 0], offsets)
    close(one, exact[:, 0], TOLERANCE[dtype])
    given = torch.tensor([1.0, 2.0, 4.0, 9.0], device=device)
    ends = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device)
    assert kernels.grouped_row_sum(given, ends).tolist() == [3, 0, 4]
