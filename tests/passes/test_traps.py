"""What went wrong, or could have, while lifting and rewriting graphs: each trap and its cure."""

import pytest
import torch
import torch._dynamo
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import ultraep_compile.ops  # noqa: F401  (defines the unshard op)
from tests import zoo
from tests.passes.harness import capture, compare_models, insert_reference_op, run_site
from ultraep_compile.passes.lift import Site, find_moe_sites, verify_site
from ultraep_compile.passes.lift.lifter import Lifter

X = {"x": torch.randn(2, 16, zoo.WIDTH)}


def graph_of(model, dynamic=False, **inputs) -> fx.GraphModule:
    graphs = []
    torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward, dynamic=dynamic or None)(
        **(inputs or X)
    )
    return graphs[0]


def test_analysis_changes_nothing():
    gm = graph_of(zoo.WithEscape())
    before = gm.print_readable(print_output=False)
    assert len(find_moe_sites(gm)) == 1
    gm.graph.lint()
    gm.recompile()
    assert gm.print_readable(print_output=False) == before


def test_adds_no_guards():
    """Symbolic sizes are compared as expressions: no comparison may narrow what the graph is good for."""
    counts = []

    def backend(gm, _):
        fake = next(n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), torch.Tensor))
        env = fake.meta["example_value"].fake_mode.shape_env
        counts.append(len(env.guards))
        found = find_moe_sites(gm)
        for site in found:
            assert isinstance(site, Site)
            verify_site(site)
            insert_reference_op(gm, site)
        counts.append(len(env.guards))
        return gm.forward

    torch.compile(zoo.IndexAddCombine(), backend=backend, dynamic=True)(**X)
    assert counts[0] == counts[1]


class _Counting(zoo.HandMoE):
    """Counts the tokens of each expert in a buffer, in place, with nobody reading the result in the graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(zoo.EXPERTS))

    def experts(self, rows, ids):
        with torch.no_grad():
            self.seen.add_(torch.histc(ids.float(), bins=zoo.EXPERTS, min=0, max=zoo.EXPERTS - 1))
        return super().experts(rows, ids)


def test_writes_that_nobody_reads_stay():
    model = _Counting()
    result = compare_models(model, [X])
    assert result.sites == 1 and result.loss < 1e-6
    assert model.seen.sum() == 3 * 2 * 32  # one eager call and two compiled ones, K = 2


class _InPlaceActivation(zoo.HandMoE):
    def act(self, a):
        a *= 0.5
        a.add_(0.1)
        return nn.functional.relu(a, inplace=True)


class _SharedRouter(zoo.HandMoE):
    """Two groups of experts go by the same ids."""

    def __init__(self):
        super().__init__()
        self.up2 = nn.Parameter(torch.randn_like(self.up) * 0.2)

    def mix(self, h):
        w, i = self.route(h)
        ids, rows = i.reshape(-1), h.repeat_interleave(2, dim=0)
        first = (self.experts(rows, ids) * w.reshape(-1, 1)).view(-1, 2, zoo.WIDTH).sum(1)
        again = first.tanh().repeat_interleave(2, dim=0)
        a = torch.bmm(self.up2[ids], again.unsqueeze(-1)).relu()
        second = torch.bmm(self.down[ids], a).squeeze(-1)  # `down` serves both groups
        return first + (second * w.reshape(-1, 1)).view(-1, 2, zoo.WIDTH).sum(1)


class _Dropping(zoo.HandMoE):
    def act(self, a):
        return nn.functional.dropout(torch.relu(a), 0.0, self.training)


class _Checkpointed(zoo.HandMoE):
    def forward(self, x):
        return x + checkpoint(self.mix, x.reshape(-1, zoo.WIDTH), use_reentrant=False).view_as(x)


@pytest.mark.parametrize(("kind", "sites"), [(_InPlaceActivation, 1), (_SharedRouter, 2), (_Dropping, 1)])
def test_lifted_all_the_same(kind, sites):
    model = kind()
    got = capture(model, X)
    assert got.misses == [] and len(got.sites) == sites
    for site in got.sites:
        verify_site(site)
        errors = run_site(site, got.values_of(site))
        assert not errors.poisoned and max(errors.output, errors.gradients) < 5e-7
    result = compare_models(model, [X])
    assert result.sites == sites and result.loss < 1e-6 and result.gradient < 1e-6


def test_inside_a_checkpoint():
    """Activation checkpointing puts the layer into a graph of its own: it is found there."""
    gm = graph_of(_Checkpointed())
    inner = [m for m in gm.modules() if isinstance(m, fx.GraphModule) and m is not gm]
    assert find_moe_sites(gm) == []
    (site,) = [s for m in inner for s in find_moe_sites(m)]
    assert isinstance(site, Site) and site.top_k == 2


class _Aliased(zoo.HandMoE):
    """A view is taken, the tensor overwritten, the view read."""

    def act(self, a):
        view = a.view(a.shape[0], 24, 1)
        a.mul_(2.0)
        return view.squeeze(-1).relu()


class _SeenThroughView(zoo.HandMoE):
    """The combined output is read through a view taken before it was written."""

    def mix(self, h):
        w, i = self.route(h)
        ids, order = torch.sort(i.reshape(-1))
        out = torch.zeros_like(h)
        seen = out.view(-1)
        out.index_add_(0, order // 2, self.experts(h[order // 2], ids) * w.reshape(-1)[order].unsqueeze(-1))
        return seen.view_as(h)


@pytest.mark.parametrize(("kind", "reason"), [(_Aliased, "memory shared"), (_SeenThroughView, "sees it")])
def test_memory_shared_with_a_view(kind, reason):
    """Followed where it can be, else refused; never rewritten wrongly."""
    model = kind()
    got = capture(model, X, record=False)
    assert got.sites == [] and reason in got.misses[0].reason
    assert compare_models(model, [X]).loss == 0


class _Limited(zoo.HandMoE):
    def __init__(self):
        super().__init__()
        self.limit = 0.7

    def act(self, a):
        return a.clamp(min=-self.limit, max=self.limit)


def test_symbolic_floats():
    """dynamic=True makes floats of modules inputs of the graph; they reach the row function as 0-d tensors."""
    model = _Limited()
    got = capture(model, X, dynamic=True)
    (site,) = got.sites
    (limit,) = site.consts
    assert limit.meta["example_value"].ndim == 0
    verify_site(site)
    result = compare_models(model, [X, {"x": torch.randn(2, 9, zoo.WIDTH)}], dynamic=True)
    assert result.misses == [] and result.loss < 1e-6 and result.gradient < 1e-6
    assert result.graphs[0] == result.graphs[1]


class _Sharded(zoo.HandMoE):
    """Parameters reach the graph through the op that gathers them."""

    def experts(self, rows, ids):
        up, bias, down = (torch.ops.ultraep.unshard(p, zoo.EXPERTS, 1, "") for p in (self.up, self.up_bias, self.down))
        a = torch.relu(torch.bmm(up[ids], rows.unsqueeze(-1)).squeeze(-1) + bias[ids])
        return torch.bmm(down[ids], a.unsqueeze(-1)).squeeze(-1)


def test_unshard_stands_for_the_parameter():
    sites = []

    class Stop(Exception):
        pass

    def backend(gm, _):
        sites.extend(find_moe_sites(gm))
        raise Stop

    with pytest.raises(Exception, match="Stop"):
        torch.compile(_Sharded(), backend=backend)(**X)
    (site,) = sites
    assert len(site.params) == 3
    assert all("unshard" in str(p.target) for p in site.params)


class _Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_alike_are_lifted_once(monkeypatch):
    runs = []
    original = Lifter.run
    monkeypatch.setattr(Lifter, "run", lambda self, operands: runs.append(1) or original(self, operands))
    model = _Stack(*(zoo.IndexAddCombine() for _ in range(6)), _InPlaceActivation(), zoo.IndexAddCombine())
    got = capture(model, X)
    assert [s.name for s in got.sites] == [f"layers.{i}" for i in range(8)]
    assert len(runs) == 2
    assert len({id(s.row_function) for s in got.sites}) == 2
    for site in got.sites:
        errors = run_site(site, got.values_of(site))
        assert not errors.poisoned and max(errors.output, errors.gradients) < 5e-7
    assert len({p for s in got.sites for p in s.params}) == 3 * 8


class _Chain(nn.Module):
    """The second layer reads what the first one gives, with no op between."""

    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList([kind(), kind()])

    def forward(self, x):
        h = x.reshape(-1, zoo.WIDTH)
        for layer in self.layers:
            h = layer.mix(h)
        return h


class _BareTopOne(zoo.TopOne):
    def mix(self, h):
        return self.experts(h, self.route(h)[1].squeeze(-1))


class _IntoZeros(zoo.HandMoE):
    def mix(self, h):
        w, i = self.route(h)
        ids, order = torch.sort(i.reshape(-1))
        out = torch.zeros_like(h)
        out.index_add_(0, order // 2, self.experts(h[order // 2], ids) * w.reshape(-1)[order].unsqueeze(-1))
        return out


@pytest.mark.parametrize("kind", [zoo.IndexAddCombine, _BareTopOne, _IntoZeros])
def test_one_layer_reads_the_other(kind):
    """Sites are found before any is replaced: the second must follow the first one's output to its new place."""
    result = compare_models(_Chain(kind), [X])
    assert result.sites == 2 and result.stayed == 0
    assert result.loss < 1e-6 and result.gradient < 1e-6


def test_alike_but_for_one_reader():
    """The twin of a lifted layer whose rows are read elsewhere, too, is not taken for its like in rewriting."""
    model = _Stack(zoo.HandMoE(), zoo.WithEscape(), zoo.HandMoE())
    result = compare_models(model, [X])
    assert result.sites == 3 and result.stayed > 0
    assert result.loss < 1e-6 and result.gradient < 1e-6
