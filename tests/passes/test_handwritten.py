"""Forms of MoE that transformers does not have, in modules written by hand."""

import pytest
import torch

from tests import zoo
from tests.passes.harness import capture, compare_models, run_site
from ultraep_compile.passes.lift import verify_site

GROUPED_ONLY = {"GroupedUnsorted"}
EXPECTED = {
    "WeightBeforeExperts": dict(uses_weight=True),
    "GroupedUnsorted": dict(uses_weight=True),
    "TopOne": dict(top_k=1),
    "TopOneArgmax": dict(top_k=1, gating="argmax"),
    "AllExperts": dict(top_k=zoo.EXPERTS),
    "SigmoidBias": dict(gating="sigmoid-bias-topk"),
    "TableRouted": dict(gating="table", scores=None),
}


def _form(name):
    return "grouped_mm" if name in GROUPED_ONLY else "batched_mm"


@pytest.mark.parametrize("name", zoo.HANDWRITTEN)
def test_site(name):
    model, inputs = zoo.build(name, _form(name))
    got = capture(model, inputs)
    assert got.misses == []
    (site,) = got.sites
    for field, value in {
        "top_k": 2,
        "uses_weight": False,
        "gating": "softmax-topk",
        **EXPECTED.get(name, {}),
    }.items():
        assert getattr(site, field) == value
    verify_site(site)
    errors = run_site(site, got.values_of(site))
    assert not errors.poisoned and errors.output < 5e-7 and errors.gradients < 5e-7


DYNAMIC_BY_DEFAULT = ("HandMoE", "IndexAddInPlace", "GatheredEinsum")


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [pytest.param(n, False) for n in zoo.HANDWRITTEN]
    + [pytest.param(n, True, marks=[] if n in DYNAMIC_BY_DEFAULT else [pytest.mark.slow]) for n in zoo.HANDWRITTEN],
)
def test_whole_model(name, dynamic):
    model, inputs = zoo.build(name, _form(name))
    batches = [inputs] + [{"x": torch.randn(2, t, zoo.WIDTH, dtype=inputs["x"].dtype)} for t in (11, 24) if dynamic]
    result = compare_models(model, batches, dynamic=dynamic)
    assert result.misses == [] and result.sites >= 1
    assert result.graphs[0] == result.graphs[1]
    assert result.loss < 1e-6 and result.gradient < 1e-6, result.worst


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize(
    "name", ["HandMoE", "IndexAddCombine", "Unsorted", "GatheredEinsum", "ExpandDispatch", "TopOne"]
)
def test_no_token_and_one_token(name, length):
    """Sizes of 0 and 1 fit anywhere; with a process group such a rank must still take part."""
    model, _ = zoo.build(name)
    got = capture(model, {"x": torch.randn(1, length, zoo.WIDTH)})
    assert got.misses == []
    (site,) = got.sites
    if length:
        errors = run_site(site, got.values_of(site))
        assert not errors.poisoned and errors.output < 5e-7 and errors.gradients < 5e-7
    else:
        result = compare_models(model, [{"x": torch.randn(1, 0, zoo.WIDTH)}])
        assert result.sites == 1


def test_any_number_of_experts():
    """Physical ids may exceed E: the same function over more copies of the parameters."""
    model, inputs = zoo.build("IndexAddCombine")
    got = capture(model, inputs)
    (site,) = got.sites
    values = got.values_of(site)
    rows, ids = torch.randn(20, zoo.WIDTH), torch.randint(0, zoo.EXPERTS, (20,))
    params = [values[p] for p in site.params]
    doubled = [torch.cat([p, p]) for p in params]
    assert torch.equal(site.row_function(rows, ids, *params), site.row_function(rows, ids + zoo.EXPERTS, *doubled))


@pytest.mark.parametrize("name", zoo.NEGATIVES)
def test_not_moe(name):
    model, inputs = zoo.build(name)
    got = capture(model, inputs)
    assert got.sites == [] and got.misses == []
