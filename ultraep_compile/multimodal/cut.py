"""Where to cut the language model, and which parameters each part reads."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.anatomy import Anatomy
from ultraep_compile.multimodal.division import Division
from ultraep_compile.multimodal.modules import EncoderModule, GeneratorModule, PartModule, StageModule
from ultraep_compile.multimodal.reads import Reads
from ultraep_compile.multimodal.skeleton import every_parameter_trainable, loss_of, variables_behind

log = logging.getLogger(__name__)


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


def refuse_around(anatomy: Anatomy, ranges: Sequence[range]) -> None:
    """Raise PartsError if a stage reads values of layers of other stages that its first layer is not handed, however small their share."""
    total = len(anatomy.layers)
    for stage in ranges:
        readers = [*stage, total] if stage.stop == total else stage
        for reader in readers:
            if any(n < stage.start for n in anatomy.around.get(reader, ())):
                path, start = anatomy.roles.layers, stage.start
                what = "the loss" if reader == total else f"layer {reader}"
                raise PartsError(
                    f"the stages do not compute what the model does: {what} reads something made before layer {start} of {path}, on another "
                    f"stage, besides what layer {start - 1} returns: it goes around the cut (a loss over the routers of all layers, collected "
                    "hidden states, a cache that layers share). Switch that off (output_router_logits=False in the model's config, say), or give fewer stages."
                )


def trace_reads(
    anatomy: Anatomy,
    encoders: Sequence[EncoderModule],
    stages: Sequence[StageModule],
    generators: Sequence[GeneratorModule],
    batch: Mapping[str, Any],
    division: Division,
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Run the parts one after the other and note which parameters and features each one reads.

    In the model's mode (train or eval) and, if it runs so, in the other one, since either may use weights that the other does not.
    Sets the `reads` of all parts. Returns: encoder -> stages that read its features; parameters that no part reads.

    Raises: PartsError: the model's loss is made from parameters that no part reads.
    """
    model, parts = anatomy.model, (*encoders, *stages, *generators)
    with torch.enable_grad(), every_parameter_trainable(model):
        feeds, last = _chain(anatomy, encoders, stages, batch)
        for generator in generators:
            _trace_generator(generator, last, batch)
            generator.head.divides = _divides(generator, last, batch, division)
        _nothing_forgotten(model, parts, batch)
    try:
        with _other_mode(model), torch.no_grad():
            more, _ = _chain(anatomy, encoders, stages, batch)
    except Exception as reason:
        log.info("weights that %s uses in the other mode are not known: %s", type(model).__name__, reason)
    else:
        feeds = {name: tuple(sorted({*several, *more[name]})) for name, several in feeds.items()}
    read = {n for part in parts for n in part.reads}
    return feeds, [n for n, _ in model.named_parameters() if n not in read]


def _trace_generator(generator: GeneratorModule, states: tuple[Tensor, ...], batch: Mapping[str, Any]) -> None:
    """Set what a generator reads, which of that has gradients from its part of the loss, and whether the rest of the loss has some, too.

    Outside of the generator, parameters of its part of the loss have other gradients when it returns zeros; those of the rest have
    the same.
    """
    model = generator.anatomy.model
    names, parameters = zip(*model.named_parameters(), strict=True)
    with Reads(dict(model.named_parameters())) as reads:
        losses = generator.losses(states, **batch)
    behind = reads.behind(losses)
    own = {id(p) for p in model.get_submodule(generator.head.name).parameters()}
    generator.reads = tuple(n for n, p in zip(names, parameters, strict=True) if id(p) in own or n in behind)
    generator.trains = frozenset(generator.reads)
    if len(losses) == 1:  # left behind the generator: nothing else is in it
        return
    grads = [
        torch.autograd.grad(x, parameters, allow_unused=True) if x.requires_grad else [None] * len(names)
        for x in losses
    ]
    same = {n for n, a, b in zip(names, *grads, strict=True) if a is not None and b is not None and torch.equal(a, b)}
    generator.trains -= same
    generator.shares_weights = any(
        n in generator.trains and b is not None and bool(b.any()) for n, b in zip(names, grads[1], strict=True)
    )


def _nothing_forgotten(model: nn.Module, parts: Sequence[PartModule], batch: Mapping[str, Any]) -> None:
    with Reads(dict(model.named_parameters())) as reads:
        loss = loss_of(model(**batch))
    read = {n for part in parts for n in part.reads}
    if forgotten := sorted(reads.behind(loss) - read):
        raise PartsError(
            f"the loss is made from {', '.join(forgotten[:4])} ({len(forgotten)} in all), which no encoder, stage or generator reads: some value"
            " goes around the cut between the parts. Compute it in the model's own forward, from its inputs."
        )


@contextlib.contextmanager
def _other_mode(model: nn.Module) -> Iterator[None]:
    """In evaluation what trains, and the other way round."""
    before = {m: m.training for m in model.modules()}
    try:
        for module in before:
            module.training = not model.training if module is not model else module.training
        model.training = not model.training
        yield
    finally:
        for module, training in before.items():
            module.training = training


def trace_feeds(
    anatomy: Anatomy, encoders: Sequence[EncoderModule], stages: Sequence[StageModule], batch: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Encoder -> stages that read its features."""
    with torch.enable_grad(), every_parameter_trainable(anatomy.model):
        return _chain(anatomy, encoders, stages, batch)[0]


def _chain(
    anatomy: Anatomy,
    encoders: Sequence[EncoderModule],
    stages: Sequence[StageModule],
    batch: Mapping[str, Any],
) -> tuple[dict[str, tuple[int, ...]], tuple[Tensor, ...]]:
    """Run encoders and stages, add to their `reads`; the stages that read each encoder's features, and what the last stage returns."""
    model = anatomy.model
    parameters = dict(model.named_parameters())

    def noted(part: PartModule, paths: Iterable[str], given: Mapping[Any, Tensor], call: Callable[[], Any]) -> Any:
        with Reads({**parameters, **given}) as reads:
            made = call()
        ids = {id(v) for v in variables_behind(pytree.tree_leaves(made))}  # kernels that no dispatcher sees have a backward
        behind = reads.behind(made) | {key for key, x in {**parameters, **given}.items() if id(x) in ids}
        own = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
        part.reads = tuple(n for n, p in parameters.items() if n in behind or n in part.reads or id(p) in own)
        return made, behind

    features: dict[str, tuple[Tensor, ...]] = {}
    feeds: dict[str, list[int]] = {e.group.name: [] for e in encoders}
    for encoder in encoders:
        made, _ = noted(encoder, encoder.group.paths, {}, lambda e=encoder: e(**batch))
        features[encoder.group.name] = _leaves(made)
    entering = {(name, i): x for name, several in features.items() for i, x in enumerate(several)}
    hidden: tuple[Tensor, ...] = ()
    for index, stage in enumerate(stages):
        stage.calls(batch)  # once, outside of what is noted
        layers = [f"{anatomy.roles.layers}.{i}" for i in range(stage.first, stage.last)]
        made, behind = noted(stage, layers, entering, lambda s=stage, h=hidden: s(h, batch, features))
        for name, group in features.items():
            if any((name, i) in behind for i in range(len(group))):
                feeds[name].append(index)
        hidden = _leaves(made)
    return {n: tuple(s) for n, s in feeds.items()}, hidden


def _leaves(made: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in made)


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
