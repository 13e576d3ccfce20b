"""Models of transformers beyond the families that compilers trace: covered whole, and no layer found where there is none."""

from __future__ import annotations

import pytest
import torch

from tests import zoo_wide
from tests.balancing import assert_as_good_as_eager, compiled_step, oracle_step, step
from ultraep_compile import explain, prepare
from ultraep_compile.multimodal import roles
from ultraep_compile.preparation import findings_of

QUICK = {"dbrx", "llava"}


def some(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(zoo_wide.LOOPS))
def test_balanced_like_eager(name):
    model, inputs = zoo_wide.build(name)
    model(**inputs)
    keys = list(model.state_dict())
    eager, exact = step(model, model, inputs), oracle_step(model, inputs)
    found = explain(model, inputs)
    assert [s.status for s in found.moe_sites] == ["rewritten"] * zoo_wide.moe_sites(name), str(found)
    assert {s.name for s in found.moe_sites} <= dict(model.named_modules()).keys()
    assert found.rewritten_parameters == found.expert_parameters
    ours, graphs = compiled_step(model, inputs, ranks=4)
    plain, _ = compiled_step(model, inputs, ranks=4, planner="none")
    assert sum(len(g.prepared) for g in graphs) >= zoo_wide.moe_sites(name)
    assert torch.equal(ours.loss, plain.loss)
    assert_as_good_as_eager(ours, eager, exact, floor=2e-6)
    assert list(model.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dbrx", "switch_transformers"])
def test_prepared_on_the_meta_device(name):
    real, inputs = zoo_wide.build(name)
    with torch.device("meta"):
        model, _ = zoo_wide.build(name)
    prepare(model, inputs)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    found = [f.rung for f in findings_of(model)]
    prepare(real, inputs)
    assert found == [f.rung for f in findings_of(real)] and "lifted" in found


ROLES = {
    "llava": ("model.vision_tower", "model.multi_modal_projector", "model.language_model", ""),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model", ""),
    "qwen2_5_vl": ("model.visual", "", "model.language_model", ""),
    "qwen2_5_omni": ("audio_tower visual", "", "model", ""),
    "mllama": ("model.vision_model", "model.multi_modal_projector", "model.language_model", ""),
    "blip2": ("vision_model", "qformer language_projection", "language_model", ""),
    "whisper": ("model.encoder", "", "model.decoder", ""),
    "musicgen": ("text_encoder", "", "decoder", "audio_encoder"),
    "janus": (
        "model.vision_model", "model.aligner", "model.language_model",
        "model.vqmodel model.generation_aligner model.generation_head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(zoo_wide.MULTIMODAL))
def test_multimodal(name):
    """No false layer in dense models; in the MoE one, all of the language model's."""
    model, inputs = zoo_wide.build(name)
    found = explain(model, inputs)
    moe = ["rewritten"] * 2 if name == "qwen3_vl_moe" else []
    assert [s.status for s in found.moe_sites] == moe, str(found)
    assert found.rewritten_parameters == found.expert_parameters
    assert all(s.name.startswith("model.language_model.") for s in found.moe_sites)
    if name in ROLES:
        assert found.roles == {role: text.split() for role, text in zip(roles.ROLES, ROLES[name], strict=True)}


def test_scalars_are_kept_for_one_model_only():
    """What a model with rows counted in Python needs of the compiler must not reach other models."""
    model, inputs = zoo_wide.build("jetmoe")
    prepare(model, inputs)
    assert not torch._dynamo.config.capture_scalar_outputs
