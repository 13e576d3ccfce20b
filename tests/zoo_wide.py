"""More models of transformers, tiny and with random weights: MoE families that no compiler sees through, and multimodal ones.

`build(name)` gives (model, inputs) in train mode. Placeholder tokens stand above 110 in a vocabulary of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo

WIDTH, IMAGE, AUDIO, VIDEO = zoo.WIDTH, 111, 112, 113
_samples, _layers = 2, 2
"""Of the model that is being built."""
Built = tuple[nn.Module, dict[str, Tensor]]

LOOPS = ("dbrx", "jetmoe", "llama4_text", "switch_transformers", "deepseek_v32")
"""MoE families beside those of `zoo`."""


def moe_sites(name: str) -> int:
    """MoE layers of a model here or in `zoo`."""
    special = {"jetmoe": 8, "switch_transformers": 2, "deepseek_v32": 1, "qwen3_vl_moe": 2}
    return special.get(name, zoo.MOE_LAYERS.get(name, zoo.LAYERS))


def _transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _fitting(config: type, table: dict[str, Any], **more: Any) -> Any:
    """A configuration with those entries of a table that it knows."""
    default = config()
    renamed = getattr(default, "attribute_map", {})
    known = {
        k: v for k, v in table.items() if k not in renamed and k in vars(default) | {f: 0 for f in _fields(config)}
    }
    return config(**{**known, **more})


def _fields(config: type) -> set[str]:
    import inspect

    names = set(inspect.signature(config.__init__).parameters)
    return names | set(getattr(config, "__annotations__", {})) | set(getattr(config, "__dataclass_fields__", {}))


def _text(family: str = "llama", **sizes: Any) -> Any:
    return zoo._config(family, **sizes)


def dbrx() -> Built:
    tr = _transformers()
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    ffn = {
        "hidden_size": WIDTH, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"},
    }  # fmt: skip
    config = tr.DbrxConfig(
        d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=128, attn_config=attention, ffn_config=ffn
    )
    return tr.DbrxForCausalLM(config), zoo.tokens(2, 16)


def jetmoe() -> Built:
    config = zoo._config("jetmoe", kv_channels=8, num_key_value_heads=2)
    return _transformers().JetMoeForCausalLM(config), zoo.tokens(2, 16)


def llama4_text() -> Built:
    config = zoo._config("llama4_text", intermediate_size_mlp=48, attention_chunk_size=8)
    return _transformers().Llama4ForCausalLM(config), zoo.tokens(2, 16)


def deepseek_v32() -> Built:
    from transformers import DeepseekV32ForCausalLM

    config = zoo._config("deepseek_v32", num_key_value_heads=4, index_n_heads=2, index_head_dim=16, index_topk=4)
    return DeepseekV32ForCausalLM(config), zoo.tokens(2, 16)


def switch_transformers() -> Built:
    tr = _transformers()
    config = tr.SwitchTransformersConfig(
        vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=6, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    batch = zoo.tokens(2, 16)
    return tr.SwitchTransformersForConditionalGeneration(config), {**batch, "labels": torch.randint(3, 128, (2, 10))}


# ---- multimodal -----------------------------------------------------------------------------------------------------

_VISION = dict(
    hidden_size=WIDTH, embed_dim=WIDTH, intermediate_size=48, num_hidden_layers=2, depth=2, num_attention_heads=4, num_heads=4,
    attention_heads=4, image_size=16, patch_size=4, num_channels=3, in_channels=3, spatial_merge_size=2, temporal_patch_size=2,
    out_hidden_size=WIDTH, projection_dim=WIDTH, fullatt_block_indexes=[1], window_size=16, deepstack_visual_indexes=[0, 1],
    num_position_embeddings=16, vision_output_dim=3 * WIDTH,
)  # fmt: skip
_SOUND = dict(
    d_model=WIDTH, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=16, max_source_positions=16,
    output_dim=WIDTH, n_window=4,
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def _prompt(images: int, token: int = IMAGE, length: int = 24) -> dict[str, Tensor]:
    """Tokens with placeholders from the third on, and labels without them."""
    ids = torch.randint(3, 100, (_samples, length))
    ids[:, 2 : 2 + images] = token
    return {"input_ids": ids, "labels": ids.masked_fill(ids >= 100, -100)}


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _pixels() -> Tensor:
    return torch.randn(_samples, 3, 16, 16)


def llava() -> Built:
    tr = _transformers()
    vision = _fitting(tr.CLIPVisionConfig, _VISION)
    config = tr.LlavaConfig(text_config=_text(), vision_config=vision, image_token_index=IMAGE, image_seq_length=16)
    return tr.LlavaForConditionalGeneration(config), {**_prompt(16), "pixel_values": _pixels()}


def gemma3() -> Built:
    tr = _transformers()
    config = tr.Gemma3Config(
        text_config=_text("gemma3_text"), vision_config=_fitting(tr.SiglipVisionConfig, _VISION), mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=118, eoi_token_index=119,
    )  # fmt: skip
    batch = _prompt(4)
    kinds = (batch["input_ids"] == IMAGE).long()
    return tr.Gemma3ForConditionalGeneration(config), {**batch, "pixel_values": _pixels(), "token_type_ids": kinds}


def idefics3() -> Built:
    tr = _transformers()
    vision = _fitting(tr.Idefics3Config.sub_configs["vision_config"], _VISION)
    config = tr.Idefics3Config(
        text_config=_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return tr.Idefics3ForConditionalGeneration(config), {**_prompt(4), "pixel_values": _pixels()[:, None]}


def llava_onevision() -> Built:
    tr = _transformers()
    config = tr.LlavaOnevisionConfig(
        text_config=_text("qwen2"), vision_config=_fitting(tr.SiglipVisionConfig, _VISION, vision_use_head=False),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[16, 32], [32, 16]],
    )  # fmt: skip
    model = tr.LlavaOnevisionForConditionalGeneration(config)
    pixels = torch.randn(_samples, 3, 3, 16, 16)
    sizes = torch.tensor([[16, 30], [30, 16]] * ((_samples + 1) // 2))[:_samples]
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=pixels, image_sizes=sizes)
    counts = [len(f) for f in getattr(features, "pooler_output", features)]
    batch = _prompt(0, length=max(counts) + 8)
    for row, count in enumerate(counts):
        batch["input_ids"][row, 2 : 2 + count] = IMAGE
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 100, -100)
    return model, {**batch, "pixel_values": pixels, "image_sizes": sizes}


def _packed(kind: str, config: str, family: str) -> Built:
    """Qwen's vision-language models: patches of all images in one row."""
    tr = _transformers()
    made = getattr(tr, config)
    parts = made.sub_configs
    text = zoo._config(family, rope_parameters=_ROPE).to_dict()
    whole = made(
        text_config=text, vision_config=_fitting(parts["vision_config"], _VISION).to_dict(), image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=114, vision_end_token_id=115,
    )  # fmt: skip
    batch = _prompt(4)
    batch["input_ids"][:, 1] = 114
    kinds = (batch["input_ids"] == IMAGE).int()
    grid = torch.tensor([[1, 4, 4]] * _samples)
    extra = {"pixel_values": torch.randn(16 * _samples, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return getattr(tr, kind)(whole), {**batch, **extra}


def qwen2_5_vl() -> Built:
    return _packed("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "qwen2_5_vl_text")


def qwen3_vl_moe() -> Built:
    return _packed("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", "qwen3_vl_moe_text")


def qwen2_5_omni() -> Built:
    tr = _transformers()
    made = tr.Qwen2_5OmniConfig.sub_configs["thinker_config"]
    parts = made.sub_configs
    config = made(
        text_config=zoo._config("qwen2_5_omni_text", rope_parameters=_ROPE).to_dict(),
        vision_config=_fitting(parts["vision_config"], _VISION).to_dict(),
        audio_config=_fitting(parts["audio_config"], _SOUND).to_dict(), image_token_index=IMAGE, video_token_index=VIDEO,
        audio_token_index=AUDIO, audio_start_token_id=116, audio_end_token_id=117, vision_start_token_id=114,
        vision_end_token_id=115,
    )  # fmt: skip
    batch = _prompt(4)
    batch["input_ids"][:, 1] = 114
    batch["input_ids"][:, 8:14] = torch.tensor([116, AUDIO, AUDIO, AUDIO, AUDIO, 117])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 100, -100)
    extra = {
        "pixel_values": torch.randn(16 * _samples, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * _samples),
        "input_features": torch.randn(_samples, 16, 16), "feature_attention_mask": _ones(_samples, 16),
        "attention_mask": _ones(_samples, 24),
    }  # fmt: skip
    return tr.Qwen2_5OmniThinkerForConditionalGeneration(config), {**batch, **extra}


def qwen2_audio() -> Built:
    tr = _transformers()
    config = tr.Qwen2AudioConfig(
        text_config=_text("qwen2"), audio_config=_fitting(tr.Qwen2AudioEncoderConfig, _SOUND), audio_token_index=AUDIO
    )
    extra = {
        "input_features": torch.randn(_samples, 16, 32), "feature_attention_mask": _ones(_samples, 32),
        "attention_mask": _ones(_samples, 24),
    }  # fmt: skip
    return tr.Qwen2AudioForConditionalGeneration(config), {**_prompt(8, AUDIO), **extra}


def mllama() -> Built:
    tr = _transformers()
    parts = tr.MllamaConfig.sub_configs
    text = _fitting(parts["text_config"], zoo._SIZES, cross_attention_layers=list(range(1, _layers, 2)))
    vision = _fitting(
        parts["vision_config"], _VISION, num_global_layers=1, intermediate_layers_indices=[0, 1], max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2]],
    )  # fmt: skip
    n = _samples
    extra = {
        "pixel_values": torch.randn(n, 1, 2, 3, 16, 16), "aspect_ratio_ids": _ones(n, 1), "aspect_ratio_mask": _ones(n, 1, 2),
        "cross_attention_mask": _ones(n, 24, 1, 2), "attention_mask": _ones(n, 24),
    }  # fmt: skip
    config = tr.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return tr.MllamaForConditionalGeneration(config), {**_prompt(1), **extra}


def blip2() -> Built:
    tr = _transformers()
    text = tr.OPTConfig(
        vocab_size=128, hidden_size=WIDTH, num_hidden_layers=_layers, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=WIDTH,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    former = tr.Blip2QFormerConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=WIDTH,
        vocab_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = tr.Blip2Config(
        text_config=text, vision_config=_fitting(tr.Blip2VisionConfig, _VISION), qformer_config=former, num_query_tokens=4,
        image_token_index=IMAGE,
    )  # fmt: skip
    return tr.Blip2ForConditionalGeneration(config), {**_prompt(4), "pixel_values": _pixels()}


def janus() -> Built:
    tr = _transformers()
    parts = tr.JanusConfig.sub_configs
    codes = parts["vq_config"](
        embed_dim=8, num_embeddings=32, latent_channels=32, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1,
        num_patches=8, projection_dim=WIDTH, image_token_embed_dim=WIDTH,
    )  # fmt: skip
    vision = _fitting(parts["vision_config"], _VISION, num_image_tokens=16)
    config = tr.JanusConfig(text_config=_text(), vision_config=vision, vq_config=codes, image_token_id=IMAGE)
    return tr.JanusForConditionalGeneration(config), {**_prompt(16), "pixel_values": _pixels()}


def whisper() -> Built:
    tr = _transformers()
    config = tr.WhisperConfig(
        vocab_size=128, num_mel_bins=16, d_model=WIDTH, encoder_layers=2, decoder_layers=_layers, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16, max_target_positions=32,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    labels = torch.randint(3, 100, (_samples, 12))
    return tr.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(_samples, 16, 32),
        "labels": labels,
    }


def musicgen() -> Built:
    tr = _transformers()
    text = tr.T5Config(vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    codec = tr.EncodecConfig(
        hidden_size=16, num_filters=4, num_residual_layers=1, num_lstm_layers=1, codebook_size=64, codebook_dim=16,
        upsampling_ratios=[4, 2], target_bandwidths=[0.5],
    )  # fmt: skip
    decoder = tr.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=WIDTH, num_hidden_layers=_layers, ffn_dim=48, num_attention_heads=4, num_codebooks=4,
        max_position_embeddings=64, pad_token_id=64, bos_token_id=64, dropout=0.0, audio_channels=1,
    )  # fmt: skip
    config = tr.MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=codec.to_dict(), decoder=decoder.to_dict())
    config.decoder.decoder_start_token_id = 63
    config.decoder.pad_token_id = 63
    batch = {"input_ids": torch.randint(3, 100, (_samples, 10)), "labels": torch.randint(0, 60, (_samples, 12, 4))}
    return tr.MusicgenForConditionalGeneration(config), batch


_MULTIMODAL: tuple[Callable[[], Built], ...] = (
    llava, llava_onevision, gemma3, idefics3, qwen2_5_vl, qwen3_vl_moe, qwen2_5_omni, qwen2_audio, mllama, blip2, janus,
    whisper, musicgen,
)  # fmt: skip
MULTIMODAL = tuple(f.__name__ for f in _MULTIMODAL)


def build(name: str, seed: int = 0, samples: int = 2, layers: int = 2) -> Built:
    """A model in train mode with example inputs.

    Args:
        samples, layers: of a multimodal model: rows of its batch, layers of its language model.
    """
    global _samples, _layers
    if name not in LOOPS + MULTIMODAL:
        return zoo.build(name, seed=seed)
    torch.manual_seed(seed)
    _samples, _layers = samples, layers
    zoo._SIZES["num_hidden_layers"] = layers
    try:
        model, inputs = globals()[name]()
    finally:
        _samples = _layers = 2
        zoo._SIZES["num_hidden_layers"] = zoo.LAYERS
    return model.train(), inputs
