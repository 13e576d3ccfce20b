"""What is said of layers: one name for a gating wherever its experts stand, true reasons, and a bug of ours told as such."""

from __future__ import annotations

import copy
import enum
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.balancing import relative
from ultraep_compile import explain, prepare
from ultraep_compile.errors import SiteCountError
from ultraep_compile.ladder import layer as ladder_layer
from ultraep_compile.preparation import findings_of
from ultraep_compile.report import collect_reports

WIDTH, EXPERTS, FFN = 16, 8, 24
OPTIONS = {"ranks": 4, "redundant_experts": 1, "inner": "aot_eager"}


def softmax_topk(layer: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    w, ids = layer.gate(h).softmax(-1).topk(2, -1)
    return w / w.sum(-1, keepdim=True), ids


def topk_softmax(layer, h):
    w, ids = layer.gate(h).topk(2, -1)
    return w.softmax(-1), ids


def topk_sigmoid(layer, h):
    w, ids = layer.gate(h).topk(2, -1)
    return w.sigmoid(), ids


def sigmoid_bias_topk(layer, h):
    scores = layer.gate(h).sigmoid()
    ids = (scores + layer.bias).topk(2, -1).indices
    return scores.gather(1, ids), ids


def group_limited(layer, h):
    p = layer.gate(h).softmax(-1)
    groups = p.view(-1, 4, 2).amax(-1).topk(2, -1).indices
    seen = torch.zeros_like(p[:, :4]).scatter(1, groups, 1.0).repeat_interleave(2, 1)
    return p.masked_fill(seen == 0, 0.0).topk(2, -1)


ROUTERS = {f.__name__.replace("_", "-"): f for f in (softmax_topk, topk_softmax, topk_sigmoid, sigmoid_bias_topk)}
ROUTERS["group-limited"] = group_limited


class Routed(nn.Module):
    def __init__(self, router: str, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.route, self.form = ROUTERS[router], form
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.register_buffer("bias", torch.randn(EXPERTS) * 0.1)
        if form == "looped":
            one = lambda: nn.Sequential(nn.Linear(WIDTH, FFN), nn.SiLU(), nn.Linear(FFN, WIDTH))  # noqa: E731
            self.experts = nn.ModuleList(one() for _ in range(EXPERTS))
        else:
            self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
            self.down = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        w, ids = self.route(self, h)
        if self.form == "gathered":
            rows = F.silu(torch.bmm(h.repeat_interleave(2, 0)[:, None], self.up[ids.flatten()]))
            return (torch.bmm(rows, self.down[ids.flatten()]).view(-1, 2, WIDTH) * w[..., None]).sum(1).view_as(x)
        if self.form == "einsum":
            gates = torch.zeros(len(h), EXPERTS).scatter(1, ids, w)
            rows = F.silu(torch.matmul(h, self.up))
            return torch.einsum("te,etf,efd->td", gates, rows, self.down).view_as(x)
        y = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if len(t):
                y.index_add_(0, t, expert(h[t]) * w[t, k, None])
        return y.view_as(x)


DENSE = [pytest.param(r, "einsum", marks=pytest.mark.slow) for r in ROUTERS if r != "sigmoid-bias-topk"]


@pytest.mark.parametrize("router, form", [*((r, f) for r in ROUTERS for f in ("gathered", "looped")), *DENSE])
def test_a_gating_has_one_name(router, form):
    model = Routed(router, form)
    (site,) = explain(model, (torch.randn(2, 24, WIDTH),)).moe_sites
    assert (site.status, site.gating) == ("rewritten", router)


class Looped(nn.Module):
    """Experts in a loop, with something of its own in `before`."""

    def __init__(self, how: str = "", experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.gate = how, nn.Linear(WIDTH, experts)
        one = lambda: nn.Sequential(nn.Linear(WIDTH, FFN), nn.SiLU(), nn.Linear(FFN, WIDTH))  # noqa: E731
        self.experts = nn.ModuleList(one() for _ in range(experts))
        self.register_buffer("load", torch.zeros(experts))

    def before(self, p: Tensor) -> tuple[Tensor, int]:
        return p, 2

    def count(self, ids: Tensor) -> None:
        pass

    def rows(self, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return at

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        p, k = self.before(self.gate(h).softmax(-1))
        w, ids = p.topk(k, -1)
        with torch.no_grad():
            self.count(ids)
        y = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            t, c = self.rows(torch.where(ids == e))
            if t.numel():
                y.index_add_(0, t, expert(h[t]) * w[t, c, None])
        return y.view_as(x)


class _Size(enum.IntEnum):
    TWO = 2


GENERATOR = torch.Generator().manual_seed(3)
VALUES = {
    "types": lambda p: (p.to(float).to(dtype=torch.float32).masked_fill(~p.new_ones(p.shape, dtype=bool), 0.0), 2),
    "int": lambda p: (p + torch.zeros(p.shape[-1], dtype=int), 2),
    "numpy": lambda p: (p * np.float32(1.5) + np.float64(0.0), np.int64(2)),
    "array": lambda p: (p[:, np.arange(4)], 2),
    "enum": lambda p: (p, _Size.TWO),
    "size": lambda p: (p + torch.zeros(p.size()), 2),
    "complex": lambda p: (p.to(complex).real.float(), 2),
    "slices": lambda p: (p[..., None, slice(None), None][:, 0, :, 0], 2),
    "device": lambda p: (p + torch.zeros(4, device=torch.device("cpu")), 2),
    "generator": lambda p: (p + 0 * torch.rand(p.shape[-1:], generator=GENERATOR), 2),
}


class Valued(Looped):
    def before(self, p):
        return VALUES[self.how](p)


DEFAULT = ("types", "numpy", "enum")


@pytest.mark.parametrize("how", [h if h in DEFAULT else pytest.param(h, marks=pytest.mark.slow) for h in VALUES])
def test_values_of_python_and_numpy(how):
    model = Valued(how)
    x = torch.randn(2, 12, WIDTH)
    ours = copy.deepcopy(model)
    (finding,) = prepare(ours, (x,)) and findings_of(ours)
    if how == "array":
        assert finding.rung == "missed" and "neither made by the forward nor held by the module" in finding.reason
        return
    assert finding.rung == "lifted", finding.reason
    torch._dynamo.reset()
    ours.compile(backend="ultraep", options=OPTIONS)
    assert relative(ours(x), model(x)) < 1e-5


COUNTS = {
    "bincount": lambda m, ids: m.load.add_(torch.bincount(ids.flatten(), minlength=4)),
    "without minlength": lambda m, ids: m.load.add_(F.pad(c := ids.flatten().bincount(), (0, 4 - len(c)))),
    "unique": lambda m, ids: m.load.index_add_(
        0, *[t.float() if i else t for i, t in enumerate(ids.unique(return_counts=True))]
    ),
    "histc": lambda m, ids: m.load.add_(torch.histc(ids.float(), bins=4, min=0, max=3)),
}


class Counting(Looped):
    def count(self, ids):
        COUNTS[self.how](self, ids)


class Checkpointed(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.moe, x, use_reentrant=False)


@pytest.mark.parametrize(
    "how", [h if h in ("bincount", "unique") else pytest.param(h, marks=pytest.mark.slow) for h in COUNTS]
)
def test_counts_under_a_checkpoint(how):
    """Nothing breaks the graph: under a checkpoint, the whole frame would run as it is, and nobody would be told."""
    model = Checkpointed(Counting(how))
    x = torch.randn(2, 24, WIDTH)
    ours = copy.deepcopy(model)
    prepare(ours, (x,))
    torch._dynamo.reset()
    ours.compile(backend="ultraep", options={**OPTIONS, "expect_moe_sites": 1})
    with collect_reports() as reports:
        ours(x).square().sum().backward()
    assert [len(g.prepared) for g in reports.graphs] == [1]
    plain = copy.deepcopy(model.moe)
    plain(x).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-4 or b.grad.norm() < 1e-6
    assert torch.equal(ours.moe.load, plain.load)


def test_plain_tensors_in_the_place_of_parameters():
    """`functional_call` with a compiled model is balanced; inside of what is compiled, it is a miss with a reason."""
    model = Routed("softmax-topk", "gathered")
    x = torch.randn(2, 24, WIDTH)
    weights = {n: p.detach() * 1.2 for n, p in model.named_parameters()}
    want = torch.func.functional_call(model, weights, (x,))
    ours = copy.deepcopy(model)
    ours.compile(backend="ultraep", options={**OPTIONS, "expect_moe_sites": 1})
    assert relative(torch.func.functional_call(ours, weights, (x,)), want) < 1e-5
    torch._dynamo.reset()
    inside = lambda w, x: torch.func.functional_call(model, w, (x,))  # noqa: E731
    with pytest.warns(UserWarning, match="are an argument of what is compiled"):
        assert relative(torch.compile(inside, backend="ultraep", options=OPTIONS)(weights, x), want) < 1e-5
    torch._dynamo.reset()
    with pytest.raises(SiteCountError, match="are an argument of what is compiled"):
        torch.compile(inside, backend="ultraep", options={**OPTIONS, "expect_moe_sites": 1})(weights, x)


def test_a_bug_is_told_as_one(monkeypatch, caplog):
    def broken(*args):
        raise KeyError("no such thing")

    monkeypatch.setattr(ladder_layer, "find_parts", broken)
    with caplog.at_level(logging.WARNING):
        (site,) = explain(Looped(), (torch.randn(2, 12, WIDTH),)).moe_sites
    assert site.status == "missed" and site.name == "experts"
    assert (
        "internal error KeyError at ultraep_compile/ladder/layer.py:" in site.reason and "no such thing" in site.reason
    )
    assert any(record.exc_info for record in caplog.records)


class Fussy(Looped):
    """Raises, as a model may, on batches that it was not made for."""

    def forward(self, x):
        if x.shape[1] != 12:
            raise KeyError("twelve tokens, please")
        return super().forward(x)


def test_what_the_model_raises_is_no_bug():
    for site in explain(Fussy(), (torch.randn(2, 12, WIDTH),)).moe_sites:
        assert "internal error" not in site.reason


class Cut(Looped):
    def rows(self, at):
        return at[0][:10], at[1][:10]


class CutIfLong(Looped):
    def rows(self, at):
        return (at[0][:10], at[1][:10]) if at[0].numel() > 10 else at


@pytest.mark.parametrize("kind", [Cut, pytest.param(CutIfLong, marks=pytest.mark.slow)])
def test_capacity_by_slicing(kind):
    (site,) = explain(kind(), (torch.randn(2, 24, WIDTH),)).moe_sites
    assert site.status == "missed" and "capacity" in site.reason and "the first 10 of its tokens" in site.reason
    assert "test_reasons.py:" in site.reason


class Heads(nn.Module):
    """A head for each task; the caller says which."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, FFN), nn.ReLU(), nn.Linear(FFN, 4)) for _ in range(3))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        if self.dense:
            every = torch.stack([head(x) for head in self.heads], 1)
            return every.gather(1, task[:, None, None].expand(-1, 1, 4)).squeeze(1)
        out = x.new_zeros(len(x), 4)
        for i, head in enumerate(self.heads):
            out[task == i] = head(x[task == i])
        return out


@pytest.mark.parametrize("dense", [True, False])
def test_heads_of_tasks_are_no_experts(dense):
    found = explain(Heads(dense), (torch.randn(12, WIDTH), torch.randint(0, 3, (12,))))
    assert found.moe_sites == [] and found.expert_parameters == 0


class Noisy(Looped):
    """Two equal linear layers: scores, and the size of their noise."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        logits = self.gate(h)
        logits = logits + torch.randn_like(logits) * F.softplus(self.noise(h))
        best, ids = logits.topk(2, -1)
        g, y = torch.full_like(logits, -torch.inf).scatter(-1, ids, best).softmax(-1), torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            t = (ids == e).any(-1).nonzero().flatten()
            y[t] += expert(h[t]) * g[t, e, None]
        return y.view_as(x)


def test_scores_and_their_noise_are_no_experts():
    model = Noisy()
    found = explain(model, (torch.randn(2, 12, WIDTH),))
    assert [(s.name.startswith("experts"), s.status, s.experts) for s in found.moe_sites] == [(True, "rewritten", 4)]
    assert found.expert_parameters == sum(p.numel() for p in model.experts.parameters())


class InferenceOnly(Looped):
    """Writes into what its own backward would need."""

    def before(self, p):
        squared = p.square()
        p.mul_(1.0)
        return squared, 2


def test_a_forward_without_backward_is_lifted_for_inference():
    model = InferenceOnly()
    x = torch.randn(2, 12, WIDTH)
    with pytest.raises(RuntimeError, match="inplace"):
        model(x).sum().backward()
    ours = copy.deepcopy(model)
    (finding,) = prepare(ours, (x,)) and findings_of(ours)
    assert finding.rung == "lifted" and "for inference only" in finding.reason and "inplace" in finding.reason
    torch._dynamo.reset()
    ours.compile(backend="ultraep", options={**OPTIONS, "expect_moe_sites": 1})
    with torch.no_grad():
        assert relative(ours(x), model(x)) < 1e-5
    torch._dynamo.reset()
    ours.compile(backend="ultraep", options=OPTIONS)
    with pytest.raises(RuntimeError, match="inplace"):
        ours(x).sum().backward()
