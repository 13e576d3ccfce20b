"""MoE families of transformers that nothing was designed for, tiny and with random weights: stand-ins for the next one.

`build(name, experts)` gives (model, inputs) in train mode. Multimodal models are given text: `zoo_wide` has some with images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo, zoo_wide

Sizes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """How one is built: what its configuration needs beyond the sizes that all share."""

    model: str
    """Class in transformers."""
    config: str
    """Model type of the configuration."""
    sites: int = 2
    sizes: Sizes = field(default_factory=dict)
    parts: Mapping[str, tuple[str, Sizes]] = field(default_factory=dict)
    """Of a multimodal model: configuration inside the configuration -> its model type and sizes."""
    recurrent: bool = False
    """Layers whose unchanged backward torch cannot run under `aot_eager`."""


_LATENT = {"num_key_value_heads": 4, "head_dim": zoo._UNSET}
"""Attention that reads keys and values from a latent has one of each for every head."""
_INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_QUIET = {"output_router_logits": False}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_ROPE = {"rope_parameters": zoo_wide._ROPE}
_SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64, "mlp_dim": 48,
    "downsample_channels": [16, 32], "global_attn_indexes": [0], "window_size": 2,
}  # fmt: skip
_QWEN4_INDEX = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
_GRANITE_HYBRID = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 24,
}  # fmt: skip
_LONGCAT = {
    "num_key_value_heads": 4, "num_layers": 1, "zero_expert_num": 3, "expert_ffn_hidden_size": 16, "moe_topk": 2,
    "ffn_hidden_size": 48,
}  # fmt: skip
_DEEPSEEK_V4 = _QUIET | {
    "layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["hash_moe", "moe"], "head_dim": 64, "hc_mult": 2, "o_groups": 2,
    "o_lora_rank": 8, "num_key_value_heads": 1,
}  # fmt: skip
_GEMMA4 = {
    "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "enable_moe_block": True, "num_experts": 8,
    "top_k_experts": 2,
}  # fmt: skip
_ERNIE = {"moe_num_experts": 8, "moe_k": 2}
_ARIA = {"moe_num_experts": 8, "moe_topk": 2}  # each of a layer's two products is a module of its own: two sites
_NLLB = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_experts": 4, "expert_capacity": 8, "encoder_sparse_step": 2,
    "decoder_sparse_step": 2, "dropout": 0.0, "attention_dropout": 0.0, "moe_token_dropout": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}  # fmt: skip
_KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_tok": 2}
_GLM5 = {
    "qk_rope_head_dim": 0, "index_kpool": 2, "layer_types": ["deepseek_sparse_attention", "linear_attention"],
    "hc_sinkhorn_iters": 2,
}  # fmt: skip
_OCR_ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 16,
}  # fmt: skip
_LLAMA4 = {"intermediate_size_mlp": 48, "attention_chunk_size": 8}
_GEMMA4_SOUND = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32}


def _seeing(model: str, config: str, text: str, vision: str, sizes: Sizes, sites: int = 2, **more: Any) -> Family:
    """A language model with an encoder of images."""
    return Family(model, config, sites, parts={"text_config": (text, sizes), "vision_config": (vision, {})}, **more)


FAMILIES: dict[str, Family] = {
    "olmoe": Family("OlmoeForCausalLM", "olmoe"),
    "flex_olmo": Family("FlexOlmoForCausalLM", "flex_olmo"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "qwen3_moe"),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", sizes=_MIXED, recurrent=True),
    "qwen4_exp": Family("Qwen4ExpForCausalLM", "qwen4_exp_text", sizes=_MIXED | _QWEN4_INDEX, recurrent=True),
    "glm4_moe": Family("Glm4MoeForCausalLM", "glm4_moe", 1),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", "glm4_moe_lite", 1, _LATENT),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", "glm_moe_dsa", 1, _LATENT | _INDEXED),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", 1, _ERNIE | {"moe_layer_start_index": 1}),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", sizes={"moe_topk": 2}),
    "hy_v3": Family("HYV3ForCausalLM", "hy_v3", 1),
    "hy_v4": Family("HYV4ForCausalLM", "hy_v4", 1),
    "dots1": Family("Dots1ForCausalLM", "dots1", 1),
    "minimax": Family("MiniMaxForCausalLM", "minimax"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", "minimax_m2"),
    "nllb_moe": Family("NllbMoeForConditionalGeneration", "nllb-moe", sizes=_NLLB),
    "longcat_flash": Family("LongcatFlashForCausalLM", "longcat_flash", 1, _LONGCAT),
    "aria_text": Family("AriaTextForCausalLM", "aria_text", 4, _ARIA),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM", "granitemoeshared", sizes=_QUIET | {"shared_intermediate_size": 24}),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM", "granitemoe_swa", sizes=_QUIET),
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", "granitemoehybrid", sizes=_QUIET | _GRANITE_HYBRID),
    "exaone_moe": Family("ExaoneMoeForCausalLM", "exaone_moe", 1),
    "solar_open": Family("SolarOpenForCausalLM", "solar_open"),
    "axk1": Family("AXK1ForCausalLM", "axk1", 1, _LATENT),
    "axk2": Family("AXK2ForCausalLM", "axk2", 1, _LATENT),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", "cohere2_moe"),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", "deepseek_v4", sizes=_DEEPSEEK_V4),
    "mistral4": Family("Mistral4ForCausalLM", "mistral4", 1, _LATENT),
    "mellum": Family("MellumForCausalLM", "mellum"),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM", "mimo_v2_flash", 1),
    "kimi_linear": Family("KimiLinearForCausalLM", "kimi_linear", 1, _LATENT | _MIXED | _KIMI),
    "laguna": Family("LagunaForCausalLM", "laguna", 1),
    "inkling": Family("InklingForCausalLM", "inkling_text"),
    "zaya": Family("ZayaForCausalLM", "zaya", sizes={"num_experts_per_tok": 1, "router_hidden_size": 16}),
    "gemma4_text": Family("Gemma4ForCausalLM", "gemma4_text", sizes=_GEMMA4),
    "openai_privacy_filter": Family(
        "OpenAIPrivacyFilterForTokenClassification", "openai_privacy_filter", sizes={"num_labels": zoo.VOCAB}
    ),
    "qwen3_5_moe_vl": _seeing(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_moe_vision", _MIXED, recurrent=True
    ),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration", "qwen3_omni_moe_thinker",
        parts={
            "text_config": ("qwen3_omni_moe_text", _ROPE), "vision_config": ("qwen3_omni_moe_vision_encoder", {}),
            "audio_config": ("qwen3_omni_moe_audio_encoder", {}),
        },
    ),
    "glm4v_moe": _seeing(
        "Glm4vMoeForConditionalGeneration", "glm4v_moe", "glm4v_moe_text", "glm4v_moe_vision",
        {"rope_parameters": zoo_wide._ROPE | {"partial_rotary_factor": 1.0}}, 1,
    ),
    "glm5_next": _seeing(
        "Glm5NextForConditionalGeneration", "glm5_next", "glm5_next_text", "glm5_next_vision",
        _LATENT | _SPARSE | _INDEXED | _GLM5, 1, recurrent=True,
    ),
    "ernie4_5_vl_moe": _seeing(
        "Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_vl_moe_vision",
        _ERNIE | _ROPE | _SPARSE | {"moe_intermediate_size": [16, 8]},
    ),
    "llama4": _seeing("Llama4ForConditionalGeneration", "llama4", "llama4_text", "llama4_vision_model", _LLAMA4),
    "aria": _seeing("AriaForConditionalGeneration", "aria", "aria_text", "idefics3_vision", _ARIA, 4),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration", "gemma4",
        parts={
            "text_config": ("gemma4_text", _GEMMA4), "vision_config": ("gemma4_vision", {}),
            "audio_config": ("gemma4_audio", _GEMMA4_SOUND),
        },
    ),
    "diffusion_gemma": _seeing(
        "DiffusionGemmaForBlockDiffusion", "diffusion_gemma", "diffusion_gemma_text", "gemma4_vision", _GEMMA4, 4
    ),
    "deepseek_ocr2": Family(
        "DeepseekOcr2ForConditionalGeneration", "deepseek_ocr2", 1,
        parts={
            "text_config": ("deepseek_ocr2_text", _SPARSE),
            "vision_config": ("deepseek_ocr2_vision", {"sam_config": _SAM, "encoder_config": _OCR_ENCODER}),
        },
    ),
    "step3p7": _seeing("Step3p7ForConditionalGeneration", "step3p7", "step3p5", "step3p5_vision", _SPARSE, 1),
    "kimi_k25": _seeing("Kimi_K25ForConditionalGeneration", "kimi_k25", "deepseek_v3", "kimi_k25_vision", _LATENT, 1),
    "minimax_m3_vl": _seeing(
        "MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3_vl_vision", {}
    ),
}  # fmt: skip


LOOPS = frozenset({"nllb_moe", "longcat_flash", "aria_text", "aria", "llama4", "step3p7"})
"""Families whose experts have one implementation only."""


def _configured(kind: str, shared: Sizes, sizes: Sizes, **more: Any) -> Any:
    config = zoo_wide._transformers().CONFIG_MAPPING[kind]
    own = {k: v for k, v in sizes.items() if v is not zoo._UNSET}
    return zoo_wide._fitting(config, {k: v for k, v in shared.items() if k not in sizes}, **own, **more)


_DEPTHS = ("num_layers", "encoder_layers", "decoder_layers")


def _config(family: Family, layers: int | None) -> Any:
    deep = {} if layers is None else {"num_hidden_layers": layers}
    if not family.parts:
        sizes = {**family.sizes, **{k: layers for k in _DEPTHS if layers is not None and k in family.sizes}}
        return _configured(family.config, zoo._SIZES | deep, sizes)
    shared = {"text": zoo._SIZES | deep, "audio": zoo_wide._SOUND, "vision": zoo_wide._VISION}
    made = {
        part: _configured(kind, shared[part.partition("_")[0]], sizes).to_dict() for part, (kind, sizes) in family.parts.items()
    }
    return zoo_wide._transformers().CONFIG_MAPPING[family.config](**made, **family.sizes)


def build(name: str, experts: str = "batched_mm", seed: int = 0, layers: int | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random biases in fp32, or in bf16 where `experts` is "grouped_mm".

    Args:
        experts: implementation of the experts, where the model has several.
        layers: of the language model; of an encoder and a decoder each. None: the family's usual few.
    """
    family = FAMILIES[name]
    torch.manual_seed(seed)
    kind = getattr(zoo_wide._transformers(), family.model)
    chosen = {} if name in LOOPS else {"experts_implementation": experts}
    model = kind._from_config(_config(family, layers), **chosen)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key:
                parameter.normal_(std=0.1)
    inputs = zoo.tokens(2, 16)
    if name == "ernie4_5_vl_moe":  # other experts for the tokens of images
        inputs["moe_mm_token_type_ids"] = (torch.rand(2, 16) < 0.4).int()
    return (model.bfloat16() if experts == "grouped_mm" else model).train(), inputs
