"""Capacities that the batch of `prepare` does not show: never a wrong answer for a batch of another skew or size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import forms
from tests.balancing import compiled_step, relative, step
from ultraep_compile import explain


def _cut(h, ids, w, experts, capacity: int):
    """Each expert takes the first so many of its tokens."""
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        token, choice = (index[:capacity] for index in torch.where(ids == e))
        out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
    return out


class CutBelowEveryLoad(forms.LoopOverHit):
    """All experts full in any usual batch, as if they chose tokens."""

    def mix(self, h):
        w, ids = self.router(h)
        return _cut(h, ids, w, self.experts, max(1, len(h) // 16))


class MaskedBelowEveryLoad(forms.CapacityEinsum):
    """The same, written in tensors."""

    def capacity(self, length):
        return max(1, length // (2 * forms.EXPERTS))


class _GivenIds(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(forms.Swiglu() for _ in range(forms.EXPERTS))

    def forward(self, h, ids, w):
        return _cut(h, ids, w, self.members, int(len(h) * 0.9))


class CutByGivenIds(forms.LoopOverHit):
    """Ids come as an argument, and nothing is dropped unless nearly all of them are the same."""

    def __init__(self):
        super().__init__()
        self.experts = _GivenIds()

    def mix(self, h):
        w, ids = self.router(h)
        return self.experts(h, ids, w)


class MaskedAtANumber(forms.SwitchCapacity):
    """A fixed capacity beyond all probes, which shows in a tensor."""

    def mix(self, h):
        w, ids = self.router(h).softmax(-1).max(-1)
        hot = F.one_hot(ids, forms.EXPERTS)
        hot = hot * (hot.cumsum(0) <= 600)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts.values()):
            token = hot[:, e].nonzero().squeeze(-1)
            out[token] = expert(h[token])
        return out * w[:, None]


class CutAtANumber(forms.LoopOverHit):
    """A fixed capacity beyond all probes, which does not."""

    def mix(self, h):
        w, ids = self.router(h)
        return _cut(h, ids, w, self.experts, 600)


FOUND = {
    CutBelowEveryLoad: ("missed", "", 0, 0),
    MaskedBelowEveryLoad: ("rewritten", "", 1, 1),
    CutByGivenIds: ("missed", "", 0, 0),
    MaskedAtANumber: ("rewritten", "", 1, 1),
    CutAtANumber: ("rewritten", "up to 600 tokens", 1, 0),
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_capacity(kind):
    status, said, small, large = FOUND[kind]
    torch.manual_seed(0)
    model = kind().train()
    (site,) = explain(model, {"x": torch.randn(2, 16, forms.WIDTH)}).moe_sites
    assert site.status == status and said in site.matched, site
    favourite = torch.randn(forms.WIDTH)
    for tokens, skewed, balanced in ((16, False, small), (24, True, small), (400, True, large)):
        x = torch.randn(2, tokens, forms.WIDTH)
        batch = {"x": x * 0.05 + favourite if skewed else x}
        eager = step(model, model, batch)
        ours, graphs = compiled_step(model, batch, ranks=4)
        assert sum(len(g.prepared) for g in graphs) == balanced
        assert relative(ours.loss, eager.loss) < 1e-5
        for name, grad in eager.grads.items():
            assert float((ours.grads[name] - grad).norm()) < 1e-4 * float(grad.norm()) + 1e-6, name
