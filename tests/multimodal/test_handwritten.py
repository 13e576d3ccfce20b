"""Models without a library's conventions, and models as they are trained: checkpointing, half precision, compiled layers."""

from __future__ import annotations

import pytest
import torch

from tests import zoo_wide
from tests.multimodal import handwritten
from tests.multimodal.test_families import assert_same
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.parts import find_parts
from ultraep_compile.multimodal.skeleton import taken_over

KNOWN = {
    "prefix": (["eye"], ["bridge"], ["trunk"], {"eye": (0,)}, {"table.weight": (0, 2)}),
    "crossing": (["ear"], [], ["speaker"], {"ear": (1, 2)}, {}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_written_by_hand(name):
    """Lists and dicts of modules are never called themselves; what they hold is."""
    model, batch = handwritten.build(name)
    parts = find_parts(model, batch, 3, costs=[2, 1, 1, 2])
    roles = parts.anatomy.roles
    found = (roles.encoders, roles.projectors, roles.llm, {e.name: e.feeds for e in parts.encoders}, parts.shared)
    assert found == KNOWN[name]
    assert parts.loss_tokens(batch) == int((batch["targets"][:, 1 if name == "crossing" else 0 :] != -100).sum())
    assert_same(parts, parts.microbatches(batch, 2))


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_layers_that_are_wrapped(how):
    model, batch = zoo_wide.build("llava", samples=4, layers=4)
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    for layer in model.model.language_model.layers if how == "compiled" else ():
        layer.compile(backend="eager")
    parts = find_parts(model, batch, 2)
    assert_same(parts, parts.microbatches(batch, 2))


def test_taking_over_changes_calls_only():
    """Libraries wrap what a subclass inherits as soon as it is made; recomputation would then meet another forward."""

    class Layer(torch.nn.Module):
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            inner = cls.forward
            cls.forward = lambda self, *a: inner(self, *a)  # pyright: ignore[reportAttributeAccessIssue]

        def forward(self, x):
            return x + 1

    class Block(Layer):
        pass

    block, before = Block(), Block.forward
    with taken_over({block: lambda own, args, kwargs: own(*args) * 2}):
        assert type(block) is not Block and type(block).forward is before
        assert float(block(torch.ones(()))) == 4
    assert type(block) is Block


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision(how):
    """The check allows for rounding."""
    model, batch = zoo_wide.build("llava", samples=4, layers=4)
    if how == "bfloat16":
        model, batch["pixel_values"] = model.bfloat16(), batch["pixel_values"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        assert find_parts(model, batch, 2).encoders[0].feeds == (0,)


def test_loss_over_all_routers():
    """The last stage has the scores of its own layers only: refused."""
    model, batch = zoo_wide.build("qwen3_vl_moe", samples=4, layers=4)
    model.config.text_config.router_aux_loss_coef = 1.0
    with pytest.raises(PartsError, match="the loss reads something made before layer 3 of"):
        find_parts(model, batch | {"output_router_logits": True}, 2)
