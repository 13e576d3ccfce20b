"""Models whose training forward generates: the generator is found, and the parts give the model's loss and gradients."""

from __future__ import annotations

import pytest

from tests.multimodal import generating
from tests.multimodal.test_families import assert_same
from ultraep_compile.multimodal.parts import find_parts


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("kind", ["flow", "codes"])
def test_generator(kind, text):
    """`flow` returns a prediction of which the model makes a loss, `codes` its loss; with and without a loss of text."""
    model, batch = generating.build(kind, text)
    parts = find_parts(model, batch, 3)
    assert [g.name for g in parts.generators] == ["maker"] == parts.anatomy.roles.trained
    assert parts.anatomy.roles.llm == ["vlm.model.language_model"]
    assert (parts.anatomy.heads[0].factor is None) == (kind == "flow")
    microbatches = parts.microbatches(batch, 2)
    assert [len(m.items["maker"]) for m in microbatches] == [2, 2]
    assert_same(parts, microbatches)
    for m in microbatches:  # the whole microbatch at once
        del m.items["maker"]
    assert_same(parts, microbatches)
    assert ("vlm.lm_head.weight" in parts.unread) == (not text)


def test_generator_called_twice():
    model, batch = generating.build("codes")
    model.twice = True
    with pytest.raises(ValueError, match="called 2 times in a forward"):
        find_parts(model, batch, 2)
