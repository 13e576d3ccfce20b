"""What a step will cost, from the sizes of its data: the problem that every rank plans for itself.

Sizes are counted in elements (items) and tokens (LLM); a rate turns them into time. Rates are estimated from parameters
until operations have been measured. All ranks see the same batch and the same rates, so they make the same problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ultraep_compile.executor.units import tensors_in
from ultraep_compile.multimodal.parts import Microbatch, Parts
from ultraep_compile.schedules import Encoder, Generator, Op, Problem

_BACKWARD = 2.0  # times the forward, where nothing was measured
_DIGITS = 3  # significant ones of a rate: every rank must round to the same number


@dataclass(frozen=True, slots=True)
class Rates:
    """Time per unit of size. Any unit of time, the same for all."""

    encoder_forward: tuple[float, ...]  # per element of an item, one entry per encoder
    encoder_backward: tuple[float, ...]  # 0: frozen
    generator: tuple[float, ...]  # per token or element, forward and backward
    stage_forward: tuple[float, ...]  # [S] per token
    stage_backward: tuple[float, ...]  # [S]
    unit: str = "estimated"  # or "seconds"


def weights(module: nn.Module, model: nn.Module | None = None) -> int:
    """Parameters that take part in a product for every row: matrices, without the lookup tables of `model`."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if model else set()
    return sum(p.numel() for p in module.parameters() if p.dim() > 1 and id(p) not in tables) or 1


def estimated_rates(parts: Parts, model: nn.Module | None = None) -> Rates:
    """Rates in proportion to the parameters that a row meets. The first stage looks its table up; a tied head multiplies."""
    encoders = tuple(weights(e.module) / _row(e.module) for e in parts.encoders)
    stages = tuple(float(weights(s.module, (model or s.module) if s.index == 0 else None)) for s in parts.stages)
    generators = tuple((1 + _BACKWARD) * weights(g.module) for g in parts.generators)
    return follow_trained(
        Rates(encoders, (0.0,) * len(encoders), generators, stages, tuple(_BACKWARD * s for s in stages)), parts
    )


def follow_trained(rates: Rates, parts: Parts) -> Rates:
    """Rates that know which encoders are trained now: a frozen one has no backward, one just unfrozen is estimated."""
    trained = [any(p.requires_grad for p in e.module.parameters()) for e in parts.encoders]
    known = zip(trained, rates.encoder_forward, rates.encoder_backward, strict=True)
    return replace(rates, encoder_backward=tuple((old or _BACKWARD * f) if t else 0.0 for t, f, old in known))


def _row(module: nn.Module) -> int:
    """Elements of an item that make one row inside an encoder: what its first matrix takes in."""
    first = next((p for p in module.parameters() if p.dim() > 1), None)
    return first[0].numel() if first is not None else 1


def item_size(item: Mapping[str, Any]) -> int:
    """Elements of an item's floating-point tensors."""
    return sum(t.numel() for t in tensors_in(item) if t.is_floating_point()) or 1


def tokens(microbatch: Microbatch) -> int:
    """Tokens of the LLM: elements of the largest integer tensor of one or two dimensions (ids), else of any."""
    found = [t for t in microbatch.inputs.values() if isinstance(t, Tensor)]
    ids = [t.numel() for t in found if not t.is_floating_point() and not t.is_complex() and t.dim() in (1, 2)]
    return max(ids or [t.numel() for t in found], default=1)


def step_sizes(parts: Parts, microbatches: Sequence[Microbatch]) -> list[float]:
    """Mean sizes of a microbatch: tokens, elements for each encoder, tokens or elements for each generator."""
    m = len(microbatches)
    total = [float(sum(tokens(mb) for mb in microbatches))]
    total += [float(sum(sum(_sizes(mb, e.name) or ()) for mb in microbatches)) for e in parts.encoders]
    for g in parts.generators:
        total.append(float(sum(tokens(mb) if (row := _sizes(mb, g.name)) is None else sum(row) for mb in microbatches)))
    return [x / m for x in total]


def _sizes(microbatch: Microbatch, name: str) -> list[int] | None:
    """Sizes of the items of one encoder or generator; None if the microbatch lists none for it at all."""
    if name not in microbatch.items:
        return None
    return [item_size(item) for item in microbatch.items[name]]


def make_problem(
    parts: Parts,
    microbatches: Sequence[Microbatch],
    rates: Rates,
    stage_rank: Sequence[int],
    split: bool,
    means: Sequence[float] | None = None,
) -> Problem:
    """The pipeline problem of one batch. `split`: generators may work on single samples. `means`: sizes as of `step_sizes`
    that every microbatch shall count as, whole, because pipelines beside this one have other data and must keep step."""
    m = len(microbatches)
    ranks = max(stage_rank) + 1
    forward, backward = sum(rates.stage_forward) / ranks, sum(rates.stage_backward) / ranks
    length = [tokens(mb) for mb in microbatches] if means is None else [means[0]] * m
    work = [f + b for f, b in zip(rates.stage_forward, rates.stage_backward, strict=True)]
    encoders, generators = [], []
    for e, encoder in enumerate(parts.encoders):
        rows = [_sizes(mb, encoder.name) or [] for mb in microbatches]
        sizes = [float(sum(row)) for row in rows] if means is None else [max(means[1 + e], 1.0)] * m
        one = tuple(n * rates.encoder_forward[e] for n in sizes)
        back = tuple(n * rates.encoder_backward[e] for n in sizes)
        items = tuple(_shares(row) for row in rows) if means is None else ()
        encoders.append(Encoder(one, back, items, encoder.feeds, name=encoder.name))
    for g, generator in enumerate(parts.generators):
        given = [_sizes(mb, generator.name) for mb in microbatches]
        sizes = [float(tokens(mb) if row is None else sum(row)) for row, mb in zip(given, microbatches, strict=True)]
        if means is not None:
            sizes = [max(means[1 + len(parts.encoders) + g], 1.0)] * m
        items = tuple((1.0,) if row is None else _shares(row) for row in given) if split and means is None else ()
        generators.append(Generator(tuple(n * rates.generator[g] for n in sizes), items, generator.name))
    return Problem(
        ranks=ranks,
        microbatches=m,
        llm_forward=tuple(n * forward for n in length),
        llm_backward=tuple(n * backward for n in length),
        encoders=tuple(encoders),
        generators=tuple(generators),
        stage_rank=tuple(stage_rank),
        stage_share=tuple(w / sum(work) * ranks for w in work),
    )


def _shares(row: Sequence[int]) -> tuple[float, ...]:
    return tuple(x / sum(row) for x in row)


def measured_work(
    parts: Parts, microbatches: Sequence[Microbatch], seconds: Sequence[tuple[Op, float, float]]
) -> list[float]:
    """Time and size of what one rank ran, in one list that adds up over ranks: for each encoder forward time, forward
    size, backward time, backward size; for each generator time, size; for each stage as for encoders."""
    e, g = len(parts.encoders), len(parts.generators)
    table = [0.0] * (4 * e + 2 * g + 4 * len(parts.stages))
    for op, start, end in seconds:
        if op.kind in ("EF", "EB"):
            unit, name = 4 * op.stage + 2 * (op.kind == "EB"), parts.encoders[op.stage].name
        elif op.kind == "G":
            unit, name = 4 * e + 2 * op.stage, parts.generators[op.stage].name
        else:
            unit, name = 4 * e + 2 * g + 4 * op.stage + 2 * (op.kind != "F"), ""
        table[unit] += end - start
        if op.kind != "W":  # of a split backward, the input part counts the tokens
            table[unit + 1] += _size(microbatches, op, name)
    return table


def _size(microbatches: Sequence[Microbatch], op: Op, name: str) -> float:
    if not name or (op.kind == "G" and name not in microbatches[op.microbatches[0]].items):
        return sum(tokens(microbatches[j]) for j in op.microbatches)
    if op.items:
        return sum(item_size(microbatches[j].items[name][i]) for j, i in op.items)
    return sum(item_size(item) for item in microbatches[op.microbatch].items.get(name, ()))


def measured_rates(rates: Rates, table: Sequence[float]) -> Rates:
    """Rates from the summed tables of `measured_work`. What did not run keeps its old ratio to the LLM."""
    e, g, s = len(rates.encoder_forward), len(rates.generator), len(rates.stage_forward)

    def rate(at: int) -> float:
        return float(f"{table[at] / table[at + 1]:.{_DIGITS}g}") if table[at + 1] and table[at] > 0 else 0.0

    stages = [rate(4 * e + 2 * g + 4 * i) for i in range(s)]
    backs = [rate(4 * e + 2 * g + 4 * i + 2) for i in range(s)]
    factor = sum(stages) / sum(rates.stage_forward)
    return replace(
        rates,
        encoder_forward=tuple(rate(4 * i) or old * factor for i, old in enumerate(rates.encoder_forward)),
        encoder_backward=tuple(
            (rate(4 * i + 2) or old * factor) if old else 0.0 for i, old in enumerate(rates.encoder_backward)
        ),
        generator=tuple(rate(4 * e + 2 * i) or old * factor for i, old in enumerate(rates.generator)),
        stage_forward=tuple(stages),
        stage_backward=tuple(backs),
        unit="seconds",
    )
