"""Further forms of public training code: rewritten and equal to eager, or reported with the reason."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import forms, forms_public
from tests.balancing import assert_as_good_as_eager, compiled_step, relative, step
from ultraep_compile import explain, prepare

QUICK = ("ChoiceByChoice", "TokensStacked", "CapacityBuffer", "PerSample", "LowRankBeside", "NormsInside", "FlatIndex")
RANDOM = ("MaskedSoftmax",)
"""Draws that fp64 does not repeat: compared in eval."""


def slow_but(quick, names):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", slow_but(QUICK, forms_public.LIFTED))
def test_balanced_like_eager(name):
    model, inputs = forms_public.build(name)
    model.train(name not in RANDOM)
    found = explain(model, inputs)
    (site,) = found.moe_sites
    assert (site.status, site.rung, site.experts) == ("rewritten", "lifted", forms.EXPERTS)
    assert site.source and found.rewritten_parameters == found.expert_parameters > 0
    keys = list(model.state_dict())
    for training in (model.training, False):
        eager_model = copy.deepcopy(model).train(training)
        model.train(training)
        if not training:
            inputs = {"x": torch.randn(3, 21, forms.WIDTH)}
        exact_model = copy.deepcopy(eager_model).double()
        eager = step(eager_model, eager_model, inputs)
        ours, graphs = compiled_step(model, inputs, ranks=4)
        assert sum(len(g.prepared) for g in graphs) == 1
        assert all(torch.equal(b, dict(eager_model.named_buffers())[n]) for n, b in model.named_buffers())
        if name == "ScatterReduced" and not training:
            assert relative(ours.loss, eager.loss) < 1e-6  # that way has no gradients
            continue
        exact = step(exact_model, exact_model, {"x": inputs["x"].double()})
        unused = ours.grads.keys() - eager.grads.keys()  # an expert without tokens has no gradient in eager
        assert eager.grads.keys() <= ours.grads.keys() and not any(ours.grads[n].any() for n in unused)
        assert_as_good_as_eager(ours, eager, exact, floor=2e-6)
    assert list(model.state_dict()) == keys


REASONS = {
    "StraightThrough": "every expert computes every token",
    "ManyGates": "every expert computes every token",
    "ExpertChoiceGathered": "experts choose tokens",
    "RetrievedRows": "an expert is one row of each of its tables",
    "RowsByParameter": "an expert is one row of each of its tables",
    "TwoStreams": "side by side in one tensor",
    "DifferentSizes": "weights of different sizes",
    "Convolutions": "not understood as a function of single rows",
    "BatchNormed": "batch_norm inside the experts mixes rows",
    "SkippingPadding": "ids or weights for each token",
}


@pytest.mark.parametrize("name", REASONS)
def test_reported_with_the_reason(name):
    model, inputs = forms_public.build(name)
    found = explain(model, inputs)
    (site,) = found.moe_sites
    assert site.status == ("missed" if name in forms_public.MISSED else "unbalanceable")
    assert REASONS[name] in site.reason
    assert found.rewritten_parameters == 0 < found.expert_parameters
    eager = step(model, model, inputs)
    ours, graphs = compiled_step(model, inputs, ranks=4)
    assert sum(len(g.prepared) for g in graphs) == 0 and relative(ours.loss, eager.loss) < 1e-6


@pytest.mark.parametrize(("own", "shared"), [(2, 2), (1, 1), (3, 1)])
def test_every_list_of_a_dense_mixture(own, shared):
    """Experts of one task and shared ones stand in lists of different lengths, of one as well."""
    torch.manual_seed(0)
    found = explain(forms_public.SharedAndOwn(own, shared), {"x": torch.randn(2, 16, forms.WIDTH)})
    assert [(s.name, s.status) for s in found.moe_sites] == [("own", "unbalanceable"), ("shared", "unbalanceable")]
    assert all("every expert computes every token" in s.reason for s in found.moe_sites)


def test_rows_as_experts_in_several_layers():
    """Each layer is a site, its experts and their parameters are those of its tables alone."""
    torch.manual_seed(0)
    model = forms.nn.Sequential(forms_public.RetrievedRows(), forms_public.RowsByParameter(), forms_public.RetrievedRows())
    found = explain(model, {"input": torch.randn(2, 16, forms.WIDTH)})
    assert [(s.name, s.status, s.experts, s.top_k) for s in found.moe_sites] == [
        (name, "unbalanceable", 64, forms.TOP_K) for name in "012"
    ]
    assert found.expert_parameters == 3 * 2 * 64 * forms.WIDTH


@pytest.mark.parametrize("name", forms_public.NEGATIVES)
def test_no_false_site(name):
    model, inputs = forms_public.build(name)
    found = explain(model, inputs)
    assert found.moe_sites == [] and found.expert_parameters == 0


# ---- what a rewrite could change in silence -------------------------------------------------------------------------


def same_as_eager(model, x, **options):
    """Outputs, gradients and buffers of one step, ours against a copy that runs by itself; how many layers were rewritten."""
    twin = copy.deepcopy(model)
    eager = step(twin, twin, {"x": x})
    ours, graphs = compiled_step(model, {"x": x}, ranks=4, **options)
    assert relative(ours.loss, eager.loss) < 1e-6 and ours.grads.keys() >= eager.grads.keys()
    for name, grad in eager.grads.items():
        assert relative(ours.grads[name], grad) < 1e-4 or grad.norm() < 1e-6, name
    theirs = dict(twin.named_buffers())
    assert all(torch.equal(b, theirs[n]) for n, b in model.named_buffers())
    return sum(len(g.prepared) for g in graphs)


def test_hooks_on_experts_run():
    """Those that were there are a reason; those that come later switch the rewrite off."""
    model, inputs = forms.build("LoopOverHit")
    seen = []
    expert = model.get_submodule("experts.1")
    hook = expert.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    (site,) = explain(model, inputs).moe_sites
    assert site.status == "missed" and "experts.1 has hooks" in site.reason
    hook.remove()
    prepare(model, inputs)
    assert same_as_eager(model, inputs["x"]) == 1
    expert.register_forward_hook(lambda module, args, out: (seen.append(len(args[0])), 2 * out)[1])
    seen.clear()
    assert same_as_eager(model, inputs["x"]) == 0 and len(seen) == 2


class _Repeated(forms.nn.Module):
    """One layer, three times in a forward, as universal transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = forms.LoopOverHit()

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x)
        return x


class _Tied(forms.nn.Module):
    """Two layers with routers of their own and the same experts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = forms.LoopOverHit(), forms.LoopOverHit()
        self.second.experts = self.first.experts

    def forward(self, x):
        return self.second(self.first(x))


class _Penalised(forms.LoopOverHit):
    """Expert weights read again, for a penalty; the probabilities, counts and entropy of the router returned beside."""

    def forward(self, x):
        h = x.reshape(-1, forms.WIDTH)
        probs = self.router.proj(h).softmax(-1)
        counts = torch.bincount(self.router(h)[1].flatten(), minlength=forms.EXPERTS)
        penalty = sum(p.square().sum() for n, p in self.named_parameters() if n.endswith("up.weight")) * 1e-3
        entropy = -(probs * probs.log()).sum(-1).mean()
        loss = (counts / counts.sum() * probs.mean(0)).sum() + entropy + penalty
        return super().forward(x) + loss, probs, counts


class _ReadTwice(forms.LoopOverHit):
    """What an expert gave is used twice: added up, and as a measure of its size."""

    def mix(self, h):
        w, ids = self.router(h)
        out, size = torch.zeros_like(h), torch.zeros(h.shape[0])
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y = expert(h[token])
            out.index_add_(0, token, y * w[token, choice, None])
            size.index_add_(0, token, y.square().mean(-1))
        return out / (1 + size[:, None])


class _Jittered(forms.LoopOverHit):
    """Noise on what the router reads while training."""

    def mix(self, h):
        noisy = h * torch.empty_like(h).uniform_(0.9, 1.1) if self.training else h
        w, ids = self.router(noisy)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class _Shared(forms.LoopOverHit):
    """A shared expert that only some tokens go through, scaled by a gate of each."""

    def __init__(self):
        super().__init__()
        self.shared, self.shared_gate = forms.Swiglu(), forms.nn.Linear(forms.WIDTH, 1)

    def mix(self, h):
        gate = self.shared_gate(h).sigmoid()
        return super().mix(h) + self.shared(h) * gate * (gate > 0.5)


SURROUNDINGS = {_Repeated: 3, _Tied: 2, _Penalised: 1, _ReadTwice: None, _Jittered: 1, _Shared: 1}
"""Layers rewritten; None where none has to be."""


@pytest.mark.parametrize("kind", slow_but([_Repeated, _Penalised, _ReadTwice], SURROUNDINGS), ids=lambda k: k.__name__)
def test_nothing_changes_in_silence(kind):
    torch.manual_seed(0)
    model, x = kind().train(), torch.randn(2, 16, forms.WIDTH)
    prepare(model, {"x": x})
    rewritten = same_as_eager(model, x)
    assert rewritten == SURROUNDINGS[kind] or SURROUNDINGS[kind] is None


def test_buffers_that_the_forward_moves():
    """A bias against uneven loads, moved in every forward of training: the same after three steps, and left alone in eval."""
    model, inputs = forms_public.build("LossFreeBias")
    prepare(model, inputs)
    for seed in range(3):
        torch.manual_seed(seed)
        assert same_as_eager(model, torch.randn(2, 16, forms.WIDTH)) == 1
    moved = model.get_buffer("bias").clone()
    assert (moved != 0).any()
    model.train(False)
    assert same_as_eager(model, inputs["x"]) == 1 and torch.equal(model.get_buffer("bias"), moved)
