"""What cannot be lifted is refused, with a reason that names the op; nothing is rewritten in part."""

import pytest
import torch
from torch import nn

from tests import zoo
from tests.passes.harness import capture, compare_models
from ultraep_compile.passes.lift import Refusal, verify_site
from ultraep_compile.passes.lift.site import Site
from ultraep_compile.passes.lift.verify import _proven


class _Acting(zoo.HandMoE):
    def __init__(self, act):
        super().__init__()
        self._act = act

    def act(self, a):
        return self._act(a)


class _AfterExperts(zoo.HandMoE):
    def __init__(self, change):
        super().__init__()
        self._change = change

    def mix(self, h):
        w, i = self.route(h)
        ids, rows = i.reshape(-1), h.repeat_interleave(2, dim=0)
        y = self._change(self.experts(rows, ids), ids, rows)
        return (y * w.reshape(-1, 1)).view(-1, 2, zoo.WIDTH).sum(1)


ACTS = {
    "mean over rows": (lambda a: a - a.mean(0, keepdim=True), "mean"),
    "softmax over rows": (lambda a: torch.softmax(a, 0), "softmax along dim 0"),
    "method softmax": (lambda a: a.softmax(dim=-2), "softmax along dim -2"),
    "cumsum over rows": (lambda a: a.cumsum(0), "cumsum along dim 0"),
    "sort over rows": (lambda a: a.sort(0).values, "sort along dim 0"),
    "batch norm": (lambda a: nn.functional.batch_norm(a, None, None, training=True), "batch_norm mixes rows"),
    "flip": (lambda a: a.flip(0), "flip along dim 0"),
    "roll": (lambda a: a.roll(1, 0), "roll along dim 0"),
    "attention over rows": (lambda a: (a @ a.t()).softmax(-1) @ a, "every row against every other"),
    "first row": (lambda a: a - a[:1], "getitem mixes rows"),
    "one number of all rows": (lambda a: a / a.norm(), "norm mixes rows"),
}


@pytest.mark.parametrize("act", ACTS)
def test_mixes_rows(act):
    function, reason = ACTS[act]
    got = capture(_Acting(function), {"x": torch.randn(2, 16, zoo.WIDTH)}, record=False)
    assert got.sites == []
    (miss,) = got.misses
    assert reason in miss.reason
    assert "test_refusals.py" in miss.reason or "zoo.py" in miss.reason  # the line to look at


# What happens to the pairs outside of the products stays outside: the pairs are then tokens of one choice each.
CHANGES = {
    "predicate on the id": lambda y, ids, rows: torch.where((ids >= 5).unsqueeze(-1), rows, y),
    "arithmetic on the id": lambda y, ids, rows: y * ids.unsqueeze(-1),
    "another batch": lambda y, ids, rows: y + torch.arange(64.0).unsqueeze(-1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_tells_rows_apart_stays_outside(change):
    _rewritten_as_pairs(_AfterExperts(CHANGES[change]))


def _rewritten_as_pairs(model):
    inputs = {"x": torch.randn(2, 16, zoo.WIDTH)}
    (site,) = capture(model, inputs, record=False).sites
    assert site.top_k == 1
    result = compare_models(model, [inputs])
    assert result.sites == 1 and result.loss < 1e-6 and result.gradient < 1e-5


class _Clamped(zoo.HandMoE):
    """Ids are changed on their way: two experts in one."""

    def experts(self, rows, ids):
        return super().experts(rows, ids.clamp(max=5))


class _OtherOrder(zoo.HandMoE):
    """Pairs choice by choice: not the order of the ids."""

    def mix(self, h):
        w, i = self.route(h)
        y = self.experts(h.repeat(2, 1), i.reshape(-1))
        return (y * w.reshape(-1, 1)).view(-1, 2, zoo.WIDTH).sum(1)


class _Overwritten(zoo.HandMoE):
    """The token states change between the router and the end of the experts; the pairs were made before."""

    def mix(self, h):
        h = h.clone()
        w, i = self.route(h.clone())
        rows = h.repeat_interleave(2, dim=0)
        h.mul_(2)
        return (self.experts(rows, i.reshape(-1)) * w.reshape(-1, 1)).view(-1, 2, zoo.WIDTH).sum(1) + h


class _PartlyNoGrad(zoo.HandMoE):
    """Half of the expert's products carry no gradient."""

    def experts(self, rows, ids):
        with torch.no_grad():
            a = torch.relu(torch.bmm(self.up[ids], rows.unsqueeze(-1)))
        return torch.bmm(self.down[ids], a).squeeze(-1)


class _ViewWritten(zoo.HandMoE):
    """A view of the rows is written to before they are read."""

    def mix(self, h):
        w, i = self.route(h)
        rows = h.repeat_interleave(2, dim=0)
        rows.view(-1).mul_(2.0)
        return (self.experts(rows, i.reshape(-1)) * w.reshape(-1, 1)).view(-1, 2, zoo.WIDTH).sum(1)


REFUSED = {
    _Clamped: "changes legal ids",
    _PartlyNoGrad: "grad mode or autocast changes",
    _ViewWritten: "written to through its view",
}


@pytest.mark.parametrize("kind", [_OtherOrder, _Overwritten], ids=lambda k: k.__name__)
def test_pairs_made_otherwise_are_tokens_of_one_choice(kind):
    _rewritten_as_pairs(kind())


@pytest.mark.parametrize("kind", REFUSED, ids=lambda k: k.__name__)
def test_refused(kind):
    model, inputs = kind(), {"x": torch.randn(2, 16, zoo.WIDTH)}
    got = capture(model, inputs, record=False)
    assert got.sites == []
    assert REFUSED[kind] in got.misses[0].reason
    result = compare_models(model, [inputs])
    assert result.sites == 0 and result.loss == 0


class _Hidden(nn.Module):
    """Mixes rows out of sight of probing: the shape stays and no dim is named."""

    def forward(self, a):
        return torch.triu(a)


def test_run_time_proof():
    """What probing lets pass, the proof on random rows does not."""
    got = capture(_Acting(_Hidden()), {"x": torch.randn(2, 16, zoo.WIDTH)}, record=False)
    (site,) = got.sites
    with pytest.raises(Refusal, match="place"):
        verify_site(site)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y + y.flip(0) * 0.1", "row"),
        ("y + rows.sum() * 1e-3", "row"),
        ("y.detach() + y.mean(0, keepdim=True) - y.mean(0, keepdim=True).detach()", "row"),
        ("y * params[0].shape[0]", "number of experts"),
        ("y + torch.nan_to_num(y).max() * 0 + y[3:4] * 0", "row"),
    ],
)
def test_proof_sees(text, reason):
    """The proof on functions no probing would pass: values, order, gradient only, expert count."""
    import dataclasses

    got = capture(zoo.HandMoE(), {"x": torch.randn(2, 16, zoo.WIDTH)}, record=False)
    (site,) = got.sites
    site = dataclasses.replace(site, row_function=_changed(site, text))
    before = len(_proven)
    with pytest.raises(Refusal, match=reason):
        verify_site(site)
    assert len(_proven) == before


def _changed(site: Site, text: str):
    graph = torch.fx.Graph()
    env = {}
    for n in site.row_function.graph.nodes:
        if n.op == "output":
            y = torch.fx.Proxy(env[n.args[0]])
            holders = [torch.fx.Proxy(env[p]) for p in site.row_function.graph.nodes if p.op == "placeholder"]
            out = eval(text, {"y": y, "rows": holders[0], "params": holders[2:], "torch": torch})
            graph.output(out.node)
        else:
            env[n] = graph.node_copy(n, lambda a: env[a])
    return torch.fx.GraphModule(nn.Module(), graph)
