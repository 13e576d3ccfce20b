"""Which recorded tensors say where tokens go, and with what weight: expert ids [T, K] in whatever form, weights [T, K] or [T, E]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ultraep_compile.ladder.regions import Parts, places
from ultraep_compile.ladder.routing import CLOSE, Routing

if TYPE_CHECKING:
    from ultraep_compile.ladder.recording import Recording
    from ultraep_compile.ladder.together import Ranks


@dataclass(frozen=True, slots=True)
class Sources:
    """Recorded tensors that say where tokens go and with what weight."""

    ids: fx.Node | None
    ids_form: str
    weight: fx.Node | None
    weight_form: str
    """`pairs` [T, K], `by choice` [K, T], `samples` [B, K], `experts` [T, E], `slots` [T, (K,) E, C] or `one` (no tensor, weight 1)."""
    factor: float
    choices: int
    """K."""
    masked: bool
    """Ids hold pairs that are not sent: their weight is 0."""
    repeats: str = ""
    """Of an expert that a token names twice: both count (""), it counts `once`, or that must `never` be."""


def sources(recording: Recording, parts: Parts, routing: Routing, experts: int, weights: Tensor) -> Iterator[Sources]:
    """Ways to compute ids and weights from recorded tensors, the likeliest first.

    Args:
        weights: [T, E], the factors to look for.
    """
    found_ids = sorted(_ids(recording, parts, routing, experts), key=lambda found: (found[2].shape[1], _FORMS.index(found[1])))
    for node, form, ids in found_ids[:4]:
        live = routing.sent.gather(1, ids)
        beyond = torch.zeros_like(live)
        if form == "beyond":
            beyond = recording.values[node].reshape(ids.shape) >= experts
            live &= ~beyond
        pairs = _Pairs(ids, live, beyond, weights, routing.skip)
        masked, shows = not bool(live.all()), form in ("one-hot", "beyond")
        kept = form == "one-hot" or (masked and shows)  # a one-hot tensor may drop pairs that it did not drop here
        if pairs.factor_of(torch.ones_like(live, dtype=torch.float64), 1e-4) == 1 and (shows or not masked):
            yield Sources(node, form, None, "one", 1.0, ids.shape[1], kept)
            continue
        for weight, weight_form, factor in _weights(recording, parts, routing, pairs, weights, experts):
            if masked and not shows and weight_form in ("pairs", "by choice"):
                value = recording.values[weight]
                value = value.reshape(ids.shape) if weight_form == "pairs" else value.reshape(-1, len(ids)).t()
                if bool((value[~live] != 0).any()):
                    continue  # something drops pairs, and these weights do not show it
            yield Sources(node, form, weight, weight_form, factor, ids.shape[1], kept)
    if routing.choices < experts and routing.skip is None:
        shown = list(_weights(recording, parts, routing, None, weights, experts))
        for choices in range(routing.choices, min(routing.choices + 2, experts)):  # a capacity may have dropped every second choice
            for weight, weight_form, factor in shown:
                yield Sources(None, "", weight, weight_form, factor, choices, False)


def common_sources(found: list[Sources], recording: Recording, parts: Parts, ranks: Ranks) -> list[Sources]:
    """Those that all ranks have found, alike on all of them. Pairs may be dropped on some of them only."""
    where: dict[fx.Node | None, Any] = {**places(recording, parts), None: None}
    mine = {(where[s.ids], s.ids_form, where[s.weight], s.weight_form, round(s.factor, 4), s.choices): s for s in found}
    every = ranks.every({key: s.masked for key, s in mine.items()})
    return [
        dataclasses.replace(mine[key], masked=any(theirs[key] for theirs in every))
        for key in every[0]
        if all(key in theirs for theirs in every)
    ]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Ids in question, and what weights by them have to add up to."""

    ids: Tensor
    live: Tensor
    beyond: Tensor
    dense: Tensor
    skip: Tensor | None

    @property
    def distinct(self) -> bool:
        return bool((self.ids.sort(1).values.diff(dim=1) != 0).all())

    def factor_of(self, value: Tensor, tolerance: float) -> float | None:
        """The number that turns weights [T, K] into the measured ones, if there is one."""
        weights = value.reshape(self.ids.shape).double()
        total = torch.zeros_like(self.dense).scatter_add(1, self.ids, weights * self.live)
        factor = _ratio(total, self.dense, tolerance)
        if factor is not None and self.skip is not None:
            by = (weights * self.beyond).sum(1) * factor
            return factor if torch.allclose(by, self.skip, rtol=tolerance, atol=10 * tolerance) else None
        return factor


_FORMS = ("pairs", "beyond", "sizes", "one-hot", "by choice", "samples")
"""Of ids: [T, K]; the same with choices that are no expert; rows of each expert [E], the rows standing in that order;
one-hot [T, K, E]; [K, T]; [B, K] for T/B tokens each, one sample after the other.
"""


def _ids(recording: Recording, parts: Parts, routing: Routing, experts: int) -> Iterator[tuple[fx.Node, str, Tensor]]:
    tokens, pairs = routing.tokens, routing.sent
    for node in reversed(list(recording.graph.nodes)):
        value = recording.values.get(node)
        if value is None or parts.label[node] or value.dim() == 0 or value.numel() == 0:
            continue
        if value.is_floating_point() or not (value.numel() % tokens == 0 or tokens % value.shape[0] == 0 or tuple(value.shape) == (experts,)):
            continue
        for form, ids in _as_ids(value, tokens, experts):
            if bool((ids < 0).any()) or (form != "pairs" and bool((ids >= experts).any())):
                continue
            beyond = ids >= experts  # a choice that no expert serves: skip, zero or shared
            if form == "pairs" and bool(beyond.any()):
                form, ids = "beyond", ids.clamp(max=experts - 1)
            covered = torch.zeros_like(pairs, dtype=torch.int64).scatter_add_(1, ids, (~beyond).long()) > 0
            if bool((covered | ~pairs).all()):
                yield node, form, ids


def _as_ids(value: Tensor, tokens: int, experts: int) -> Iterator[tuple[str, Tensor]]:
    if tuple(value.shape) == (experts,) and int(value.sum()) == tokens and bool((value >= 0).all()):
        yield "sizes", torch.repeat_interleave(torch.arange(experts), value.long())[:, None]
    if value.dtype in (torch.int64, torch.int32, torch.int16) and value.numel() % tokens == 0:
        per_token = value.numel() // tokens
        if (per_token <= experts and math.prod(value.shape[:-1]) in (tokens, 1)) or value.numel() == tokens:
            yield "pairs", value.reshape(tokens, -1).long()
        if 1 < per_token < experts and value.numel() == tokens * per_token:
            yield "by choice", value.reshape(-1, tokens).t().long()
    if value.dtype in (torch.int64, torch.int32, torch.int16) and 1 < value.shape[0] < tokens and tokens % value.shape[0] == 0:
        samples = value.shape[0]
        if value.numel() // samples <= experts:
            yield "samples", value.reshape(samples, -1).long().repeat_interleave(tokens // samples, 0)
    if value.dim() >= 2 and value.shape[-1] == experts and value.numel() % (tokens * experts) == 0:
        hot = value.reshape(tokens, -1, experts)
        if bool(((hot == 0) | (hot == 1)).all()) and bool((hot.sum(-1) <= 1).all()):
            yield "one-hot", hot.long().argmax(-1)


def _weights(
    recording: Recording,
    parts: Parts,
    routing: Routing,
    pairs: _Pairs | None,
    dense: Tensor,
    experts: int,
) -> Iterator[tuple[fx.Node, str, float]]:
    tokens = routing.tokens
    for node in reversed(list(recording.graph.nodes)):
        value = recording.values.get(node)
        if value is None or parts.label[node] or node.op == "get_attr" or not value.is_floating_point():
            continue
        if value.dim() == 0 or value.numel() == 0:
            continue
        if value.numel() % tokens:
            of_each = _of_samples(value, tokens, pairs)
            if of_each is not None and (factor := pairs.factor_of(of_each, 10 * CLOSE.get(value.dtype, 1e-4))) is not None:  # type: ignore
                yield node, "samples", factor
            continue
        tolerance = 10 * CLOSE.get(value.dtype, 1e-4)
        if pairs is not None and value.numel() == pairs.ids.numel() and _leads(value, tokens):
            if (factor := pairs.factor_of(value, tolerance)) is not None:
                yield node, "pairs", factor
        if pairs is not None and value.numel() == pairs.ids.numel() and pairs.ids.shape[1] > 1:
            if (factor := pairs.factor_of(value.reshape(-1, tokens).t(), tolerance)) is not None:
                yield node, "by choice", factor
        if pairs is not None and not pairs.distinct:
            continue
        if value.numel() == tokens * experts and _leads(value, tokens):  # the dims behind run over the experts
            whole = value.reshape(tokens, experts).double()
            if pairs is not None:
                ids_values = whole[dense != 0]
                if (factor := _ratio(ids_values, dense[dense != 0], tolerance)) is not None:
                    yield node, "experts", factor
            elif (factor := _ratio(whole, dense, tolerance)) is not None:
                yield node, "experts", factor
        if pairs is None and value.dim() >= 3 and value.shape[-2] == experts and _leads(value.flatten(-2), tokens):
            of_each = value.sum(-1).reshape(tokens, -1, experts).sum(1)
            if (factor := _ratio(of_each, dense, tolerance)) is not None:
                yield node, "slots", factor


def _of_samples(value: Tensor, tokens: int, pairs: _Pairs | None) -> Tensor | None:
    """Weights [B, K] of samples for each of their tokens."""
    samples = value.shape[0]
    if pairs is None or tokens % samples or value.numel() != samples * pairs.ids.shape[1]:
        return None
    return value.reshape(samples, -1).repeat_interleave(tokens // samples, 0)


def _leads(value: Tensor, tokens: int) -> bool:
    """Do the leading dims run over the tokens?"""
    return any(math.prod(value.shape[:d]) == tokens for d in range(1, value.dim() + 1))


def _ratio(have: Tensor, want: Tensor, tolerance: float) -> float | None:
    """The number that turns one tensor into the other, if there is one."""
    have, want = have.double().flatten(), want.double().flatten()
    square = float(have @ have)
    if square == 0:
        return None
    factor = float(have @ want) / square
    factor = 1.0 if abs(factor - 1) < tolerance else factor
    close = bool(((have * factor - want).abs() <= tolerance * want.abs().clamp_min(float(want.abs().mean()))).all())
    return factor if close and factor else None
