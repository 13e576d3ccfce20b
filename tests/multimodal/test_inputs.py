"""Batches as they come: several images a sample or none, packed patches of all sizes, padding; and those that cannot be divided."""

from __future__ import annotations

import pytest
import torch

from tests import zoo, zoo_wide
from tests.multimodal import more_families
from tests.multimodal.test_families import assert_same
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.calls import Calls
from ultraep_compile.multimodal.cut import balanced
from ultraep_compile.multimodal.division import _fill, even
from ultraep_compile.multimodal.parts import find_parts

IMAGE = zoo_wide.IMAGE
_built: dict = {}


def found(name, samples=4):
    """Parts of a model in two stages, made once."""
    if name not in _built:
        model, batch = zoo_wide.build(name, samples=samples, layers=4)
        _built[name] = find_parts(model, batch, 2), batch
    return _built[name]


def prompt(counts, length=24):
    """Samples with images of so many tokens each; a token between them; the last positions are padding."""
    ids = torch.randint(3, 100, (len(counts), length))
    mask = torch.ones_like(ids)
    for row, images in enumerate(counts):
        at = 2
        for count in images:
            ids[row, at : at + count] = IMAGE
            at += count + 1
        mask[row, length - row :] = 0
    labels = ids.masked_fill((ids >= 100) | (mask == 0), -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def items_of(parts, microbatches):
    return [len(m.items[parts.encoders[0].name]) for m in microbatches]


def test_several_images_or_none():
    """Rows of `pixel_values` are images, not samples."""
    parts, _ = found("llava")
    batch = prompt([[16], [], [16, 16], []], length=40) | {"pixel_values": torch.randn(3, 3, 16, 16)}
    microbatches = parts.microbatches(batch, 4)
    assert items_of(parts, microbatches) == [1, 0, 2, 0]
    assert ["pixel_values" in m.inputs for m in microbatches] == [True, False, True, False]
    assert torch.equal(microbatches[2].inputs["pixel_values"], batch["pixel_values"][1:])
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    assert [m.weight for m in microbatches] == pytest.approx((tokens / tokens.sum()).tolist())
    assert_same(parts, microbatches)


def test_packed_patches_of_all_sizes():
    """Patches of all images lie behind one another; their sizes say where each begins."""
    parts, _ = found("qwen2_5_vl")
    grids = [[1, 4, 4], [1, 8, 4], [1, 4, 8], [1, 4, 4]]
    counts = [g[1] * g[2] // 4 for g in grids]
    batch = prompt([[counts[0], counts[1]], [], [counts[2]], [counts[3]]])
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    batch |= {"pixel_values": torch.randn(96, 96), "image_grid_thw": torch.tensor(grids)}
    microbatches = parts.microbatches(batch, 3)
    assert items_of(parts, microbatches) == [2, 1, 1]
    assert [len(m.inputs["pixel_values"]) for m in microbatches] == [48, 32, 16]
    assert [i["image_grid_thw"].tolist() for i in microbatches[0].items["model.visual"]] == [[grids[0]], [grids[1]]]
    assert_same(parts, microbatches)
    only_text = parts.microbatches(batch, 4)
    assert items_of(parts, only_text) == [2, 0, 1, 1]
    assert_same(parts, only_text)


def test_images_and_videos():
    """One encoder, two kinds of input, each with its own placeholders and sizes; a batch may have one of them only."""
    model, batch = more_families.build("qwen2_vl")
    image, video = IMAGE, zoo_wide.VIDEO
    ids = batch["input_ids"]
    ids[:, 10:14] = video

    def kinds(ids):
        return {"input_ids": ids, "mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int()}

    clips = {"pixel_values_videos": torch.randn(64, 96), "video_grid_thw": torch.tensor([[1, 4, 4]] * 4)}
    parts = find_parts(model, batch | kinds(ids) | clips, 2)
    assert [s.keys for s in parts.anatomy.groups[0].streams] == [
        ("pixel_values", "image_grid_thw"),
        ("pixel_values_videos", "video_grid_thw"),
    ]
    ids = torch.randint(3, 100, (4, 40))
    ids[0, 2:6], ids[0, 8:16], ids[2, 2:6] = image, image, image
    ids[0, 20:28], ids[1, 2:6] = video, video
    labels = ids.masked_fill(ids > 100, -100)
    images = {"pixel_values": torch.randn(64, 96), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 4]])}
    clips = {"pixel_values_videos": torch.randn(48, 96), "video_grid_thw": torch.tensor([[2, 4, 4], [1, 4, 4]])}
    both = {**kinds(ids), "labels": labels, **images, **clips}
    for count, items in ((2, [4, 1]), (4, [3, 1, 1, 0])):
        microbatches = parts.microbatches(both, count)
        assert items_of(parts, microbatches) == items
        assert_same(parts, microbatches)
    ids = ids.masked_fill(ids == video, 50)
    assert items_of(parts, parts.microbatches({**kinds(ids), "labels": labels, **images}, 2)) == [2, 1]


def test_padded_images_of_a_sample():
    """A row per sample, filled up with empty images where others have more."""
    parts, _ = found("idefics3")
    batch = prompt([[4, 4], [4], [], [4]])
    pixels = torch.randn(4, 2, 3, 16, 16)
    pixels[1, 1] = pixels[2] = pixels[3, 1] = 0
    batch["pixel_values"] = pixels
    for count, items in ((1, [1]), (2, [2, 1]), (4, [1, 1, 0, 1])):
        microbatches = parts.microbatches(batch, count)
        assert items_of(parts, microbatches) == items
        assert_same(parts, microbatches)


def test_ragged_sound():
    parts, _ = found("qwen2_audio")
    batch = prompt([[], [], [], []])
    lengths = [32, 24, 16, 32]
    mask = torch.zeros(4, 32, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
        batch["input_ids"][row, 2 : 2 + ((n - 1) // 2 + 1 - 2) // 2 + 1] = zoo_wide.AUDIO
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] > 100, -100)
    batch |= {"input_features": torch.randn(4, 16, 32), "feature_attention_mask": mask}
    assert_same(parts, parts.microbatches(batch, 3))


def test_shapes_without_content():
    """Shapes of features by integers alone, where the model allows it: no encoder runs for a stage that needs none of it."""
    for name, allowed in (("qwen2_5_vl", True), ("llava", True), ("idefics3", False)):
        parts, batch = found(name)
        calls = Calls(parts.anatomy)
        assert calls(batch) == tuple(calls._watch(batch)) and calls.shapes_only == allowed


def test_flags_and_positions():
    """What has no row per sample goes to every microbatch; rotary positions [3, samples, length] are divided at dim 1."""
    parts, batch = found("qwen2_5_vl")
    positions = torch.arange(24).expand(3, 4, 24)
    microbatches = parts.microbatches({**batch, "use_cache": False, "position_ids": positions}, 2)
    assert all(m.inputs["use_cache"] is False and m.inputs["position_ids"].shape == (3, 2, 24) for m in microbatches)
    assert_same(parts, microbatches)


def test_microbatch_without_loss_tokens():
    """Its loss would be the mean of nothing: it has no weight and is left out."""
    parts, batch = found("llava")
    labels = batch["labels"].clone()
    labels[:2] = -100
    microbatches = parts.microbatches({**batch, "labels": labels}, 2)
    assert [m.weight for m in microbatches] == [0, 1]
    none = parts.microbatches({**batch, "labels": torch.full_like(labels, -100)}, 2)
    assert [m.weight for m in none] == [0.5, 0.5], "then the loss is NaN, as the model's own"


def test_bad_batches():
    parts, batch = found("llava")
    with pytest.raises(PartsError, match="4 samples into 5 microbatches"):
        parts.microbatches(batch, 5)
    with pytest.raises(PartsError, match=r"64 placeholder tokens wait for features of model.vision_tower"):
        parts.microbatches({k: v for k, v in batch.items() if k != "pixel_values"}, 2)
    odd = prompt([[16, 3], [], [], []], length=40) | {"pixel_values": torch.randn(3, 3, 16, 16)}
    with pytest.raises(PartsError, match=r"cannot split the batch: 3 items .* \[19, 0, 0, 0\] placeholder tokens"):
        parts.microbatches(odd, 2)
    with pytest.raises(PartsError, match="the batch has no 'input_ids'"):
        parts.microbatches({"pixel_values": batch["pixel_values"]}, 2)
    packed, batch = found("qwen2_5_vl")
    with pytest.raises(PartsError, match=r"cannot tell the items of model.visual apart"):
        packed.microbatches({**batch, "pixel_values": batch["pixel_values"][:-1]}, 2)
    whisper, batch = found("whisper")
    with pytest.raises(PartsError, match=r"the model does not run without model.encoder"):
        whisper.microbatches({"labels": batch["labels"]}, 2)


def test_bad_models():
    model, batch = zoo_wide.build("llava", samples=4, layers=4)
    with pytest.raises(PartsError, match="5 stages for a language model of 4 layers"):
        find_parts(model, batch, 5)
    with pytest.raises(PartsError, match="3 costs for 4 layers"):
        find_parts(model, batch, 2, costs=[1, 2, 3])
    with pytest.raises(PartsError, match="one sample does not show"):
        find_parts(model, {k: v[:1] for k, v in batch.items()}, 2)
    text, tokens = zoo.build("mixtral")
    with pytest.raises(PartsError, match="MixtralForCausalLM has no multimodal part"):
        find_parts(text, tokens, 2)
    with pytest.raises(PartsError, match="no multimodal part"):
        find_parts(model, {k: v for k, v in zoo.tokens(2, 16).items()}, 2)


def test_values_around_the_cut():
    """The last layer reads what the first one made, behind the cut's back: caught by the check, not trained wrong."""
    model, batch = zoo_wide.build("llava", samples=4, layers=4)
    layers, kept = model.model.language_model.layers, []
    model.register_forward_pre_hook(lambda module, args: kept.clear())
    layers[0].register_forward_hook(lambda module, args, out: kept.append(out))
    layers[3].register_forward_hook(lambda module, args, out: out + kept[0] if kept else out)
    with pytest.raises(PartsError, match=r"the stages do not compute what the model does: .* goes around the cut"):
        find_parts(model, batch, 2)


def test_balanced_and_even():
    assert balanced([1, 1, 1, 1], 2, head=2.0) == [range(0, 3), range(3, 4)]
    assert balanced([1.0] * 6, 3, front=1, head=2) == [range(0, 2), range(2, 5), range(5, 6)]
    assert [len(r) for r in balanced([4, 1, 1, 1, 1], 2)] == [1, 4]
    assert [len(r) for r in even(7, 3)] == [3, 2, 2] and even(7, 3)[-1].stop == 7
    assert (
        _fill([16, 64, 16], [20, 0, 4]) == [2, 0, 1]
        and _fill([1, 1], [3, 1]) is None
        and _fill([2, 1], [2, 1, 0]) == [1, 1, 0]
    )


def test_dropout():
    """A random model is looked at in evaluation mode, and trains as it was."""
    model, batch = zoo_wide.build("whisper", samples=4, layers=4)
    for m in model.modules():
        if hasattr(m, "dropout") and isinstance(m.dropout, float):
            m.dropout = 0.3
    model.model.encoder.training = False
    parts = find_parts(model, batch, 2)
    assert model.training and model.model.decoder.layers[0].training and not model.model.encoder.training
    assert [e.name for e in parts.encoders] == ["model.encoder"]


def test_frozen():
    """Parameters that are not trained leave no trace in a graph, and still belong to their parts."""
    model, batch = zoo_wide.build("llava", samples=4, layers=4)
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    parts = find_parts(model, batch, 2)
    assert parts.encoders[0].feeds == (0,)
    assert "model.language_model.embed_tokens.weight" in dict(parts.stages[0].module.named_parameters())
    assert not model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad
    assert_same(parts, parts.microbatches(batch, 2))
