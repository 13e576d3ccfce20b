"""Where to cut the language model, and which parameters each part reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.anatomy import Anatomy
from ultraep_compile.multimodal.division import Division
from ultraep_compile.multimodal.modules import EncoderModule, GeneratorModule, StageModule
from ultraep_compile.multimodal.skeleton import every_parameter_trainable, variables_behind


def balanced(costs: Sequence[float], stages: int, front: float = 0.0, head: float = 0.0) -> list[range]:
    """Contiguous ranges of layers, none empty, whose greatest cost is least; the ends carry what stands before and behind.

    balanced([1, 1, 1, 1], 2, head=2.0) gives layers 0 to 2 and layer 3: three against one and the head.

    Raises:
        PartsError: more stages than layers.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        raise PartsError(
            f"{stages} stages for a language model of {n} layers: a stage needs a layer. Use at most {n} (ranks x virtual stages)."
        )
    total = [0.0, *itertools.accumulate(costs)]

    def cost(a: int, b: int) -> float:
        return total[b] - total[a] + front * (a == 0) + head * (b == n)

    best = [(cost(0, b), [0, b]) if b else (0.0, [0]) for b in range(n + 1)]
    for s in range(2, stages + 1):
        best = [
            min((max(best[a][0], cost(a, b)), [*best[a][1], b]) for a in range(s - 1, b)) if b >= s else best[b]
            for b in range(n + 1)
        ]
    return [range(a, b) for a, b in itertools.pairwise(best[n][1])]


def trace_reads(
    anatomy: Anatomy,
    encoders: Sequence[EncoderModule],
    stages: Sequence[StageModule],
    generators: Sequence[GeneratorModule],
    batch: Mapping[str, Any],
    division: Division,
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Run the parts one after the other and note which parameters and features each one reads.

    Sets the `reads` of all parts. Returns: encoder -> stages that read its features; parameters that no part reads.
    """
    model = anatomy.model
    with torch.enable_grad(), every_parameter_trainable(model):
        feeds, last = _chain(anatomy, encoders, stages, batch)
        for generator in generators:
            generator.reads = _read(model, [generator(last, **batch)], [generator.head.name])
            generator.head.divides = _divides(generator, last, batch, division)
    read = {n for part in (*encoders, *stages, *generators) for n in part.reads}
    return feeds, [n for n, _ in model.named_parameters() if n not in read]


def trace_feeds(
    anatomy: Anatomy, encoders: Sequence[EncoderModule], stages: Sequence[StageModule], batch: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Encoder -> stages that read its features."""
    with torch.enable_grad(), every_parameter_trainable(anatomy.model):
        return _chain(anatomy, encoders, stages, batch)[0]


def _chain(
    anatomy: Anatomy, encoders: Sequence[EncoderModule], stages: Sequence[StageModule], batch: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], tuple[Tensor, ...]]:
    features: dict[str, tuple[Tensor, ...]] = {}
    feeds: dict[str, list[int]] = {e.group.name: [] for e in encoders}
    for encoder in encoders:
        made = encoder(**batch)
        encoder.reads = _read(anatomy.model, made, encoder.group.paths)
        features[encoder.group.name] = tuple(f.detach().requires_grad_() for f in made)
    hidden: tuple[Tensor, ...] = ()
    for index, stage in enumerate(stages):
        made = stage(hidden, batch, features)
        behind = {id(v) for v in variables_behind(made)}
        for name, group in features.items():
            if any(id(f) in behind for f in group):
                feeds[name].append(index)
        stage.reads = _read(
            anatomy.model, made, [f"{anatomy.roles.layers}.{i}" for i in range(stage.first, stage.last)]
        )
        hidden = tuple(h.detach().requires_grad_() for h in made)
    return {n: tuple(s) for n, s in feeds.items()}, hidden


def _read(model: nn.Module, made: Iterable[Tensor], paths: Iterable[str]) -> tuple[str, ...]:
    """Names of the parameters that tensors were made from, and of all in the modules that were to make them."""
    behind = {id(v) for v in variables_behind(made)} | {
        id(p) for path in paths for p in model.get_submodule(path).parameters()
    }
    return tuple(n for n, p in model.named_parameters() if id(p) in behind)


def _divides(
    generator: GeneratorModule, states: tuple[Tensor, ...], batch: Mapping[str, Any], division: Division
) -> bool:
    n = division.samples
    if n < 2 or any(s.dim() == 0 or len(s) != n for s in states[generator.mine]):
        return False
    with torch.no_grad():
        whole = float(generator(states, **batch))
        several = sum(float(generator(states, **item)) for item in division.generator_items(range(n)))
    return abs(several - whole) <= 1e-4 * abs(whole)
