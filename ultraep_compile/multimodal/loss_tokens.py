"""How many tokens a loss is the mean of: found by comparing the loss of a batch with those of its halves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultraep_compile.errors import PartsError

IGNORED = -100
"""Label that torch's cross entropy leaves out."""


@dataclass(frozen=True, slots=True)
class LossTokens:
    """`tokens(inputs)`: labels from position `shift` on that are not `ignored`, where `mask` is set; no labels: samples."""

    labels: str = ""
    shift: int = 0
    ignored: int | None = IGNORED
    mask: str = ""
    sample_key: str = ""

    def __call__(self, inputs: Mapping[str, Any]) -> int:
        labels = inputs.get(self.labels)
        if not isinstance(labels, Tensor):
            return len(inputs[self.sample_key])
        kept = labels[:, self.shift :]
        used = torch.ones_like(kept, dtype=torch.bool) if self.ignored is None else kept != self.ignored
        mask = inputs.get(self.mask)
        if isinstance(mask, Tensor) and mask.shape == labels.shape[:2]:
            used &= mask[:, self.shift :].bool().view(*kept.shape[:2], *[1] * (kept.dim() - 2))
        return int(used.sum())


def learn_loss_tokens(
    loss: Callable[[Mapping[str, Any]], float], halves: Callable[[Mapping[str, Any]], list[Mapping[str, Any]]],
    batch: Mapping[str, Any], sample_key: str, fed: set[str], lenient: bool = False,
) -> LossTokens:  # fmt: skip
    """The rule by which the loss of a batch is the weighted mean of the losses of its halves.

    Args:
        loss: loss of inputs, without gradients.
        halves: divides a batch in two.
        fed: inputs of encoders: no labels among them.
        lenient: take the best rule though none is exact: generators have their own means.
    """
    labels = [k for k, v in batch.items() if k not in fed and _may_be_labels(v)]
    masks = [k for k in labels if _binary(batch[k])]
    labels = [k for k in labels if k not in masks]
    masks = [k for k in masks if any(batch[k].shape == batch[n].shape[:2] for n in labels)]
    probe, whole, losses = dict(batch), float("nan"), []
    for probe in _probes(batch, labels, masks):
        parts = halves(probe)
        with contextlib.suppress(Exception):  # labels that a model has no use for may be refused
            whole, losses = loss(probe), [loss(p) for p in parts]
            if all(math.isfinite(x) for x in (whole, *losses)):
                break
    parts = halves(probe)
    best, error = None, float("inf")
    for rule in _rules(labels, masks, sample_key):
        counts = [rule(p) for p in parts]
        if sum(counts) == 0 or sum(counts) != rule(probe):
            continue
        got = sum(n * value for n, value in zip(counts, losses, strict=True)) / sum(counts)
        off = abs(got - whole) / max(abs(whole), 1e-12)
        if off < error * 0.5:
            best, error = rule, off
    if best is None or not (lenient or error < 2e-3):
        raise PartsError(
            f"the loss {whole:.6g} is not the mean over tokens of the losses of the batch's halves, {losses}, by any count of labels in "
            f"{labels or 'the batch'}: {error:.1e} off at best. Switch off losses that mix samples (auxiliary losses, contrast), or "
            "pass loss_tokens=, a function from inputs to the number of tokens that the loss is the mean of."
        )
    return best


def _probes(batch: Mapping[str, Any], labels: list[str], masks: list[str]) -> Iterator[dict[str, Any]]:
    """Batches on which no two rules agree, if the model takes them; then the batch itself."""
    thinned = {k: _thinned(batch[k]) for k in labels if (batch[k] == IGNORED).any()} or {
        k: _thinned(batch[k]) for k in labels
    }
    shortened = {k: _shortened(batch[k]) for k in masks}
    yield {**batch, **thinned, **shortened}
    yield {**batch, **thinned}
    yield dict(batch)


def _shortened(mask: Tensor) -> Tensor:
    """The last two positions of the second half's samples are padding."""
    short = mask.clone()
    short[len(mask) - len(mask) // 2 :, -2:] = 0
    return short


def _rules(labels: list[str], masks: list[str], sample_key: str) -> Iterator[LossTokens]:
    for key in labels:
        for mask in ("", *masks):
            for shift in (1, 0):
                yield LossTokens(key, shift, IGNORED, mask, sample_key)
                yield LossTokens(key, shift, None, mask, sample_key)
    yield LossTokens(sample_key=sample_key)


def _binary(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def _may_be_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dim() > 1 and value.dtype != torch.bool


def _thinned(labels: Tensor) -> Tensor:
    """Labels of which the first half of the samples loses most, and the others their first: so that no two rules agree."""
    thinned = labels.clone()
    half, length = len(labels) - len(labels) // 2, labels.shape[1]
    thinned[:half, length // 3 :] = IGNORED
    kept = labels[:half, 0]
    thinned[:half, 0] = torch.where(kept == IGNORED, labels.clamp(min=0)[:half, 0], kept)
    thinned[half:, 0] = IGNORED
    return thinned
