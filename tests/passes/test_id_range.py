"""What the ops that made expert ids say about the largest of them."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.passes.harness import capture, compare_models
from ultraep_compile.passes.lift.id_range import id_bound
from ultraep_compile.passes.lift.nodes import GraphFacts

CHOICES = {
    "a part of the scores": (lambda s: s[:, :8].topk(2, -1)[1], 8),
    "along the first dim": (lambda s: s[:, :8].t().topk(2, 0)[1].t(), 8),
    "argmax": (lambda s: s[:, :8].argmax(-1, keepdim=True), 8),
    "sorted": (lambda s: s[:, :8].sort(-1, descending=True)[1][:, :2], 8),
    "argsort without a dim": (lambda s: s[:, :8].argsort()[:, -2:], 8),
    "two maxima side by side": (lambda s: torch.stack([s[:, :8].max(-1)[1], s[:, 2:5].max(1).indices], 1), 8),
    "the last choice is replaced": (lambda s: (i := s.topk(1, -1)[1]).masked_fill(i == 8, 0), 8),
    "compared by the method": (lambda s: (i := s.topk(1, -1)[1]).masked_fill(i.__eq__(8), 0), 8),
    "and by another expert": (lambda s: torch.where((i := s.topk(2, -1)[1]) > 5, 6, i), 7),
    "clamped": (lambda s: s.topk(2, -1)[1].clamp(max=7).int(), 8),
    "modulo": (lambda s: s.topk(2, -1)[1] % 8, 8),
    "all of them": (lambda s: s.topk(2, -1)[1], 9),
    "a choice in the middle is replaced": (lambda s: (i := s.topk(2, -1)[1]).masked_fill(i == 4, 0), 9),
    "by itself": (lambda s: (i := s.topk(1, -1)[1]).masked_fill(i == 8, 8), 9),
    "by what other ids say": (lambda s: s.topk(1, -1)[1].masked_fill(s.argmin(-1, keepdim=True) == 8, 0), 9),
    "arithmetic": (lambda s: s[:, :4].topk(2, -1)[1] * 2, None),
    "along no dim": (lambda s: s.argmax().expand(32, 1), None),
    "written to": (lambda s: s[:, :4].topk(2, -1)[1].add_(5), None),
}


@pytest.mark.parametrize("how", CHOICES)
def test_bound(how):
    choose, bound = CHOICES[how]
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    scores = torch.randn(32, 9)
    ids = torch.compile(choose, backend=backend)(scores)
    (gm,) = graphs
    (made,) = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    assert id_bound(GraphFacts(gm), made) == bound
    assert bound is None or int(ids.max()) < bound


class _Wide(zoo.HandMoE):
    """A router of one choice more than there are experts."""

    def __init__(self, skips):
        super().__init__()
        self.router, self.skips = torch.nn.Linear(zoo.WIDTH, zoo.EXPERTS + 1), skips

    def route(self, h):
        w, i = self.router(h).softmax(-1).topk(2, -1)
        none = i == zoo.EXPERTS
        return (w.masked_fill(none, 0), i.masked_fill(none, 0)) if self.skips else (w, i)

    def experts(self, rows, ids):
        return super().experts(rows, ids.clamp(0, zoo.EXPERTS - 1))


def test_router_with_a_choice_of_none():
    """Rewritten where that choice is sent to some expert with weight 0; refused where an id beyond the experts goes on."""
    inputs = {"x": torch.randn(2, 16, zoo.WIDTH)}
    result = compare_models(_Wide(True), [inputs])
    assert result.sites == 1 and result.loss < 1e-6 and result.gradient < 1e-5
    got = capture(_Wide(False), inputs, record=False)
    assert got.sites == [] and "ids beyond the experts have a meaning" in got.misses[0].reason
