"""What a pipeline runs: the parts of a multimodal model, and the pieces of a batch they work on.

    parts = find_parts(model, batch, stages=4)
    for mb in parts.microbatches(batch, 8):
        ...

Every part is a module that runs some of the model's own, unmodified forward. Parameters stay the model's: a part's
`named_parameters` are those it reads, under the names they have in the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.anatomy import Anatomy, study
from ultraep_compile.multimodal.calls import Calls
from ultraep_compile.multimodal.check import check_parts
from ultraep_compile.multimodal.cut import balanced, refuse_around, trace_reads
from ultraep_compile.multimodal.division import Division, even
from ultraep_compile.multimodal.inputs import learn_inputs, learn_items
from ultraep_compile.multimodal.loss_tokens import entry, fits, learn_loss_tokens, weigh
from ultraep_compile.multimodal.modules import EncoderModule, GeneratorModule, PartModule, StageModule
from ultraep_compile.multimodal.skeleton import is_state, loss_of, nothing_random, nothing_silent
from ultraep_compile.preparation import untouched


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
    """Per encoder name its items; features of the microbatch are theirs, concatenated in this order along dim 0.

    Per generator name its samples, if its loss is the sum over them; otherwise it runs on `inputs` at once.
    """
    weight: float
    """Loss tokens of the microbatch over those of the batch: the batch's loss is the weighted sum."""


@dataclass(slots=True)
class Parts:
    encoders: list[Encoder]
    stages: list[Stage]
    generators: list[Generator]
    anatomy: Anatomy
    sample_key: str
    """The input whose dim 0 counts samples."""
    loss_tokens: Callable[[Mapping[str, Any]], Any]
    """Inputs -> how many tokens their loss is the mean of: a number, or a tensor whose sum is it."""
    states: int = 0
    """How many tensors the last stage returns before its loss: what generators read."""
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameters that several stages read (tied embeddings): their gradients are to be added up over those stages."""
    unread: tuple[str, ...] = ()
    """Parameters that no part reads: of generators that training does not call, of layers whose output is not used."""
    known: frozenset[str] = frozenset()
    """Inputs that the example batch had: what others do in the model was not seen. Empty: not known."""

    def microbatches(self, batch: Mapping[str, Any], count: int) -> list[Microbatch]:
        """Divide a batch into `count` microbatches of samples in order, as even as possible.

        The loss of the batch is the sum over microbatches of weight times loss, and so are its gradients.

        Raises:
            PartsError: fewer samples than microbatches, a missing modality, items that cannot be told apart, rules
            that count loss tokens differently and fit the example batch alike.
        """
        self._refuse_unknown(batch)
        groups = self.anatomy.groups
        division = Division(batch, groups, self.sample_key)
        if not 1 <= count <= division.samples:
            raise PartsError(
                f"cannot split a batch of {division.samples} samples into {count} microbatches: give a larger batch or fewer microbatches"
            )
        chunks = even(division.samples, count)
        inputs = [division.inputs(chunk) for chunk in chunks]
        weights = weigh(self.loss_tokens, batch, chunks, inputs)
        items = [{g.name: division.encoder_items(g, chunk) for g in groups} for chunk in chunks]
        for chunk, mine in zip(chunks, items, strict=True):
            mine |= {h.name: division.generator_items(chunk) for h in self.anatomy.heads if h.divides}
        return [Microbatch(*of) for of in zip(inputs, items, weights, strict=True)]

    def _refuse_unknown(self, batch: Mapping[str, Any]) -> None:
        """Masks, positions and flags go to all parts; what is measured (pixels, sound) to encoders that were seen to read it."""
        new = sorted(k for k, v in batch.items() if is_state(v) and k not in self.known) if self.known else []
        if new:
            raise PartsError(
                f"the batch has {', '.join(map(repr, new))}, which the example batch had not, so that it is not known which part reads it. "
                "Give pipeline() an example batch that has every modality that comes."
            )

    def part_modules(self) -> list[PartModule]:
        return [p.module for p in (*self.encoders, *self.stages, *self.generators) if isinstance(p.module, PartModule)]


def find_parts(
    model: nn.Module,
    batch: Mapping[str, Any],
    stages: int,
    *,
    costs: Sequence[float] | None = None,
    loss_tokens: Callable[[Mapping[str, Any]], Any] | str | None = None,
    check: bool = True,
) -> Parts:
    """Take a model apart: encoders, `stages` stages of its language model, generators. The model itself does not change.

    Args:
        model: whole, with its real parameters; `Parts.keep` frees what a rank does not need.
        batch: keyword arguments of one forward with labels and every modality; at least two samples.
        stages: pipeline ranks times virtual stages.
        costs: of each layer, to balance stages by; measured FLOPs of the forward by default.
        loss_tokens: inputs of a microbatch -> tokens that their loss is the mean of (a number, or a tensor whose sum is it), or the
            name of an input that says so: a mask [samples, positions], or counts [samples]; found by comparing losses by default.
        check: compare loss and gradients of the parts with those of the model, on this batch.

    Raises:
        PartsError: no multimodal part, more stages than layers, a loss that is no mean over tokens, or values that go
          around a cut, so that the parts do not compute what the model does.
    """
    with nothing_silent(model), nothing_random(model, batch), untouched(model):
        return _find_parts(model, batch, stages, costs, loss_tokens, check)


def _find_parts(
    model: nn.Module,
    batch: Mapping[str, Any],
    stages: int,
    costs: Sequence[float] | None,
    loss_tokens: Callable[[Mapping[str, Any]], Any] | str | None,
    check: bool,
) -> Parts:
    anatomy = study(model, batch)
    if costs is not None and len(costs) != len(anatomy.layers):
        raise PartsError(f"{len(costs)} costs for {len(anatomy.layers)} layers of {anatomy.roles.layers}")
    ranges = balanced(costs or anatomy.costs, stages, anatomy.front, anatomy.head)
    refuse_around(anatomy, ranges)
    sample_key, features = learn_inputs(anatomy, batch)
    calls = Calls(anatomy)
    stage_modules = [StageModule(anatomy, calls, r.start, r.stop) for r in ranges]
    encoders = [EncoderModule(anatomy, g) for g in anatomy.groups]
    learn_items(anatomy, encoders, batch, sample_key, features)
    generators = [GeneratorModule(anatomy, calls, h) for h in anatomy.heads]
    feeds, unread = trace_reads(
        anatomy, encoders, stage_modules, generators, batch, Division(batch, anatomy.groups, sample_key)
    )
    found = Parts(
        [Encoder(e.group.name, e, feeds[e.group.name]) for e in encoders],
        [Stage(i, s) for i, s in enumerate(stage_modules)],
        [Generator(g.head.name, g) for g in generators],
        anatomy,
        sample_key,
        entry(loss_tokens) if isinstance(loss_tokens, str) else loss_tokens or (lambda inputs: 1),
        states=sum(len(h.states) for h in anatomy.heads),
        shared=_shared(stage_modules),
        unread=tuple(unread),
        known=frozenset(k for k, v in batch.items() if v is not None),
    )
    _learn_loss_tokens(found, batch, given=loss_tokens is not None)
    if check:
        check_parts(found, batch)
    return found


def _learn_loss_tokens(parts: Parts, batch: Mapping[str, Any], given: bool) -> None:
    """Find the rule that counts loss tokens, or compare the one that the user gave with the losses of the batch and its halves."""
    model, groups = parts.anatomy.model, parts.anatomy.groups
    if len(batch[parts.sample_key]) < 2:
        if given:
            return
        raise PartsError(
            "an example batch of one sample does not show what the loss is the mean of: give at least two samples"
        )
    kinds: list[torch.dtype] = []

    def loss(inputs: Mapping[str, Any]) -> float:
        with untouched(model), torch.no_grad():
            found = loss_of(model(**inputs))
        kinds.append(found.dtype)
        return float(found)

    def halves(inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        division = Division(inputs, groups, parts.sample_key)
        return [division.inputs(r) for r in even(division.samples, 2)]

    if given:
        if not fits(loss, halves, batch, parts.loss_tokens):
            warnings.warn(
                "the loss of the example batch is not the mean of those of its halves by the given loss_tokens: gradients will be those of "
                "the losses of microbatches, weighted by it",
                stacklevel=5,
            )
        return
    fed = {k for g in groups for k in g.keys}
    placed = {s.placeholder[0] for g in groups for s in g.streams if s.placeholder}
    loss(batch)
    device = batch[parts.sample_key].device
    half = any(is_state(p) and p.element_size() < 4 for p in model.parameters())
    half = half or torch.is_autocast_enabled(device.type)
    parts.loss_tokens = learn_loss_tokens(
        loss, halves, batch, parts.sample_key, fed, bool(parts.generators),
        torch.bfloat16 if half else kinds[0], careful=device.type != "cpu", kept=placed,
    )  # fmt: skip


def _shared(stages: Sequence[PartModule]) -> dict[str, tuple[int, ...]]:
    readers: dict[str, list[int]] = {}
    for index, stage in enumerate(stages):
        for name in stage.reads:
            readers.setdefault(name, []).append(index)
    return {name: tuple(r) for name, r in readers.items() if len(r) > 1}
