"""Models that several benchmarks measure."""

from __future__ import annotations

import torch


def mixtral(
    *,
    layers: int = 2,
    width: int = 128,
    ffn: int = 256,
    dtype: torch.dtype = torch.float32,
    experts: str = "batched_mm",
    device: str = "cpu",
    batch: int = 8,
    length: int = 128,
) -> tuple[torch.nn.Module, dict]:
    """A small Mixtral of transformers with random weights, 8 experts, top-2, and one batch for it."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=length,
    )
    model = transformers.MixtralForCausalLM._from_config(config, experts_implementation=experts).to(device, dtype)
    ids = torch.randint(0, 256, (batch, length), device=device)
    return model.train(), {"input_ids": ids, "labels": ids}
