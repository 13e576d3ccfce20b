"""Grouped products on a CPU: a row has the same bits wherever in whatever group it stands, for odd widths too."""

from __future__ import annotations

import pytest
import torch

from ultraep_compile.ops.grouped_gemm import grouped_gemm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [1, 5, 12, 33])
def test_a_row_has_its_own_bits(inner: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(inner)
    for outer in (1, 3, 5, 6, 7, 8, 11, 15, 24, 31):
        x = torch.randn(64, inner, generator=g, dtype=torch.float64).to(dtype)
        stored = torch.randn(1, outer, inner, generator=g, dtype=torch.float64).to(dtype)
        for weight in (stored.transpose(1, 2), stored.transpose(1, 2).contiguous()):
            whole = grouped_gemm(x, weight, weight[:0], torch.tensor([0, 64], dtype=torch.int32))
            exact = x.double() @ weight[0].double()
            assert (whole.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
            for start, count in ((1, 48), (3, 8), (6, 56), (7, 16)):
                offsets = torch.tensor([0, 8, 8 + count], dtype=torch.int32)
                moved = torch.cat([x[:8], x[start : start + count]])
                y = grouped_gemm(moved, weight, weight, offsets)
                assert torch.equal(y[8:], whole[start : start + count]), (outer, start, count)
