"""The same models over processes: `ultraep_compile.pipeline` against the unmodified model in one process."""

from __future__ import annotations

import copy

import pytest
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests import zoo_wide
from tests.multimodal import generating, handwritten, more_families, test_families
from tests.multirank import run_ranks
from ultraep_compile.multimodal.check import relative_error
from ultraep_compile.multimodal.skeleton import loss_of

MICROBATCHES = 4
QUICK = ("llava", "qwen3_vl_moe")
OTHERS = tuple(n for n in (*zoo_wide.MULTIMODAL, *more_families.MORE) if n not in QUICK)


def _build(name):
    if name.startswith("generating"):
        _, kind, text = name.split(":")
        return generating.build(kind, text == "text", samples=8)
    if name in ("prefix", "crossing"):
        return handwritten.build(name)
    return more_families.build(name) if name in more_families.MORE else test_families.build(name)


def _differences(rank, ranks, names, settings):
    """Per model the largest relative difference of the loss and of this rank's gradients, and the bytes held: part, whole."""
    mesh, found = init_device_mesh("cpu", (ranks,)), []
    for name in names:
        model, batch = _build(name)
        single = copy.deepcopy(model)
        whole = sum(p.numel() * 4 for p in single.parameters())
        pipe = ultraep_compile.pipeline(model, mesh, MICROBATCHES, batch, **settings)
        ours, loss = float(pipe.step(batch)), 0.0
        for m in pipe.parts.microbatches(batch, MICROBATCHES):
            part = loss_of(single(**m.inputs)) * m.weight
            part.backward()
            loss += float(part.detach())
        grads = {n: p.grad for n, p in single.named_parameters(remove_duplicate=False)}
        floor = 1e-3 * max(float(g.abs().max()) for g in grads.values() if g is not None)
        worst = {n: relative_error(p.grad, grads[n], floor) for n, p in pipe.named_parameters()}
        held = sum(p.numel() * 4 for p in pipe.parameters())
        real = sum(p.numel() * 4 for p in model.parameters() if not p.is_meta)
        assert held == real, "a parameter that the rank does not train takes memory"
        name_of_worst = max(worst, key=lambda n: worst[n])
        found.append(
            (name, abs(ours - loss) / abs(loss), worst[name_of_worst], name_of_worst, held, whole, sorted(worst))
        )
    return found


def assert_equal(ranks, names, **settings):
    results = run_ranks(ranks, _differences, ranks, list(names), settings)
    for per_rank in zip(*results, strict=True):
        for name, loss, gradient, parameter, held, whole, _ in per_rank:
            assert loss <= 1e-6 and gradient <= 1e-5, (name, loss, gradient, parameter)
            assert held < whole
        model, _ = _build(per_rank[0][0])
        everywhere = {n for row in per_rank for n in row[-1]}
        assert everywhere == {n for n, _ in model.named_parameters()}, "some parameter is trained by nobody"


def test_two_processes():
    assert_equal(2, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family(ranks):
    assert_equal(ranks, OTHERS if ranks == 2 else (*QUICK, *OTHERS))


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["whole", "split"])
def test_generators(generator):
    names = [f"generating:{kind}:{text}" for kind in ("flow", "codes") for text in ("text", "silent")]
    assert_equal(2, names, generator=generator)


@pytest.mark.slow
def test_written_by_hand():
    assert_equal(2, ("prefix", "crossing"))


@pytest.mark.slow
def test_virtual_stages():
    assert_equal(2, ("gemma3", "whisper"), virtual=2, base="interleaved")
