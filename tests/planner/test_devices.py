"""Plans come back on the device of the counts."""

from __future__ import annotations

import pytest
import torch

from tests.planner.problems import skewed
from ultraep_compile.planner import lower_bound, make_plan, validate_plan


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cuda_gives_the_same_plan(dtype):
    counts_RE = skewed(8, 4, 1000, 6.0, seed=3).to(dtype)
    here, there = make_plan(counts_RE, 2), make_plan(counts_RE.cuda(), 2)
    validate_plan(counts_RE.cuda(), there)
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.is_cuda
        assert torch.equal(ours, theirs.cpu())
    assert lower_bound(counts_RE.cuda(), 2) == lower_bound(counts_RE, 2)
