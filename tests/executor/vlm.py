"""A small transformers vision-language model with random weights, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

IMAGE, PATCHES = 120, 16  # token id of an image's rows; rows of an image


def llava(layers: int = 4, experts: int = 0) -> nn.Module:
    """CLIP, a projector and Llama, or Mixtral if it shall have experts; no dropout."""
    torch.manual_seed(0)
    text: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
              "patch_size": 4}  # fmt: skip
    language = transformers.LlamaConfig(**text)
    if experts:
        language = transformers.MixtralConfig(**text, num_local_experts=experts, num_experts_per_tok=2)
    config = transformers.LlavaConfig(
        text_config=language,
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def batch(samples: int, seed: int, length: int = 24, images: tuple[bool, ...] = ()) -> dict[str, Tensor]:
    """`images[i]`: whether sample i has an image (all, if left out)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (samples, length), generator=g)
    have = [i for i in range(samples) if not images or images[i]]
    for i in have:
        ids[i, 2 : 2 + PATCHES] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[0, : length // 2] = -100
    pixels = torch.randn(len(have), 3, 16, 16, generator=g)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def worst_difference(pipe: Any, single: nn.Module, batches: list[dict[str, Tensor]], count: int) -> float:
    """Largest relative difference of losses, and of this rank's gradients summed over the batches, from one process that
    runs the same microbatches through the unmodified model."""
    worst = 0.0
    for whole in batches:
        loss = 0.0
        result = float(pipe.step(whole))
        for mb in pipe.parts.microbatches(whole, count):
            part = single(**mb.inputs).loss * mb.weight
            part.backward()
            loss += float(part)
        worst = max(worst, abs(result - loss) / abs(loss))
    return max(worst, gradients_differ(pipe, single))


def gradients_differ(pipe: Any, single: nn.Module) -> float:
    """Largest relative difference of this rank's gradients."""
    worst = 0.0
    grads = {n: p.grad for n, p in single.named_parameters(remove_duplicate=False)}
    for name, p in pipe.named_parameters():
        expected = grads[name]
        assert (p.grad is None) == (expected is None), name
        if expected is not None and expected.norm() > 1e-7:
            own = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            worst = max(worst, float((own - expected).norm() / expected.norm()))
    return worst
