"""Do the parts compute what the model does? One microbatch at a time, chained in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.skeleton import every_parameter_trainable, is_state, loss_of
from ultraep_compile.preparation import untouched

if TYPE_CHECKING:
    from ultraep_compile.multimodal.parts import Microbatch, Parts

Gradients = dict[str, Tensor]
_TOLERANCE = 1e-3
"""Relative, of a whole gradient: far above rounding in fp32, far below what a missing path makes."""
_LOW_TOLERANCE = 5e-2
"""The same in half precision."""


def check_parts(parts: Parts, batch: Mapping[str, Any]) -> None:
    """Compare loss and gradients of the parts with those of the model on a batch, each sample a microbatch of its own.

    Dropout would differ between the two: `find_parts` runs this in evaluation mode if the model is random in training.

    Raises:
        PartsError: they differ; names the first parameter that does.
    """
    model = parts.anatomy.model
    microbatches = parts.microbatches(batch, min(2, len(batch[parts.sample_key])))
    with every_parameter_trainable(model):
        with untouched(model):
            loss, expected = model_gradients(parts, microbatches)
        with untouched(model), contextlib.ExitStack() as alone:
            for part in parts.part_modules():
                alone.enter_context(part.without_other_weights())
            ours, got = parts_gradients(parts, microbatches)
    half = any(is_state(p) and p.element_size() < 4 for p in model.parameters())
    autocast = any(torch.is_autocast_enabled(p.device.type) for p in model.parameters())
    tolerance = _LOW_TOLERANCE if half or autocast else _TOLERANCE
    if abs(loss - ours) > tolerance * max(abs(loss), 1e-12):
        raise PartsError(_differ("loss", f"{ours:.8g} instead of {loss:.8g}"))
    scale = max((float(g.abs().max()) for g in expected.values()), default=0.0)
    for name in dict.fromkeys([*expected, *got]):
        error = relative_error(got.get(name), expected.get(name), floor=1e-4 * scale)
        if error > tolerance:
            raise PartsError(_differ(f"gradient of {name}", f"relative difference {error:.1e}"))


def _differ(what: str, how: str) -> str:
    return (
        f"the stages do not compute what the model does: {what}, {how}. Some value goes around the cut between two stages (a cache "
        "or states that several layers share, an auxiliary loss over all layers), or the forward draws random numbers even "
        "in evaluation: switch that off, or make the numbers inputs of the model."
    )


def relative_error(got: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """Largest difference over the largest value; a gradient that is not there counts as zeros."""
    if got is None and expected is None:
        return 0.0
    size = torch.zeros(()) if expected is None else expected.abs().max()
    difference = got if expected is None else expected if got is None else got - expected
    assert difference is not None
    return float(difference.abs().max() / size.clamp(min=max(floor, 1e-30)))


def model_gradients(parts: Parts, microbatches: Sequence[Microbatch]) -> tuple[float, Gradients]:
    """Weighted loss and gradients of the unmodified model over microbatches."""
    return _gradients(
        parts, lambda: sum(_weighted(loss_of(parts.anatomy.model(**m.inputs)), m) for m in microbatches if m.weight)
    )


def parts_gradients(parts: Parts, microbatches: Sequence[Microbatch]) -> tuple[float, Gradients]:
    """The same by the parts, one after the other."""
    return _gradients(parts, lambda: sum(_chained(parts, m) for m in microbatches if m.weight))


def _gradients(parts: Parts, steps: Any) -> tuple[float, Gradients]:
    """Gradients that a model had before come back."""
    named = dict(parts.anatomy.model.named_parameters())
    before = {n: p.grad for n, p in named.items()}
    for p in named.values():
        p.grad = None
    try:
        with torch.enable_grad():
            loss = steps()
        return float(loss), {n: p.grad for n, p in named.items() if p.grad is not None}
    finally:
        for n, p in named.items():
            p.grad = before[n]


def _weighted(loss: Tensor, microbatch: Microbatch) -> float:
    (loss * microbatch.weight).backward()
    return float(loss.detach()) * microbatch.weight


def _chained(parts: Parts, microbatch: Microbatch) -> float:
    """One microbatch, cut as between ranks: every tensor that is handed over is detached and its gradient passed back."""
    made = {e.name: _features(e.module, microbatch.items[e.name]) for e in parts.encoders if microbatch.items[e.name]}
    given = {name: _detached(features) for name, features in made.items()}
    hidden: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    entry: tuple[Tensor, ...] = ()
    output: tuple[Tensor, ...] = ()
    for stage in parts.stages:
        fed = {e.name: given[e.name] for e in parts.encoders if stage.index in e.feeds and e.name in given}
        output = stage.module(entry, microbatch.inputs, fed)
        hidden.append((output, entry))
        entry = _detached(output)
    states = _detached(output[: parts.states])
    loss = output[parts.states] * microbatch.weight
    for generator in parts.generators:
        for sample in microbatch.items.get(generator.name, [microbatch.inputs]):
            part = generator.module(states, **sample) * microbatch.weight
            part.backward()
            loss = loss + part.detach()
    seeds = [s.grad for s in states] + [None]
    torch.autograd.backward(
        [o for o, g in zip(output, seeds, strict=False) if g is not None] + ([loss] if loss.requires_grad else []),
        [g for g in seeds if g is not None] + ([torch.ones_like(loss)] if loss.requires_grad else []),
    )
    for (earlier, _), (_, entry) in zip(hidden[-2::-1], hidden[:0:-1], strict=True):
        _backward(earlier, entry)
    for name, features in made.items():
        _backward(features, given[name])
    return float(loss.detach())


def _features(encoder: Any, items: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(f) for f in zip(*(encoder(**item) for item in items), strict=True))


def _detached(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)


def _backward(made: tuple[Tensor, ...], handed: tuple[Tensor, ...]) -> None:
    pairs = [(m, h.grad) for m, h in zip(made, handed, strict=True) if m.requires_grad and h.grad is not None]
    if pairs:
        torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])
