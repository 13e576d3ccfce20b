"""MoE families of transformers that nothing was designed for, tiny and with random weights: a stand-in for the next one.

`build(name, experts)` gives (model, inputs) in train mode; multimodal models are given text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo, zoo_wide


@dataclass(frozen=True, slots=True)
class Family:
    """How one is built: what its configuration needs beyond the sizes that all share."""

    model: str
    """Class in transformers."""
    sites: int = 2
    config: str = ""
    """Model type of the configuration; "": the family's name."""
    sizes: dict[str, Any] = field(default_factory=dict)
    implementations: tuple[str, ...] = ("batched_mm", "grouped_mm", "eager")
    """Of its experts; () where there is one only."""


_LATENT = {"num_key_value_heads": 4, "head_dim": zoo._UNSET}
"""Attention that reads keys and values from a latent has one of each for every head."""
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_QUIET = {"output_router_logits": False}

FAMILIES: dict[str, Family] = {
    "olmoe": Family("OlmoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", config="qwen3_5_moe_text", sizes=_MIXED),
    "qwen4_exp": Family("Qwen4ExpForCausalLM", config="qwen4_exp_text", sizes=_MIXED | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}),
    "glm4_moe": Family("Glm4MoeForCausalLM", sites=1),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", sites=1, sizes=_LATENT),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", sites=1, sizes=_LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", sites=1, sizes={"moe_layer_start_index": 1, "moe_num_experts": 8, "moe_k": 2}),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", sizes={"moe_topk": 2}),
    "hy_v3": Family("HYV3ForCausalLM", sites=1),
    "hy_v4": Family("HYV4ForCausalLM"),
    "dots1": Family("Dots1ForCausalLM", sites=1),
    "minimax": Family("MiniMaxForCausalLM"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family("MiniMaxM3VLForCausalLM", config="minimax_m3_vl_text"),
    "longcat_flash": Family("LongcatFlashForCausalLM", sizes={"num_key_value_heads": 4, "num_layers": 1, "zero_expert_num": 3, "expert_ffn_hidden_size": 16, "moe_topk": 2, "ffn_hidden_size": 48}),
    "aria": Family("AriaTextForCausalLM", config="aria_text", sizes={"moe_num_experts": 8, "moe_topk": 2}),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM", sizes=_QUIET | {"shared_intermediate_size": 24}),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM", sizes=_QUIET),
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", sizes=_QUIET | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24}),
    "doge": Family("DogeForCausalLM", sizes={"is_moe": True, "num_experts": 16, "output_router_logits": False}),
    "exaone_moe": Family("ExaoneMoeForCausalLM", sites=1),
    "solar_open": Family("SolarOpenForCausalLM"),
    "axk1": Family("AXK1ForCausalLM", sizes=_LATENT),
    "axk2": Family("AXK2ForCausalLM", sizes=_LATENT),
    "cohere2_moe": Family("Cohere2MoeForCausalLM"),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", sizes=_QUIET | {"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["hash_moe", "moe"], "head_dim": 64, "hc_mult": 2, "o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1}),
    "mistral4": Family("Mistral4ForCausalLM", sizes=_LATENT),
    "mellum": Family("MellumForCausalLM"),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM"),
    "kimi_linear": Family("KimiLinearForCausalLM", sites=1, sizes=_LATENT | _MIXED | {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_tok": 2}),
    "laguna": Family("LagunaForCausalLM"),
    "inkling": Family("InklingForCausalLM", config="inkling_text"),
    "zaya": Family("ZayaForCausalLM", sizes={"num_experts_per_tok": 1, "router_hidden_size": 16}),
    "gemma4": Family("Gemma4ForCausalLM", config="gemma4_text", sizes={"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "use_double_wide_mlp": False, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2}),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterForTokenClassification", sizes={"num_labels": 128}),
}  # fmt: skip


def build(name: str, experts: str = "batched_mm", seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random biases, fp32; bf16 where `experts` is "grouped_mm"."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    transformers = zoo_wide._transformers()
    made = transformers.CONFIG_MAPPING[family.config or name]
    shared = {k: v for k, v in zoo._SIZES.items() if k not in family.sizes}
    config = zoo_wide._fitting(made, shared, **{k: v for k, v in family.sizes.items() if v is not zoo._UNSET})
    kind = getattr(transformers, family.model)
    model = kind._from_config(config, **({"experts_implementation": experts} if family.implementations else {}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key:
                parameter.normal_(std=0.1)
    return (model.bfloat16() if experts == "grouped_mm" else model).train(), zoo.tokens(2, 16)
