"""Multimodal models that generate, with the generator in their training forward; from published parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo_wide

WIDTH, LATENT, CODES, CODEBOOKS = zoo_wide.WIDTH, 6, 32, 3


class FlowHead(nn.Module):
    """Predicts the velocity from noise to a picture's latent, given the state of a position: adaptive residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(LATENT, WIDTH)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(WIDTH), "scale": nn.Linear(WIDTH, WIDTH), "up": nn.Linear(WIDTH, WIDTH)}
            )
            for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, LATENT)

    def forward(self, states: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        condition = states + self.time(time[..., None])
        h = self.enter(noisy)
        for block in self.blocks:
            h = h + torch.tanh(block["up"](block["norm"](h) * (1 + block["scale"](condition))))
        return self.out(h)


class DepthHead(nn.Module):
    """Codes of several codebooks for each position, one after the other: transformers' Mistral as the depth model."""

    def __init__(self) -> None:
        super().__init__()
        tr = zoo_wide._transformers()
        config = tr.MistralConfig(
            vocab_size=CODES, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=48, pad_token_id=0,
        )  # fmt: skip
        self.model = tr.MistralForCausalLM(config)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        flat = codes.reshape(-1, CODEBOOKS)
        embedded = self.model.get_input_embeddings()(flat[:, :-1])
        logits = self.model(
            inputs_embeds=torch.cat([states.reshape(-1, 1, WIDTH), embedded], 1), use_cache=False
        ).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), flat.flatten())


class Generating(nn.Module):
    """A vision-language model that also learns to make pictures (`flow`) or sound (`codes`) from its last states."""

    twice = False

    def __init__(self, vlm: nn.Module, kind: str, text: bool) -> None:
        super().__init__()
        self.vlm, self.kind, self.text = vlm, kind, text
        self.maker = FlowHead() if kind == "flow" else DepthHead()

    def forward(
        self, latents: Tensor, noise: Tensor, time: Tensor, codes: Tensor, labels: Tensor, **inputs: Any
    ) -> Tensor:
        states = self.vlm.model(**inputs, use_cache=False).last_hidden_state
        ends = states[:, -latents.shape[1] :]
        if self.kind == "flow":
            t = time[..., None]
            made = self.maker(ends, noise * (1 - t) + latents * t, time)
            loss = 0.3 * (made - (latents - noise)).square().mean()
        else:
            loss = 0.3 * self.maker(ends, codes)
            if self.twice:
                loss = loss + self.maker(ends, codes.flip(0))
        if self.text:
            logits = self.vlm.lm_head(states)
            loss = loss + nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss


def build(kind: str, text: bool = True, samples: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    vlm, batch = zoo_wide.build("llava", samples=samples, layers=4)
    rows = torch.randn(samples, 5, LATENT)
    batch |= {"latents": rows, "noise": torch.randn_like(rows), "time": torch.rand(samples, 5)}
    batch["codes"] = torch.randint(0, CODES, (samples, 5, CODEBOOKS))
    return Generating(vlm, kind, text).train(), batch
