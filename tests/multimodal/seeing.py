"""A small vision-language model whose code before the trunk and behind it is easily changed, and a step of a pipeline beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from ultraep_compile.errors import UltraEPError
from ultraep_compile.multimodal.check import relative_error
from ultraep_compile.multimodal.skeleton import loss_of

WORDS, WIDTH, SAMPLES, LENGTH = 50, 16, 8, 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]  # causal
        return x + self.mlp(self.norm(x) + torch.tanh(self.mix(before)))


class Seeing(nn.Module):
    """Patches, tower, projector; tokens; a causal trunk; shifted cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleDict(
            {"patch": nn.Conv2d(3, WIDTH, 4, 4), "blocks": nn.ModuleList(Layer() for _ in range(2))}
        )
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.trunk = nn.ModuleList(Layer() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def features(self, image: Tensor) -> Tensor:
        x = self.tower["patch"](image).flatten(2).transpose(1, 2)
        for block in self.tower["blocks"]:
            x = block(x)
        return self.projector(x)

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def text_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def loss(self, states: Tensor, seen: Tensor, image: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.text_loss(self.head(states[:, -tokens.shape[1] :]), labels)

    def forward(self, image: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        seen = self.features(image)
        x = torch.cat([seen, self.embedded(tokens)], 1)
        for layer in self.trunk:
            x = layer(x)
        return self.loss(self.norm(x), seen, image, tokens, labels)


def made(kind: Callable[..., nn.Module] = Seeing, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*arguments)


def batch(seed: int = 1, samples: int = SAMPLES, **more: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (samples, LENGTH), generator=g)
    return {
        "image": torch.randn(samples, 3, 8, 8, generator=g),
        "tokens": tokens,
        "labels": tokens.clone(),
        **more,
    }


def difference(pipe: Any, single: nn.Module, ours: float, whole: Mapping[str, Any]) -> float:
    """Largest relative difference from one process that runs the whole batch: of the loss, gradients, and buffers held."""
    loss = loss_of(single(**whole))
    if loss.requires_grad:
        loss.backward()
    worst = abs(ours - float(loss.detach())) / max(abs(float(loss.detach())), 1e-12)
    if math.isnan(float(loss.detach())):
        return math.nan if math.isnan(ours) else math.inf
    grads = {n: p.grad for n, p in single.named_parameters(remove_duplicate=False)}
    floor = 1e-3 * max((float(g.abs().max()) for g in grads.values() if g is not None), default=0.0)
    for name, p in pipe.named_parameters():
        worst = max(worst, relative_error(p.grad, grads[name], floor))
    return worst


def beside(
    model: nn.Module,
    example: Mapping[str, Any],
    batches: list[dict[str, Any]],
    change: Callable[[int, nn.Module], Any] = lambda n, model: None,
    lr: float = 0.0,
    **settings: Any,
) -> tuple[float, str]:
    """(largest difference over steps on the batches, error of ours that ended them) of a pipeline and of one process.

    change: what is done to both models before step n. lr: of SGD after every step, on both.
    """
    single, worst = copy.deepcopy(model), 0.0
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    try:
        pipe = ultraep_compile.pipeline(model, mesh, 4, example, **{"deadline": 60.0, **settings})
        for n, whole in enumerate(batches):
            for one in (model, single):
                change(n, one)
                one.zero_grad()
            now = difference(pipe, single, float(pipe.step(whole)), whole)
            worst = now if math.isnan(now) else max(worst, now)
            with torch.no_grad():
                for one in (model, single):
                    for p in one.parameters():
                        if p.grad is not None and lr:
                            p.sub_(p.grad, alpha=lr)
    except UltraEPError as error:
        return worst, f"{type(error).__name__}: {error}"
    return worst, ""
