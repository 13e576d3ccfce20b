"""What a forward shows of its modules: which of them feed one another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ultraep_compile.ladder.climb import candidates, watched


class Alternating(nn.Module):
    """Layers of a kind with layers of another between them, and experts that are given the same rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=index % 2 == 0) for index in range(4))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() if self.between else layer(x)
        return sum(expert(x) for expert in self.experts)


@pytest.mark.parametrize("between", (False, True))
def test_layers_are_told_from_experts_by_what_feeds_them(between):
    """Also past layers of another kind; what happens to a tensor between two layers is not followed."""
    model = Alternating()
    model.between = between
    done = watched(model, candidates(model))
    model(torch.randn(3, 8))
    assert done().chained == (set() if between else {"layers"})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
