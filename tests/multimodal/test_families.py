"""Published models taken apart and chained in one process: the loss and every gradient of the unmodified model."""

from __future__ import annotations

import pytest
import torch

from tests import zoo_wide
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.check import model_gradients, parts_gradients, relative_error
from ultraep_compile.multimodal.parts import find_parts

FEEDS = {
    "qwen3_vl_moe": {"model.visual": (0, 1, 2)},  # features enter behind the first three layers
    "mllama": {"model.vision_model": (1, 3)},  # and here cross attention reads them
    "whisper": {"model.encoder": (0, 1, 2, 3)},
    "musicgen": {"text_encoder": (0, 1, 2, 3)},
    "qwen2_5_omni": {"audio_tower": (0,), "visual": (0,)},  # newer transformers: below `model`
}


def build(name, samples=8):
    """Four layers, no parameter of zeros, samples with different numbers of loss tokens."""
    model, batch = zoo_wide.build(name, samples=samples, layers=4)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    if name != "musicgen":  # its loss is a mean over codebooks, too
        text = model.config.get_text_config()
        if getattr(text, "output_router_logits", False):
            text.output_router_logits = False  # its loss over the routers of all layers goes around the cut
        for i in range(samples):
            batch["labels"][i, : i % 5 + 1] = -100
    return model, batch


def assert_same(parts, microbatches):
    loss, expected = model_gradients(parts, microbatches)
    ours, got = parts_gradients(parts, microbatches)
    assert abs(ours - loss) <= 1e-6 * abs(loss)
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    errors = {n: relative_error(got[n], g, floor) for n, g in expected.items()}
    assert max(errors.values()) <= 1e-5, max(errors, key=lambda n: errors[n])


def test_loss_over_all_routers_is_refused():
    model, batch = build("qwen3_vl_moe")
    text = model.config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        pytest.skip("this transformers adds no router loss to the model's own")
    text.output_router_logits = True
    if getattr(model(**batch), "aux_loss", None) is None:
        pytest.skip("this transformers makes no router loss")
    with pytest.raises(PartsError, match=r"the loss reads something made before layer 3 .*output_router_logits=False"):
        find_parts(model, batch, 4, check=False)


@pytest.mark.parametrize("name", zoo_wide.MULTIMODAL)
def test_chained(name):
    model, batch = build(name)
    keys, values = list(model.state_dict()), [p.detach().clone() for p in model.parameters()]
    parts = find_parts(model, batch, 4, check=False)
    feeds = FEEDS.get(name, {parts.encoders[0].name: (0,)})
    where = "model." if name == "qwen2_5_omni" and hasattr(model, "model") and hasattr(model.model, "visual") else ""
    assert {e.name: e.feeds for e in parts.encoders} == {where + n: f for n, f in feeds.items()}
    microbatches = parts.microbatches(batch, 3)
    assert sum(m.weight for m in microbatches) == pytest.approx(1)
    assert [len(m.items[parts.encoders[0].name]) for m in microbatches] == [3, 3, 2]
    assert_same(parts, microbatches)
    assert list(model.state_dict()) == keys and all(
        torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True)
    )
    assert not any("_taken_over" in vars(m) for m in model.modules())
