"""Count matrices for the planner's tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def spread(loads: list[int], ranks: int) -> Tensor:
    """int64 [R, E]: the loads of the experts, spread evenly over the source ranks."""
    loads_E = torch.tensor(loads)
    counts_RE = (loads_E // ranks).repeat(ranks, 1)
    counts_RE[0] += loads_E - counts_RE.sum(0)
    return counts_RE


def skewed(ranks: int, masters: int, scale: float, power: float, seed: int, quiet: float = 0.0) -> Tensor:
    """int64 [R, E]: experts of unequal heat (the higher the power), a share `quiet` of ranks without
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    heat_1E = torch.rand(1, ranks * masters, generator=generator, dtype=torch.float64).pow(power)
    noise_RE = torch.rand(ranks, ranks * masters, generator=generator, dtype=torch.float64)
    counts_RE = (noise_RE * heat_1E * scale).round().long()
    counts_RE[torch.rand(ranks, generator=generator) < quiet] = 0
    return counts_RE


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A count matrix and a number of slots: balanced to extreme, a handful of tokens to totals near 2^31."""
    ranks, masters = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    counts_RE = skewed(
        ranks,
        masters,
        scale=draw(st.sampled_from([1, 3, 40, 5000, 2**31 / (ranks * ranks * masters)])),
        power=draw(st.sampled_from([0.0, 0.5, 2.0, 12.0, 60.0])),
        seed=draw(st.integers(0, 2**31)),
        quiet=draw(st.sampled_from([0.0, 0.5])),
    )
    foreign = (ranks - 1) * masters
    return counts_RE, draw(st.integers(0, min(foreign, 4)) | st.just(foreign))
