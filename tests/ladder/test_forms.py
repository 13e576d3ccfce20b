"""Every form of MoE layer that compilers do not see through: found, lifted, balanced, and equal to itself without us."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import forms
from tests.balancing import assert_as_good_as_eager, backend, compiled_step, relative, step
from ultraep_compile import explain, prepare
from ultraep_compile.ladder.install import lifted_layer
from ultraep_compile.ladder.sizes import size_function
from ultraep_compile.preparation import findings_of
from ultraep_compile.report import collect_reports


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """A process group for the form that exchanges rows by itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def exact_step(model, inputs):
    double = copy.deepcopy(model).double()
    return step(double, double, {"x": inputs["x"].double()})


SLOW = {"LoopByMask", "LoopWithGaps", "ByTable", "PickySecond", "DropoutExperts"}
"""Forms like others that the default run has."""
IN_PARTS = {"TwoLevels"}
"""Forms in which Python follows the data outside of the experts, too."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in forms.LIFTED])
def test_balanced_like_eager(name):
    model, inputs = forms.build(name)
    if name == "DropoutExperts":
        model.eval()  # in training, masks fall on rows in another order
    keys = list(model.state_dict())
    exact = exact_step(model, inputs)
    eager = step(model, model, inputs)
    found = explain(model, inputs)
    assert [s.status for s in found.moe_sites] == ["rewritten"] * forms.SITES.get(name, 1)
    experts = forms.COUNTS.get(name, forms.EXPERTS)
    assert all(s.rung == "lifted" and s.experts == experts and s.source and s.matched for s in found.moe_sites)
    assert found.rewritten_parameters == found.expert_parameters > 0
    assert (found.graphs > 1) == (name in IN_PARTS), found.graph_breaks
    ours, graphs = compiled_step(model, inputs, ranks=4)
    plain, _ = compiled_step(model, inputs, ranks=4, planner="none")
    assert sum(len(g.prepared) for g in graphs) == forms.SITES.get(name, 1)
    assert torch.equal(ours.loss, plain.loss)
    assert ours.grads.keys() == eager.grads.keys()
    assert_as_good_as_eager(ours, eager, exact, floor=2e-6)
    again = step(model, model, inputs)
    assert torch.equal(again.loss, eager.loss)  # eager mode runs the module's own forward
    assert list(model.state_dict()) == keys


ON_META = ("FlatWeights", "CapacityEinsum")


@pytest.mark.parametrize(
    "name", [n if n in ON_META else pytest.param(n, marks=pytest.mark.slow) for n in forms.LIFTED if n != "ByTable"]
)
def test_lifted_on_the_meta_device(name):
    """Prepared before it has weights; filled afterwards, it is balanced like eager. (A table's values are needed at once.)"""
    real, inputs = forms.build(name)
    real.eval()
    with torch.device("meta"):
        model = forms.build(name)[0].eval()
    prepare(model, inputs)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.load_state_dict(real.state_dict(), assign=True)
    eager = step(real, real, inputs)
    ours, graphs = compiled_step(model, inputs, ranks=4)
    assert sum(len(g.prepared) for g in graphs) == forms.SITES.get(name, 1)
    assert relative(ours.loss, eager.loss) < 1e-6
    for key, grad in eager.grads.items():
        assert relative(ours.grads[key], grad) < 1e-4 or grad.norm() < 1e-7, key


CHANGING = ("LoopOverHit", "SwitchCapacity", "WideRouter", "GroupedBySizes", "Exchanging", "DenseGated", "GroupedDense")


@pytest.mark.parametrize("name", [n if n in CHANGING[:2] else pytest.param(n, marks=pytest.mark.slow) for n in CHANGING])
def test_other_numbers_of_tokens(name):
    """Batches of other sizes than the one that was recorded, in training and in eval."""
    model, inputs = forms.build(name)
    prepare(model, inputs)
    for training in (True, False):
        model.train(training)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend(ranks=2, expect_moe_sites=None), dynamic=True)
        with collect_reports() as reports:
            for shape in ((2, 16), (4, 9), (1, 40)):
                x = torch.randn(*shape, forms.WIDTH)
                torch.manual_seed(3)
                want = model(x)
                torch.manual_seed(3)
                got = compiled(x)
                first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
                assert relative(first(got), first(want)) < 1e-5
        assert sum(len(g.prepared) for g in reports.graphs) >= forms.SITES.get(name, 1)


class _OddCapacity(forms.CapacityEinsum):
    """A capacity by a factor that floats cannot hold."""

    def capacity(self, length):
        return int(length * 1.1 / forms.EXPERTS) + 3


def test_capacities_that_python_computes():
    """A rounded quotient of the sizes holds for all batches; any other capacity for the recorded batch only, and it is said."""
    for kind, balanced in ((forms.CapacityEinsum, 1), (_OddCapacity, 0)):
        torch.manual_seed(0)
        model, inputs = kind().train(), {"x": torch.randn(2, 16, forms.WIDTH)}
        found = explain(model, inputs)
        assert [s.status for s in found.moe_sites] == ["rewritten"]
        assert ("[2, 16] tokens only" in found.moe_sites[0].matched) == (not balanced)
        for shape in ((2, 24), (3, 7)):  # 7: the least capacity
            x = {"x": torch.randn(*shape, forms.WIDTH)}
            eager = step(model, model, x)
            ours, graphs = compiled_step(model, x, ranks=4)
            assert sum(len(g.prepared) for g in graphs) == balanced
            assert relative(ours.loss, eager.loss) < 1e-6


SIZES = (3, 18, 64, 129, 200, 512, 777, 1536)


@pytest.mark.parametrize(
    "capacity",
    [
        lambda t: max(4, math.ceil(1.25 * t / 8)),
        lambda t: int(2.0 * t / 6),
        lambda t: 8 * math.ceil(t * 2 * 1.5 / 8 / 8) - 1,
        lambda t: t * 3 // 16 + 1,
        lambda t: max(16, t // 8),
        lambda t: -(-t // 8),
        lambda t: 5 * t,
    ],
)
def test_size_functions_are_found(capacity):
    found = size_function(tuple(map(capacity, SIZES)), SIZES, 24)
    assert found is not None
    assert [found(t) for t in range(1, 4000)] == [capacity(t) for t in range(1, 4000)]


@pytest.mark.parametrize("capacity", [lambda t: int(1.1 * t / 8), lambda t: int(t**0.5) + 1, lambda t: min(t, 100)])
def test_size_functions_that_are_not_sure_are_not_taken(capacity):
    assert size_function(tuple(map(capacity, SIZES)), SIZES, 8) is None


@pytest.mark.parametrize("name", forms.UNBALANCEABLE)
def test_nothing_to_balance(name):
    model, inputs = forms.build(name)
    found = explain(model, inputs)
    (site,) = found.moe_sites
    assert site.status == "unbalanceable" and "equal by construction" in site.reason
    assert found.rewritten_parameters == 0 < found.expert_parameters
    eager = step(model, model, inputs)
    ours, graphs = compiled_step(model, inputs, ranks=4)
    assert sum(len(g.prepared) for g in graphs) == 0 and relative(ours.loss, eager.loss) < 1e-6


@pytest.mark.parametrize("name", forms.NEGATIVES)
def test_no_false_site(name):
    model, inputs = forms.build(name)
    found = explain(model, inputs)
    assert found.moe_sites == [] and found.expert_parameters == 0


# ---- refused rather than wrong --------------------------------------------------------------------------------------


class _OneDiffers(forms.LoopOverHit):
    """One expert computes something else."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 32)) for _ in range(4))
        self.experts[2][1] = nn.Sequential()


class _Neighbour(nn.Module):
    """Subtracts the mean over the rows that came along."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(forms.WIDTH, forms.WIDTH)

    def forward(self, x):
        y = self.proj(x)
        return y - y.mean(0, keepdim=True)


class _MixesRows(forms.LoopOverHit):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(_Neighbour() for _ in range(4))


class _Weighed(forms.LoopOverHit):
    """The weight of a token depends on how many came along: on data of other rows."""

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            share = len(token) / len(h)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None] * share)
        return out


REFUSED = {_OneDiffers: "do not compute the same", _MixesRows: "", _Weighed: "ids or weights"}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda k: k.__name__)
def test_refused(kind):
    torch.manual_seed(0)
    model, inputs = kind().train(), {"x": torch.randn(2, 16, forms.WIDTH)}
    found = explain(model, inputs)
    assert [s.status for s in found.moe_sites] == ["missed"]
    assert all(REFUSED[kind] in s.reason for s in found.moe_sites)
    assert lifted_layer(model) is None
    eager = step(model, model, inputs)
    ours, _ = compiled_step(model, inputs, ranks=2)
    assert relative(ours.loss, eager.loss) < 1e-6


# ---- around it ------------------------------------------------------------------------------------------------------


def test_weights_are_read_when_they_are_used():
    """Weights loaded, or replaced, after `prepare` are the ones that count."""
    model, inputs = forms.build("LoopOverHit")
    other, _ = forms.build("LoopOverHit", seed=5)
    prepare(model, inputs)
    model.load_state_dict(other.state_dict(), assign=True)
    ours, graphs = compiled_step(model, inputs, ranks=2)
    assert sum(len(g.prepared) for g in graphs) == 1
    eager = step(other, other, inputs)
    assert relative(ours.loss, eager.loss) < 1e-6


def test_prepared_twice_and_copied():
    model, inputs = forms.build("LoopOverHit")
    prepare(model, inputs)
    prepare(model, inputs)
    assert [f.rung for f in findings_of(model)] == ["lifted"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is forms.LoopOverHit and lifted_layer(twin) is None
        assert torch.equal(twin(**inputs), model(**inputs))
        prepare(twin, inputs)
        assert lifted_layer(twin) is not None


def test_preparing_leaves_no_trace():
    """Gradients, random state, buffers and stored attributes are as before."""
    model, inputs = forms.build("Exchanging")
    model.register_buffer("seen", torch.zeros(3))
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prepare(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    compiled_step(model, inputs, ranks=2)
    assert model.aux_loss.requires_grad  # kept by the replayed forward as the module's own keeps it


def test_autocast():
    model, inputs = forms.build("LoopOverHit")
    prepare(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager = step(model, model, inputs)
        ours, graphs = compiled_step(model, inputs, ranks=2)
    assert sum(len(g.prepared) for g in graphs) == 1
    assert relative(ours.loss, eager.loss) < 1e-2
    assert max(relative(ours.grads[n], g) for n, g in eager.grads.items() if g.norm() > 1e-4) < 5e-2


def test_bfloat16():
    model, inputs = forms.build("LoopStacked")
    model, inputs = model.bfloat16(), {"x": inputs["x"].bfloat16()}
    eager = step(model, model, inputs)
    prepare(model, inputs)
    ours, graphs = compiled_step(model, inputs, ranks=2)
    assert sum(len(g.prepared) for g in graphs) == 1
    assert max(relative(ours.grads[n], g) for n, g in eager.grads.items()) < 3e-2


def test_frozen_and_partly_trained():
    """Frozen parts of an expert stay without gradients; low-rank factors beside them are trained."""
    model, inputs = forms.build("LowRankExperts")
    prepare(model, inputs)
    ours, _ = compiled_step(model, inputs, ranks=4)
    assert not any(".base." in n for n in ours.grads)
    assert sum(".a.weight" in n or ".b.weight" in n for n in ours.grads) == 4 * forms.EXPERTS


def test_partial_coverage_is_reported():
    model = nn.Sequential(forms.build("LoopOverHit")[0], _OneDiffers())
    found = explain(model, (torch.randn(2, 16, forms.WIDTH),))
    assert {s.status for s in found.moe_sites} == {"rewritten", "missed"}
    assert 0 < found.rewritten_parameters < found.expert_parameters
    assert f"{found.rewritten_parameters:,} of {found.expert_parameters:,}" in str(found)


class _Accumulating(forms.GroupedEinsum):
    """Every expert reads sums of the tokens that came to it so far: nothing that one token could take along."""

    def forward(self, x):
        a, b = (torch.nn.functional.one_hot(p(x).argmax(-1), 2).to(x.dtype) for p in (self.outer, self.inner))
        rows = torch.einsum("btd,bto,bti->oibtd", x, a, b).cumsum(3)
        return torch.einsum("oibtd,oide->bte", rows, self.weight)


def test_stacked_experts_that_are_not_understood_are_missed_not_lost():
    torch.manual_seed(0)
    found = explain(_Accumulating(), {"x": torch.randn(2, 16, forms.WIDTH)})
    (site,) = found.moe_sites
    assert site.status == "missed" and "einsum" in site.reason
    assert found.rewritten_parameters == 0 < found.expert_parameters
