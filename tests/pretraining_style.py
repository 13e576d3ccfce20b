"""A MoE model written as pretraining stacks write them (torchtitan and its kin).

Router and experts are modules of their own, ids keep batch and sequence dims, tokens are permuted by a histogram,
products are grouped and in bf16 whatever the parameters are, a buffer counts tokens in forward and another one, the
router's bias, is updated between steps and outside autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HIDDEN, EXPERTS, TOP_K = 32, 48, 8, 2


class GroupedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.2)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.2)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.2)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)

        def product(x: Tensor, w: Tensor) -> Tensor:
            return torch._grouped_mm(x.bfloat16(), w.bfloat16().transpose(-2, -1), offs=ends)

        return product(F.silu(product(rows, self.w1)) * product(rows, self.w3), self.w2).type_as(rows)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(self.gate(x).float())
        _, ids = torch.topk(scores + bias, k=TOP_K, dim=-1, sorted=False)
        weights = scores.gather(-1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), GroupedExperts()
        self.shared = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))
        self.register_buffer("tokens_per_expert", torch.zeros(EXPERTS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        weights, ids = self.router(x, self.expert_bias)
        counts = torch.histc(ids.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        h = x.view(-1, width)
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // TOP_K
        rows = self.experts(h[token], counts)
        rows = (rows.float() * weights.view(-1)[order].reshape(-1, 1)).to(rows.dtype)
        out = torch.zeros_like(h).scatter_add(0, token.reshape(-1, 1).expand(-1, width), rows)
        return (out + self.shared(h)).view(batch, length, width)


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): MoE() for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + layer(F.rms_norm(x, (WIDTH,)))
        return x


def update_router_bias(model: Decoder, speed: float = 1e-2) -> None:
    """What an optimizer hook does after a step: push the bias of crowded experts down, without gradients."""
    with torch.no_grad():
        for layer in model.layers.values():
            counts = layer.tokens_per_expert
            layer.expert_bias.add_(speed * torch.sign(counts.mean() - counts))
            counts.zero_()
