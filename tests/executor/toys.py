"""Small multimodal parts made by hand: ragged images, sound, features that enter one or several stages, a generator, odd
values between stages. And the same computed by one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ultraep_compile.multimodal.parts import Encoder, Generator, Microbatch, Parts, Stage

WIDTH, WORDS, PATCH, IMAGE, SOUND = 8, 16, 6, 1, 2  # the last two: token ids that features replace


class Image(nn.Module):
    """Patches [n, PATCH] to two features of n rows: one for the first stage, one for a later stage."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(PATCH, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.projector = nn.Linear(12, 2 * WIDTH)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.projector(self.tower(pixels)).chunk(2, -1)


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, WIDTH)

    def forward(self, wave: Tensor, gain: float) -> tuple[Tensor, ...]:
        return (torch.sin(self.inner(wave)) * gain,)


class Part(nn.Module):
    """A stage: its features enter, then a layer; the last one makes states, loss and metrics."""

    def __init__(self, index: int, stages: int, embedding: nn.Embedding, generates: bool, tied: bool) -> None:
        super().__init__()
        self.first, self.last = index == 0, index == stages - 1
        self.index, self.generates = index, generates
        self.layer = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.embedding = embedding if self.first else None
        if self.last:
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
            if tied:
                self.head.weight = embedding.weight

    def forward(
        self, hidden: tuple[Any, ...], inputs: dict[str, Any], features: dict[str, tuple[Tensor, ...]]
    ) -> tuple:
        ids = inputs["ids"]
        if self.embedding is not None:
            x, turn, nothing, mask = self.embedding(ids), 0, None, ids > 3
            for name, token in (("image", IMAGE), ("sound", SOUND)):
                if name in features:
                    x = x.masked_scatter((ids == token)[..., None], features[name][0].to(x.dtype))
        else:
            x, turn, nothing, mask = hidden
            assert turn == self.index and nothing is None and mask.dtype == torch.bool
            if "image" in features:  # a deep feature
                x = x + torch.zeros_like(x).masked_scatter((ids == IMAGE)[..., None], features["image"][1].to(x.dtype))
        x = x + self.layer(self.norm(x)) * (0.5 + mask[..., None])
        if not self.last:
            return x, turn + 1, nothing, mask
        logits = self.head(x).float()
        labels = inputs["labels"]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum()
        states = (x, ids) if self.generates else ()
        return (*states, loss, loss.detach() * 2, right)


class Painter(nn.Module):
    """A generator on the last states: every sample is to give its own picture."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, PATCH))

    def forward(self, states: tuple[Tensor, ...], row: int, picture: Tensor) -> Tensor:
        x, ids = states
        return (self.out(x[row]).mean(0) * (1 + ids[row].float().mean()) - picture).square().mean()


class ToyParts(Parts):
    """Parts that nobody had to find."""

    def __init__(self, encoders: list[Encoder], stages: list[Stage], generators: list[Generator], states: int) -> None:
        self.encoders, self.stages, self.generators, self.states = encoders, stages, generators, states

    def microbatches(self, batch: Mapping[str, Any], count: int) -> list[Microbatch]:
        return list(batch["microbatches"][:count])


def parts(stages: int, feeds: tuple[int, ...] = (0,), sound: bool = False, painter: bool = False, tied: bool = True,
          frozen: bool = False, seed: int = 0) -> ToyParts:  # fmt: skip
    torch.manual_seed(seed)
    embedding = nn.Embedding(WORDS, WIDTH)
    encoders = [Encoder("image", Image(), feeds)]
    if sound:
        encoders.append(Encoder("sound", Sound(), (0,)))
    if frozen:
        encoders[0].module.requires_grad_(False)
    made = [Stage(s, Part(s, stages, embedding, painter, tied)) for s in range(stages)]
    generators = [Generator("painter", Painter())] if painter else []
    return ToyParts(encoders, made, generators, states=2 if painter else 0)


def microbatches(
    count: int, seed: int, sound: bool = False, painter: bool = False, images: float = 0.8
) -> list[Microbatch]:
    """Ragged ones: 1 to 3 samples, 0 to 3 images each, of 1 to 5 patches."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    made = []
    for _ in range(count):
        samples = []
        items: dict[str, list[dict[str, Any]]] = {"image": []} | ({"sound": []} if sound else {})
        for _ in range(draw(1, 3)):
            ids = torch.randint(3, WORDS, (draw(2, 6),), generator=g)
            if torch.rand((), generator=g) < images:
                for _ in range(draw(1, 3)):
                    patches = torch.randn(draw(1, 5), PATCH, generator=g)
                    items["image"].append({"pixels": patches})
                    ids = torch.cat([ids, torch.full((len(patches),), IMAGE)])
            if sound and draw(0, 1):
                wave = torch.randn(draw(1, 4), 3, generator=g)
                items["sound"].append({"wave": wave, "gain": 1.5})
                ids = torch.cat([torch.full((len(wave),), SOUND), ids])
            samples.append(ids)
        ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
        labels = torch.where(ids > 3, (ids * 7 + 1) % WORDS, -100)
        labels[0, -1] = 5
        if painter:
            items["painter"] = [{"row": r, "picture": torch.randn(PATCH, generator=g)} for r in range(len(samples))]
        made.append(Microbatch({"ids": ids, "labels": labels, "note": "text"}, items, 0.0))
    loss_tokens = [int((mb.inputs["labels"] >= 0).sum()) for mb in made]
    return [replace(mb, weight=n / sum(loss_tokens)) for mb, n in zip(made, loss_tokens, strict=True)]


def reference(model: Parts, batch: list[Microbatch]) -> tuple[Tensor, list[float]]:
    """Loss and metrics of the batch by one process, without any pipeline; leaves the gradients in the parameters."""
    total = torch.zeros(())
    metrics = [0.0, 0.0]
    for mb in batch:
        features = {}
        for encoder in model.encoders:
            pieces = [encoder.module(**item) for item in mb.items.get(encoder.name, ())]
            if pieces:
                features[encoder.name] = tuple(torch.cat(p) for p in zip(*pieces, strict=True))
        hidden: tuple[Any, ...] = ()
        for stage in model.stages:
            read = {e.name: features[e.name] for e in model.encoders if stage.index in e.feeds and e.name in features}
            hidden = stage.module(hidden, mb.inputs, read)
        states, (loss, double, right) = hidden[: model.states], hidden[model.states :]
        for generator in model.generators:
            loss = loss + sum(generator.module(states, **item) for item in mb.items[generator.name])
        total = total + mb.weight * loss
        metrics[0] += mb.weight * float(double)
        metrics[1] += float(right)
    total.backward()
    return total.detach(), metrics


def copied(model: Parts) -> Parts:
    return copy.deepcopy(model)
