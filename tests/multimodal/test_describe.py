"""What `explain` says of the parts of a multimodal model."""

from __future__ import annotations

import pytest

from tests import zoo, zoo_wide
from tests.multimodal import generating
from ultraep_compile.multimodal.describe import describe
from ultraep_compile.multimodal.roles import watch_roles

MORE = {
    "llava": ["  encoder model.vision_tower reads pixel_values; features stand for input_ids 111 and enter at layer 0"],
    "qwen3_vl_moe": [
        "  encoder model.visual reads pixel_values, image_grid_thw; features stand for input_ids 111 and enter at layers 0, 1, 2"
    ],
    "mllama": [
        "  encoder model.vision_model reads pixel_values, aspect_ratio_ids, aspect_ratio_mask; features are read by layers 1, 3"
    ],
    "janus": [
        "  not called in training, there to generate: model.vqmodel, model.generation_aligner, model.generation_head",
        "  encoder model.vision_model reads pixel_values; features stand for input_ids 111 and enter at layer 0",
    ],
}


@pytest.mark.parametrize("name", MORE)
def test_inputs_and_entries(name):
    model, batch = zoo_wide.build(name, layers=4)
    lines = describe(model, watch_roles(model, [], **batch), batch)
    assert lines[0] == "Multimodal: language model model.language_model."
    assert [line for line in lines[1:] if not line.startswith("  projectors: ")] == MORE[name]


def test_generator_in_training():
    model, batch = generating.build("flow", text=False)
    lines = describe(model, watch_roles(model, [], **batch), batch)
    assert "  generators in training: maker" in lines
    assert "  not called in training, there to generate: vlm.lm_head" in lines


def test_names_only_without_labels():
    model, batch = zoo_wide.build("llava")
    del batch["labels"]
    lines = describe(model, watch_roles(model, [], **batch), batch)
    assert lines[0] == "Multimodal: language model model.language_model." and "vision_tower" in lines[-1]


def test_text_model():
    model, batch = zoo.build("mixtral")
    assert describe(model, watch_roles(model, [], **batch), batch) == []
