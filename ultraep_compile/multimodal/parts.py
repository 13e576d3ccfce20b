"""What a pipeline runs: the parts of a multimodal model, and the pieces of a batch they work on.

    parts = find_parts(model, batch, stages=4)
    for mb in parts.microbatches(batch, 8):
        ...

Every part is a module that runs some of the model's own, unmodified forward. Parameters stay the model's: a part's
`named_parameters` are those it reads, under the names they have in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(slots=True)
class Encoder:
    """An encoder with the projectors behind it."""

    name: str
    """Path of the encoder in the model."""
    module: nn.Module
    """`forward(**item) -> tuple[Tensor, ...]`: features of one item, rows along dim 0."""
    feeds: tuple[int, ...]
    """Stages that read the features: stage 0, or several (early layers, cross attention)."""


@dataclass(slots=True)
class Generator:
    name: str
    module: nn.Module
    """`forward(states: tuple[Tensor, ...], **inputs) -> Tensor`: its share of the loss, a scalar."""


@dataclass(slots=True)
class Stage:
    index: int
    module: nn.Module
    """`forward(hidden, inputs, features) -> tuple[Tensor, ...]`.

    hidden: what the stage before returned; `()` for stage 0.
    inputs: those of the microbatch. features: encoder name -> its features of the microbatch, concatenated over items;
    an encoder that has no item in the microbatch is left out.
    The last stage returns the states that generators read (`Parts.states` of them), then the loss, then metrics
    (detached). The loss of a microbatch is that of the last stage plus those of the generators.
    """


@dataclass(slots=True)
class Microbatch:
    inputs: dict[str, Any]
    """What every stage gets: ids, masks, labels, grids, pixels."""
    items: dict[str, list[dict[str, Any]]]
    """Per encoder name its items; features of the microbatch are theirs, concatenated in this order along dim 0."""
    weight: float
    """Loss tokens of the microbatch over those of the batch: the batch's loss is the weighted sum."""


@dataclass(slots=True)
class Parts:
    encoders: list[Encoder]
    stages: list[Stage]
    generators: list[Generator]
    states: int = 0
    """How many tensors the last stage returns before its loss: what generators read."""
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameters that several stages read (tied embeddings): their gradients are to be added up over those stages."""

    def microbatches(self, batch: Mapping[str, Any], count: int) -> list[Microbatch]:
        raise NotImplementedError
