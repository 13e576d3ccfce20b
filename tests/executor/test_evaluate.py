"""`Pipeline.evaluate`: the loss of a step without its backward, over two processes beside one."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.executor import toys
from tests.multimodal import generating
from tests.multimodal.seeing import Seeing, batch, difference, made
from tests.multirank import run_ranks
from ultraep_compile.errors import PipelineError
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings
from ultraep_compile.multimodal.skeleton import loss_of


class Dropping(Seeing):
    """Dropout before the head, and a batch norm with buffers before the tower."""

    def __init__(self):
        super().__init__()
        self.drop, self.even = nn.Dropout(0.5), nn.BatchNorm2d(3)

    def features(self, image):
        return super().features(self.even(image))

    def text_loss(self, logits, labels):
        return super().text_loss(self.drop(logits), labels)


def _nothing_kept(pipe):
    held = [u.held for u in (*pipe.units.stages.values(), *pipe.units.encoders)]
    assert not any(held) and not any(u.inputs for u in pipe.units.encoders)


def _seeing(mesh, **settings):
    """A step, evaluations in both modes, a step: losses, gradients, buffers."""
    model = made(Dropping)
    model.eval()
    single = copy.deepcopy(model)
    pipe = ultraep_compile.pipeline(model, mesh, 4, batch(), deadline=60.0, **settings)
    assert difference(pipe, single, float(pipe.step(batch(2))), batch(2)) < 1e-5
    before = {n: None if p.grad is None else p.grad.clone() for n, p in pipe.named_parameters()}
    ragged = batch(3)
    ragged["labels"][:3, :5] = -100
    ragged["labels"][6:] = -100  # a microbatch without loss tokens
    for _ in range(2):
        ours = pipe.evaluate(ragged)
        with torch.no_grad():
            assert abs(float(ours.loss) - float(single(**ragged))) < 1e-6 * float(ours)
        assert not ours.loss.requires_grad
        _nothing_kept(pipe)
    for name, p in pipe.named_parameters():
        assert (p.grad is None) == (before[name] is None) and (p.grad is None or torch.equal(p.grad, before[name]))
    assert pipe.steps == 1
    assert difference(pipe, single, float(pipe.step(batch(4))), batch(4)) < 1e-5  # added to those of the first
    model.train()
    assert float(pipe.evaluate(batch(3))) != float(pipe.evaluate(batch(3))), "dropout as the user has set it"
    model.eval()
    return pipe


def _generating(mesh, kind, generator):
    model, whole = generating.build(kind, samples=8)
    single = copy.deepcopy(model)
    pipe = ultraep_compile.pipeline(model, mesh, 4, whole, generator=generator, deadline=60.0)
    with torch.no_grad():
        loss = float(loss_of(single(**whole)))
    assert abs(float(pipe.evaluate(whole)) - loss) < 1e-5 * abs(loss)
    assert all(p.grad is None for p in pipe.parameters())


def _by_hand(mesh, **settings):
    """Two encoders and virtual stages; the evaluation's loss is that of the step that follows."""
    chosen = Settings(4, deadline=60.0, **settings)
    parts = toys.parts(2 * chosen.virtual, (0, 1), sound=True, painter=True, seed=3)
    pipe = Pipeline(None, parts, mesh, chosen)
    given = {"microbatches": toys.microbatches(4, 5, images=0.6, sound=True, painter=True)}
    evaluated, stepped = pipe.evaluate(given), pipe.step(given)
    assert torch.equal(evaluated.loss, stepped.loss)
    assert all(torch.equal(a, b) for a, b in zip(evaluated.metrics, stepped.metrics, strict=True))
    _nothing_kept(pipe)


def _differently(rank, pipe):
    """One rank evaluates where the other trains: told, and then all goes on."""
    try:
        (pipe.step if rank else pipe.evaluate)(batch(5))
    except PipelineError as error:
        assert "trained on or evaluated" in str(error), error
    else:
        raise AssertionError("not noticed")
    pipe.evaluate(batch(5))


def _all(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    pipe = _seeing(mesh)
    _differently(rank, pipe)
    _seeing(mesh, method="recompute")
    _seeing(mesh, base="zero-bubble")
    _generating(mesh, "flow", "whole")
    _generating(mesh, "codes", "split")
    _by_hand(mesh)
    _by_hand(mesh, virtual=2, generator="split")


def test_evaluation_beside_one_process():
    run_ranks(2, _all)
