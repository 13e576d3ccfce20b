"""Row programs whose row-wise ops Inductor fuses: on a GPU they run so, here the same code is compiled for the CPU."""

from __future__ import annotations

import torch

from tests.ops.expert_case import D, F, make_site, relative
from ultraep_compile.codegen.row_function import _fused
from ultraep_compile.ops import experts
from ultraep_compile.ops.layout import ExpertLayout


def _inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows sorted by 2 masters and 1 slot, their weights, offsets with an empty group; a gradient."""
    g = torch.Generator().manual_seed(0)
    shapes = [(40, D), (2, 2 * F, D), (2, D, F), (2, 2 * F), (1, 2 * F, D), (1, D, F), (1, 2 * F)]
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    grad = torch.randn(40, D, generator=g, dtype=torch.float64).to(dtype)
    return [*made, torch.tensor([0, 16, 16, 40], dtype=torch.int32)], grad


def test_fused_programs_are_as_exact_as_plain_ones() -> None:
    program = experts._sites[make_site(ExpertLayout(2, 1, 1), torch.float32)].program
    results = {}
    for name, dtype, wrap in (("exact", torch.float64, None), ("plain", torch.float32, None), ("fused", torch.float32, _fused)):
        inputs, grad = _inputs(dtype)
        forward, backward = (m if wrap is None else wrap(m) for m in (program.forward_module, program.backward_module))
        y, *kept = forward(*inputs)
        results[name] = [y, *(t for t in backward(*inputs, *kept, grad) if t is not None)]
    assert len(results["exact"]) == 1 + 7
    for exact, plain, fused in zip(results["exact"], results["plain"], results["fused"], strict=True):
        assert relative(fused, exact) <= 2 * relative(plain, exact) + 1e-7
