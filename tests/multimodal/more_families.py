"""More multimodal families of transformers, tiny, with four layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo
from tests.zoo_wide import _VISION, AUDIO, IMAGE, VIDEO, WIDTH, _fitting, _transformers

SAMPLES, LAYERS = 4, 4
Built = tuple[nn.Module, dict[str, Tensor]]


def _text(family: str = "llama", **sizes: Any) -> Any:
    return zoo._config(family, num_hidden_layers=LAYERS, **sizes)


def _prompt(images: int, token: int = IMAGE, length: int = 24) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (SAMPLES, length))
    ids[:, 2 : 2 + images] = token
    return {"input_ids": ids, "labels": ids.masked_fill(ids >= 100, -100)}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, 3, 16, 16)


def _made(family: str, kind: str, **more: Any) -> Any:
    """A model by its family's configuration."""
    tr = _transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return getattr(tr, kind)(CONFIG_MAPPING[family](**more))


def _sub(family: str, part: str, **more: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _fitting(CONFIG_MAPPING[family].sub_configs[part], _VISION, **more)


def _clip(**more: Any) -> Any:
    return _fitting(_transformers().CLIPVisionConfig, _VISION, **more)


def _siglip(**more: Any) -> Any:
    return _fitting(_transformers().SiglipVisionConfig, _VISION, vision_use_head=False, **more)


def _pixtral() -> Any:
    return _fitting(_transformers().PixtralVisionConfig, _VISION, head_dim=8)


def paligemma() -> Built:
    text = _text("gemma")
    model = _made("paligemma", "PaliGemmaForConditionalGeneration", text_config=text, vision_config=_siglip(), image_token_id=IMAGE, projection_dim=WIDTH)  # fmt: skip
    batch = _prompt(16)
    return model, {
        **batch,
        "pixel_values": _pixels(),
        "token_type_ids": (torch.arange(24) > 19).long().expand(SAMPLES, 24),
    }


def smolvlm() -> Built:
    model = _made("smolvlm", "SmolVLMForConditionalGeneration", text_config=_text(), vision_config=_sub("smolvlm", "vision_config"), image_token_id=IMAGE, scale_factor=2, pad_token_id=0)  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels(1)}


def internvl() -> Built:
    vision = _sub("internvl", "vision_config", image_size=[16, 16], patch_size=[4, 4])
    model = _made("internvl", "InternVLForConditionalGeneration", text_config=_text("qwen2"), vision_config=vision, image_token_id=IMAGE, image_seq_length=4)  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels()}


def _rope_text(family: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return _text(family, rope_parameters=rope).to_dict()


def _packed(family: str, kind: str, text: str) -> Built:
    model = _made(
        family, kind, text_config=_rope_text(text), vision_config=_sub(family, "vision_config", hidden_size=WIDTH).to_dict(),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=114, vision_end_token_id=115,
    )  # fmt: skip
    batch = _prompt(4)
    batch["input_ids"][:, 1] = 114
    kinds = (batch["input_ids"] == IMAGE).int()
    grid = torch.tensor([[1, 4, 4]] * SAMPLES)
    return model, {
        **batch,
        "pixel_values": torch.randn(16 * SAMPLES, 96),
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def qwen2_vl() -> Built:
    return _packed("qwen2_vl", "Qwen2VLForConditionalGeneration", "qwen2_vl_text")


def qwen3_vl() -> Built:
    return _packed("qwen3_vl", "Qwen3VLForConditionalGeneration", "qwen3_vl_text")


def mistral3() -> Built:
    model = _made("mistral3", "Mistral3ForConditionalGeneration", text_config=_text("mistral"), vision_config=_pixtral(), image_token_index=IMAGE, spatial_merge_size=2)  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels(), "image_sizes": torch.tensor([[16, 16]] * SAMPLES)}


def llava_pixtral() -> Built:
    model = _made("llava", "LlavaForConditionalGeneration", text_config=_text("mistral"), vision_config=_pixtral(), image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full")  # fmt: skip
    return model, {**_prompt(16), "pixel_values": _pixels(), "image_sizes": torch.tensor([[16, 16]] * SAMPLES)}


def vipllava() -> Built:
    model = _made("vipllava", "VipLlavaForConditionalGeneration", text_config=_text(), vision_config=_clip(), image_token_index=IMAGE, vision_feature_layers=[-1, -2])  # fmt: skip
    return model, {**_prompt(16), "pixel_values": _pixels()}


def llava_next() -> Built:
    model = _made("llava_next", "LlavaNextForConditionalGeneration", text_config=_text(), vision_config=_clip(), image_token_index=IMAGE, image_grid_pinpoints=[[16, 32], [32, 16]])  # fmt: skip
    sizes = torch.tensor([[16, 30], [30, 16]] * (SAMPLES // 2))
    pixels = _pixels(3)
    with torch.no_grad():
        counts = [len(f) for f in model.model.get_image_features(pixels, sizes).pooler_output]
    batch = _prompt(0, length=max(counts) + 8)
    for row, count in enumerate(counts):
        batch["input_ids"][row, 2 : 2 + count] = IMAGE
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 100, -100)
    return model, {**batch, "pixel_values": pixels, "image_sizes": sizes}


def aria() -> Built:
    from transformers.models.aria.configuration_aria import AriaTextConfig

    text = _fitting(
        AriaTextConfig, zoo._SIZES, num_hidden_layers=LAYERS, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1
    )
    vision = _fitting(_transformers().Idefics3Config.sub_configs["vision_config"], _VISION)
    model = _made("aria", "AriaForConditionalGeneration", text_config=text, vision_config=vision, image_token_index=IMAGE, projector_patch_to_query_dict={16: 4})  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels()}


def kosmos2() -> Built:
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

    text = dict(vocab_size=128, embed_dim=WIDTH, layers=LAYERS, ffn_dim=48, attention_heads=4, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, max_position_embeddings=64)  # fmt: skip
    vision = dict(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = Kosmos2ForConditionalGeneration(Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=4))
    batch = _prompt(4)
    mask = (batch["input_ids"] == IMAGE).long()
    return model, {
        **batch,
        "pixel_values": _pixels(),
        "image_embeds_position_mask": mask,
        "attention_mask": torch.ones_like(mask),
    }


def instructblip() -> Built:
    tr = _transformers()
    former = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=WIDTH, vocab_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    text = dict(model_type="opt", vocab_size=128, hidden_size=WIDTH, num_hidden_layers=LAYERS, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=WIDTH, max_position_embeddings=64, dropout=0.0)  # fmt: skip
    vision = _fitting(tr.InstructBlipConfig.sub_configs["vision_config"], _VISION).to_dict()
    config = tr.InstructBlipConfig(text_config=text, vision_config=vision, qformer_config=former, num_query_tokens=4, image_token_index=IMAGE)  # fmt: skip
    batch = _prompt(4)
    asked = torch.randint(3, 100, (SAMPLES, 6))
    return tr.InstructBlipForConditionalGeneration(config), {
        **batch, "pixel_values": _pixels(), "qformer_input_ids": asked, "attention_mask": torch.ones(SAMPLES, 24, dtype=torch.long),
    }  # fmt: skip


def idefics2() -> Built:
    tr = _transformers()
    perceiver = dict(
        hidden_size=WIDTH,
        resampler_n_latents=4,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=8,
        num_key_value_heads=2,
    )
    model = _made("idefics2", "Idefics2ForConditionalGeneration", text_config=_text("mistral"), vision_config=_sub("idefics2", "vision_config"), perceiver_config=tr.Idefics2Config.sub_configs["perceiver_config"](**perceiver), image_token_id=IMAGE)  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels(1)}


def ovis2() -> Built:
    vision = _sub("ovis2", "vision_config", vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5)
    model = _made("ovis2", "Ovis2ForConditionalGeneration", text_config=_text("qwen2"), vision_config=vision, image_token_id=IMAGE, visual_indicator_token_ids=[101, 102, 103, 104, 105], hidden_size=WIDTH)  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels()}


def voxtral() -> Built:
    audio = _transformers().VoxtralEncoderConfig(**dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4, num_mel_bins=16, max_source_positions=16, head_dim=8))  # fmt: skip
    model = _made(
        "voxtral",
        "VoxtralForConditionalGeneration",
        text_config=_text("llama"),
        audio_config=audio,
        audio_token_id=AUDIO,
        hidden_size=WIDTH,
    )
    return model, {**_prompt(4, AUDIO), "input_features": torch.randn(SAMPLES, 16, 32)}


def granite_speech() -> Built:
    tr = _transformers()
    encoder = dict(input_dim=16, num_layers=2, hidden_dim=WIDTH, feedforward_mult=2, num_heads=4, dim_head=8, output_dim=20, context_size=8, max_pos_emb=16, dropout=0.0, conv_kernel_size=3)  # fmt: skip
    former = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, model_type="blip_2_qformer")  # fmt: skip
    config = tr.GraniteSpeechConfig(text_config=_text("granite").to_dict(), encoder_config=encoder, projector_config=former, audio_token_index=AUDIO, has_lora_adapter=False, downsample_rate=2, window_size=4)  # fmt: skip
    model = tr.GraniteSpeechForConditionalGeneration(config)
    sound = torch.randn(SAMPLES, 16, 16)
    with torch.no_grad():
        made = model.get_audio_features(sound)
        count = (made.pooler_output if hasattr(made, "pooler_output") else made).shape[1]
    return model, {**_prompt(count, AUDIO), "input_features": sound}


def florence2() -> Built:
    tr = _transformers()
    text = dict(model_type="bart", vocab_size=128, d_model=WIDTH, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
    vision = dict(embed_dim=[16, 16, 16, WIDTH], num_heads=[2, 2, 2, 2], num_groups=[2, 2, 2, 2], depths=[1, 1, 1, 1], patch_size=[3, 3, 3, 3], patch_stride=[2, 2, 1, 1], patch_padding=[1, 1, 1, 1], patch_prenorm=[False, True, True, True], window_size=4, projection_dim=WIDTH, drop_path_rate=0.0, image_size=16)  # fmt: skip
    config = tr.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = tr.Florence2ForConditionalGeneration(config)
    pixels = _pixels()
    with torch.no_grad():
        made = model.model.get_image_features(pixels)
        count = (made.pooler_output if hasattr(made, "pooler_output") else made).shape[1]
    batch = _prompt(count, length=count + 8)
    batch["labels"] = torch.randint(3, 100, (SAMPLES, 10))
    return model, {**batch, "pixel_values": pixels}


def speech_to_text() -> Built:
    tr = _transformers()
    config = tr.Speech2TextConfig(vocab_size=128, d_model=WIDTH, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=64, max_target_positions=32, input_feat_per_channel=16, dropout=0.0, conv_channels=16, num_conv_layers=2, conv_kernel_sizes=[3, 3])  # fmt: skip
    features = torch.randn(SAMPLES, 32, 16)
    return tr.Speech2TextForConditionalGeneration(config), {
        "input_features": features,
        "labels": torch.randint(3, 100, (SAMPLES, 12)),
    }


def vision_encoder_decoder() -> Built:
    tr = _transformers()
    vision = tr.ViTConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    text = tr.TrOCRConfig(vocab_size=128, d_model=WIDTH, decoder_layers=LAYERS, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, cross_attention_hidden_size=WIDTH)  # fmt: skip
    config = tr.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    model = tr.VisionEncoderDecoderModel(config=config)
    return model, {"pixel_values": _pixels(), "labels": torch.randint(3, 100, (SAMPLES, 12))}


def blip2_t5() -> Built:
    tr = _transformers()
    text = tr.T5Config(vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=LAYERS, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    former = tr.Blip2QFormerConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=WIDTH, vocab_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    config = tr.Blip2Config(text_config=text, vision_config=_fitting(tr.Blip2VisionConfig, _VISION), qformer_config=former, num_query_tokens=4, image_token_index=IMAGE)  # fmt: skip
    batch = _prompt(4)
    batch["labels"] = torch.randint(3, 100, (SAMPLES, 9))
    return tr.Blip2ForConditionalGeneration(config), {**batch, "pixel_values": _pixels()}


def aya_vision() -> Built:
    model = _made("aya_vision", "AyaVisionForConditionalGeneration", text_config=_text("cohere2"), vision_config=_siglip(), image_token_index=IMAGE, downsample_factor=2, adapter_layer_norm_eps=1e-6, alignment_intermediate_size=64)  # fmt: skip
    return model, {**_prompt(4), "pixel_values": _pixels()}


_FAMILIES = (
    paligemma, smolvlm, internvl, qwen2_vl, qwen3_vl, mistral3, llava_pixtral, vipllava, llava_next, aria, kosmos2, instructblip,
    idefics2, ovis2, voxtral, granite_speech, florence2, speech_to_text, vision_encoder_decoder, blip2_t5, aya_vision,
)  # fmt: skip
MORE = tuple(f.__name__ for f in _FAMILIES)


def build(name: str, seed: int = 0) -> Built:
    """A model in train mode with 4 samples; no parameter is zero."""
    torch.manual_seed(seed)
    model, batch = globals()[name]()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model.train(), batch
