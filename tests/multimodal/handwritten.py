"""Multimodal models as people write them, without a library's conventions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, VOCAB = 16, 40


class Block(nn.Module):
    """Causal attention and an MLP; cross attention if `memory` is given."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True) if cross else None
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        if self.cross is not None and memory is not None:
            x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Prefix(nn.Module):
    """Image features stand before the tokens; the forward is one piece, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(6, WIDTH)
        self.eye = nn.ModuleList(Block() for _ in range(2))
        self.bridge = nn.Linear(WIDTH, WIDTH)
        self.table, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(32, WIDTH)
        self.trunk = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor, picture: Tensor, targets: Tensor) -> dict[str, Tensor]:
        p = self.patches(picture)
        for block in self.eye:
            p = block(p, None)
        x = torch.cat([self.bridge(p), self.table(tokens)], 1)
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.trunk:
            x = block(x, mask)
        logits = self.out(self.norm(x[:, p.shape[1] :]))
        return {
            "logits": logits,
            "loss": nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100),
        }


class Crossing(nn.Module):
    """Sound is read by cross attention in every other layer; the layers lie deep inside; returns (loss, logits)."""

    def __init__(self) -> None:
        super().__init__()
        self.ear = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(3)), "enter": nn.Linear(5, WIDTH)})
        self.speaker = nn.ModuleDict(
            {"table": nn.Embedding(VOCAB, WIDTH), "stack": nn.ModuleList(Block(cross=i % 2 == 1) for i in range(4))}
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB))

    def forward(self, tokens: Tensor, wave: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        m = self.ear["enter"](wave)
        for block in self.ear["blocks"]:
            m = block(m, None)
        x = self.speaker["table"](tokens)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.speaker["stack"]:
            x = block(x, mask, memory=m)
        logits = self.head(x)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()), logits


def build(name: str, samples: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (samples, 9))
    targets = torch.randint(0, VOCAB, (samples, 9))
    for i in range(samples):
        targets[i, : i + 1] = -100
    if name == "prefix":
        return Prefix(), {"tokens": tokens, "picture": torch.randn(samples, 7, 6), "targets": targets}
    return Crossing(), {"tokens": tokens, "wave": torch.randn(samples, 8, 5), "targets": targets}
