"""More families: roles, and parts chained in one process against the model."""

from __future__ import annotations

import pytest

from tests.multimodal import more_families
from tests.multimodal.test_families import assert_same
from ultraep_compile.multimodal.parts import find_parts

QUICK = {"aria", "florence2", "kosmos2", "llava_pixtral", "paligemma"}
USUAL = ("model.vision_tower", "model.multi_modal_projector", "model.language_model")
SMALL = ("model.vision_model", "model.connector", "model.text_model")
ROLES = {
    "smolvlm": SMALL, "idefics2": SMALL, "qwen2_vl": ("model.visual", "", "model.language_model"),
    "qwen3_vl": ("model.visual", "", "model.language_model"),
    "ovis2": ("model.vision_tower", "", "model.language_model"),
    "kosmos2": ("vision_model", "image_to_text_projection", "text_model"),
    "instructblip": ("vision_model", "qformer language_projection", "language_model"),
    "blip2_t5": ("vision_model", "qformer language_projection", "language_model"),
    "voxtral": ("model.audio_tower", "model.multi_modal_projector", "model.language_model"),
    "granite_speech": ("model.encoder", "model.projector", "model.language_model"),
    "speech_to_text": ("model.encoder", "", "model.decoder"),
    "vision_encoder_decoder": ("encoder", "", "decoder"),
}  # fmt: skip


def some(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(more_families.MORE))
def test_chained(name):
    model, batch = more_families.build(name)
    parts = find_parts(model, batch, 4)
    assert_same(parts, parts.microbatches(batch, 3))
    encoders, projectors, llm = ROLES.get(name, USUAL)
    expected = {"encoders": encoders.split(), "projectors": projectors.split(), "llm": llm.split(), "generators": []}
    assert parts.anatomy.roles.names() == expected
