"""How many tokens a loss is the mean of: rules compete on batches that tell them apart, by the losses of a batch and of its halves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultraep_compile.errors import PartsError

IGNORED = -100
"""Label that torch's cross entropy leaves out."""
_ACCEPTED = 2e-3
"""Relative error of a loss up to which a rule may be right: losses that mix samples a little are taken within microbatches."""
_SHARE = 3e-3
"""How far off a rule's shares may be then."""
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-9}
_HALF = 5e-4
_FEW = 1e-5
"""Two rules that give every microbatch the same share up to this are the same for a batch."""

Loss = Callable[[Mapping[str, Any]], float]
Halves = Callable[[Mapping[str, Any]], list[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class LossTokens:
    """A rule: labels from position `shift` on that are not `ignored`, where `mask` is set; without labels the mask; samples without both.

    `rule(inputs)` is the count for a microbatch, `rule.by_sample(inputs)` that of each sample.
    """

    labels: str = ""
    shift: int = 0
    ignored: int = IGNORED
    mask: str = ""
    sample_key: str = ""
    samples: bool = False
    """Samples with any such label are counted, not the labels."""
    summed: bool = False
    """The loss is no mean: that of a batch is the sum of those of its microbatches."""

    def __call__(self, inputs: Mapping[str, Any]) -> float:
        return float(self.by_sample(inputs).sum())

    def by_sample(self, inputs: Mapping[str, Any]) -> Tensor:
        """float64 [samples]."""
        labels, mask = inputs.get(self.labels), inputs.get(self.mask)
        known = inputs[self.sample_key]
        ones = torch.ones(len(known), dtype=torch.float64, device=known.device)
        if not isinstance(labels, Tensor) and not isinstance(mask, Tensor):
            return ones
        counted = torch.ones((), dtype=torch.float64, device=known.device)
        if isinstance(labels, Tensor):
            counted = (labels[:, self.shift :] if labels.dim() > 1 else labels).ne(self.ignored).double()
        if isinstance(mask, Tensor) and (not isinstance(labels, Tensor) or mask.shape == labels.shape[:2]):
            kept = (mask[:, self.shift :] if mask.dim() > 1 else mask).to(counted)
            counted = counted * kept.reshape(*kept.shape, *[1] * (counted.dim() - kept.dim()))
        each = counted.flatten(1).sum(1) if counted.dim() > 1 else counted
        return each.ne(0).double() if self.samples else each

    def __str__(self) -> str:
        if self.summed:
            return "a sum, no mean"
        what = f"{self.labels} != {self.ignored}" if self.labels else self.mask or "samples"
        told = f"{what}[:, {self.shift}:]" if self.shift else what
        told += f" where {self.mask}" if self.labels and self.mask else ""
        return f"samples with any {told}" if self.samples else told


@dataclass(frozen=True, slots=True)
class Learnt:
    """The rule that explains all losses seen, and others that explain them as well."""

    rule: LossTokens
    rivals: tuple[LossTokens, ...] = ()

    def __call__(self, inputs: Mapping[str, Any]) -> float:
        return self.rule(inputs)


def weigh(
    rule: Callable[[Mapping[str, Any]], Any],
    batch: Mapping[str, Any],
    chunks: Sequence[range],
    inputs: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Every microbatch's share in the loss: its tokens over those of the batch; equal ones if no token counts at all.

    Args:
        chunks: the samples of each microbatch. inputs: what each is given, for a rule of the user's own.

    Raises: PartsError: rules that nothing has told apart yet differ on this batch, or the user's own gives no count.
    """
    if not isinstance(rule, Learnt):
        return _shares(_counts_of(rule, inputs))
    mine, *others = [_shares_by(one, batch, chunks) for one in (rule.rule, *rule.rivals)]
    for other, rival in zip(others, rule.rivals, strict=True):
        if any(abs(a - b) > _FEW for a, b in zip(mine, other, strict=True)):
            raise PartsError(
                f"it is not known of which tokens the loss is the mean: {rule.rule} or {rival} fit the example batch alike, and weigh this batch "
                "differently. Give pipeline() an example batch with ragged labels, or loss_tokens=, a function from inputs to the number of tokens"
                " that the loss is the mean of."
            )
    return mine


def _shares_by(rule: LossTokens, batch: Mapping[str, Any], chunks: Sequence[range]) -> list[float]:
    if rule.summed:
        return [1.0] * len(chunks)
    each = rule.by_sample(batch).tolist()
    return _shares([sum(each[c.start : c.stop]) for c in chunks])


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [n / total for n in counts] if total else [1 / len(counts)] * len(counts)


def _counts_of(rule: Callable[[Mapping[str, Any]], Any], inputs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Counts by a rule of the user's own, with one wait for the device."""
    given = [rule(i) for i in inputs]
    try:
        counts = torch.stack([torch.as_tensor(n, dtype=torch.float64).sum() for n in given]).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PartsError(
            f"loss_tokens gave {given[0]!r} for a microbatch, which is no count. Return a number, or a tensor whose sum is the number."
        ) from error
    if not all(math.isfinite(n) and n >= 0 for n in counts):
        raise PartsError(f"loss_tokens gave the counts {counts}. Return numbers of tokens, none negative.")
    return counts


def entry(key: str) -> Callable[[Mapping[str, Any]], Tensor]:
    """The rule of a user who names an entry of the batch: a mask [samples, positions], or counts [samples]."""

    def count(inputs: Mapping[str, Any]) -> Tensor:
        value = inputs.get(key)
        if not isinstance(value, Tensor):
            raise PartsError(
                f"loss_tokens={key!r} names no tensor of the batch, which has {sorted(inputs)}. Name one, or give a function."
            )
        return value.double().sum()

    return count


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a batch showed: its loss, and those of its halves."""

    parts: list[Mapping[str, Any]]
    whole: float
    losses: list[float]

    def error(self, rule: LossTokens) -> float:
        """Relative error of the loss that a rule foretells from those of the halves."""
        if rule.summed:
            weights = [1.0] * len(self.parts)
        else:
            counts = [rule(p) for p in self.parts]
            if not sum(counts):
                return math.inf
            weights = [n / sum(counts) for n in counts]
        told = sum(
            w * x for w, x in zip(weights, self.losses, strict=True) if w
        )  # the mean of nothing is NaN, and counts nothing
        return abs(told - self.whole) / max(abs(self.whole), 1e-12) if math.isfinite(told) else math.inf


def learn_loss_tokens(
    loss: Loss, halves: Halves, batch: Mapping[str, Any], sample_key: str, fed: set[str], lenient: bool = False,
    dtype: torch.dtype = torch.float32, careful: bool = False, kept: Collection[str] = (),
) -> Learnt:  # fmt: skip
    """The rules by which the loss of a batch is the weighted mean of the losses of its halves, on batches with labels taken out
    and put in, and masks shortened, in such a way that no two rules agree.

    Args:
        loss: loss of inputs, without gradients.
        halves: divides a batch in two.
        fed: inputs of encoders: no labels among them.
        lenient: take the best rule though none is exact: generators have their own means.
        dtype: in which the loss is computed.
        kept: inputs that must stay as they are: placeholders stand in them.
        careful: a label that the model has no use for may not be tried where none is in the batch (on a GPU it ends the process).
    """
    labels, masks = _candidates(batch, len(batch[sample_key]), fed)

    def watched(changes: Mapping[str, Tensor]) -> _Seen | None:
        probe = {**batch, **changes}
        try:
            parts = halves(probe)
            seen = _Seen(parts, loss(probe), [loss(p) for p in parts])
        except Exception:  # labels that a model has no use for may be refused: anything may be raised
            return None
        return seen if math.isfinite(seen.whole) else None

    usable: dict[str, list[int]] = {}
    told: dict[str, list[int]] = {}
    for key in labels:
        present = [i for i in _ignored(batch[key]) if bool((batch[key] == i).any())]
        known = [i for i in _ignored(batch[key]) if i >= 0 or not careful or i in present]
        usable[key] = [
            i for i in known if key not in kept and watched({key: _thinned(batch[key], [i], 0, filled=False)})
        ]
        told[key] = list(dict.fromkeys([*usable[key], *present, *([IGNORED] if careful else [])]))
    shortened = {key: _shortened(batch[key]) for key in masks}
    shortened = {key: mask for key, mask in shortened.items() if watched({key: mask})}
    rules = [
        rule
        for rule in _rules(told, masks, sample_key)
        if not (rule.labels and batch[rule.labels].dim() == 1 and (rule.mask or rule.shift or rule.samples))
    ]
    chosen = {k: values for k, values in usable.items() if values}

    def thinned_at(turn: int, filled: bool, equal: bool = False) -> dict[str, Tensor]:
        return {k: _thinned(batch[k], i, 8 * n + turn, filled, equal) for n, (k, i) in enumerate(chosen.items())}

    best: list[tuple[float, LossTokens]] = []
    seen: list[_Seen] = []
    for filled in (True, False):
        thinned = [thinned_at(turn, filled) for turn in (0, 1)]
        bare = {k: _without_last(x, chosen[k]) for k, x in thinned[0].items()}
        probes = [{**thinned[0], **shortened}, thinned[1], {**bare, **shortened}, shortened, {}]
        now = [s for s in map(watched, probes) if s is not None]
        errors = [(max((s.error(rule) for s in now), default=math.inf), rule) for rule in rules]
        if not best or min(e for e, _ in errors) < min(e for e, _ in best):
            best, seen = errors, now
        if any(_explains(rule, e, seen, dtype) for e, rule in best):
            break
    error = min((e for e, _ in best), default=math.inf)
    explained = [(e, rule) for e, rule in best if _explains(rule, e, seen, dtype)]
    if not explained and not lenient:
        # a sum of several means, say: right as long as all samples have equally many labels, which the rivals see to
        equal = [s for s in map(watched, [thinned_at(0, True, True), thinned_at(1, True, True), {}]) if s is not None]
        errors = [(max((s.error(rule) for s in equal), default=math.inf), rule) for rule in rules]
        marked = {
            k for k, values in usable.items() if any(i < 0 for i in values)
        }  # then no other value marks what is left out
        alike = [
            rule
            for e, rule in errors
            if e <= _ROUNDING.get(dtype, _HALF)
            and (not marked or not rule.labels or (rule.labels in marked and rule.ignored < 0))
        ]
        if len(alike) > 1 and len(equal) > 1:
            return Learnt(alike[0], tuple(alike[1:]))
    if not explained and not (lenient and math.isfinite(error)):
        raise PartsError(_no_rule(seen[-1] if seen else None, labels, error))
    if not explained:
        return Learnt(next(rule for e, rule in best if e == error))
    if min(e for e, _ in explained) > _ROUNDING.get(dtype, _HALF):
        warnings.warn(
            f"the loss of the example batch is the mean over tokens ({explained[0][1]}) of those of its halves only up to {error:.0e}: samples have "
            "to do with one another (auxiliary losses?), which a pipeline takes within microbatches",
            stacklevel=6,
        )
    left = _left(explained, dtype)
    for turn in range(2, 5):  # what is still not told apart may be by other places
        if len(left) > 1 and (more := watched({**thinned_at(turn, True), **shortened})):
            left = _left([(max(e, more.error(rule)), rule) for e, rule in left], dtype) or left
    return Learnt(left[0][1], tuple(rule for _, rule in left[1:]))


def _explains(rule: LossTokens, error: float, seen: Sequence[_Seen], dtype: torch.dtype) -> bool:
    """Is a rule right but for rounding, or for what samples have to do with one another?

    Losses of a model not trained yet are nearly the same for all tokens, so a wrong weight shows only beside how much the halves differ.
    """
    if error <= _ROUNDING.get(dtype, _HALF):
        return True
    spreads = [
        abs(a - b) for s in seen if len(s.losses) == 2 and math.isfinite((a := s.losses[0]) - (b := s.losses[1]))
    ]
    wrong = math.sqrt(sum((s.error(rule) * s.whole) ** 2 for s in seen))
    return error < _ACCEPTED and wrong <= _SHARE * math.sqrt(sum(d * d for d in spreads))


def _left(rules: Sequence[tuple[float, LossTokens]], dtype: torch.dtype) -> list[tuple[float, LossTokens]]:
    """Those that explain the losses as well as the best one, up to rounding."""
    least = min(e for e, _ in rules)
    limit = min(max(3 * least, _ROUNDING.get(dtype, _HALF)), _ACCEPTED)
    return [(e, rule) for e, rule in rules if e <= limit]


def _no_rule(seen: _Seen | None, labels: Sequence[str], error: float) -> str:
    told = f"{seen.whole:.6g}" if seen else "nan"
    return (
        f"the loss {told} is not the mean over tokens of the losses of the batch's halves, {seen.losses if seen else []}, by any count of labels in "
        f"{list(labels) or 'the batch'}: {error:.1e} off at best. Switch off losses that mix samples (auxiliary losses, contrast), or "
        "pass loss_tokens=, a function from inputs to the number of tokens that the loss is the mean of."
    )


def fits(loss: Loss, halves: Halves, batch: Mapping[str, Any], rule: Callable[[Mapping[str, Any]], Any]) -> bool:
    """Is the loss of a batch the mean of those of its halves by a rule of the user's own?"""
    parts = halves(batch)
    weights = _shares(_counts_of(rule, parts))
    whole, told = loss(batch), sum(w * loss(p) for w, p in zip(weights, parts, strict=True) if w)
    return abs(told - whole) <= _ACCEPTED * max(abs(whole), 1e-12)


def _candidates(batch: Mapping[str, Any], samples: int, fed: set[str]) -> tuple[list[str], list[str]]:
    """(inputs that may be labels, inputs that may be masks)."""
    own = {k: v for k, v in batch.items() if k not in fed and isinstance(v, Tensor) and v.dim() and len(v) == samples}
    masks = [k for k, v in own.items() if v.dim() == 2 and bool(((v == 0) | (v == 1)).all())]
    integers = [k for k, v in own.items() if not v.dtype.is_floating_point and not v.dtype.is_complex]
    labels = [k for k in integers if k not in masks and own[k].dtype != torch.bool]
    shapes = {own[k].shape[:2] for k in labels if own[k].dim() > 1}
    return labels, [k for k in masks if not shapes or own[k].shape in shapes]


def _ignored(labels: Tensor) -> list[int]:
    """Values that may stand for no label: torch's, other negative ones, what fills rows up, and zero."""
    found = [IGNORED, *(int(v) for v in labels[labels < 0].unique()), -1]
    if labels.dim() > 1 and labels.shape[1] > 2:
        ends = labels.flatten(2)[..., 0] if labels.dim() > 2 else labels
        found += ends[:, -1][ends[:, -1] == ends[:, -2]].unique().tolist()[:2]
    return list(dict.fromkeys([*found, 0]))


def _rules(labels: Mapping[str, Sequence[int]], masks: Sequence[str], sample_key: str) -> Iterator[LossTokens]:
    values = [(key, ignored) for key, several in labels.items() for ignored in several]
    for key, ignored in values:
        for mask in ("", *masks):
            for shift in (1, 0):
                yield LossTokens(key, shift, ignored, mask, sample_key)
    for mask in masks:
        for shift in (1, 0):
            yield LossTokens("", shift, mask=mask, sample_key=sample_key)
    yield LossTokens(sample_key=sample_key)
    for key, ignored in values:
        for shift in (1, 0):
            yield LossTokens(key, shift, ignored, sample_key=sample_key, samples=True)
    yield LossTokens(sample_key=sample_key, summed=True)


def _thinned(labels: Tensor, ignored: Sequence[int], seed: int, filled: bool, equal: bool = False) -> Tensor:
    """Labels of which the samples of the first half keep most and the others few, at places drawn anew for every seed; the first
    place, which a shift leaves out, only in the first half.

    Args:
        ignored: what stands for no label, one or the other by chance.
        filled: labels are put where none were, too, so that rules differ even where hardly any place has one.
        equal: at the same places in all samples, so that most rules agree.
    """
    source = torch.Generator().manual_seed(seed)
    here = labels.detach().cpu()
    counts = ~torch.isin(here, torch.tensor(ignored, dtype=here.dtype))
    known = here[counts & (here >= 0)]
    if filled and known.numel():
        drawn = known[torch.randint(len(known), here.shape, generator=source)]
        here, counts = torch.where(counts, here, drawn), torch.ones_like(counts)
    places = counts.flatten(2).any(2) if counts.dim() > 2 else counts  # codebooks of one place go together
    half = len(here) - len(here) // 2
    chance = torch.full((len(here), *[1] * (places.dim() - 1)), 0.75)
    chance[half:] = 0.35
    kept = torch.rand(places.shape, generator=source) < chance
    if places.dim() > 1:
        kept[:half, 0], kept[half:, 0] = True, False
        for sample, one in enumerate(places):  # one that a shift does not leave out stays in every sample
            found = one[1:].nonzero().flatten() + 1
            if len(found):
                kept[sample, found[int(torch.randint(len(found), (), generator=source))]] = True
    else:
        kept[0] = kept[half:][:1] = True
    none = torch.tensor(ignored, dtype=here.dtype)[torch.randint(len(ignored), kept.shape, generator=source)]
    if equal:
        kept, none = (x[:1].expand_as(x) for x in (kept, none))
    kept, none = (x.reshape(*x.shape, *[1] * (here.dim() - x.dim())) for x in (kept, none))
    return torch.where(kept & counts, here, none).to(labels.device)


def _without_last(labels: Tensor, ignored: Sequence[int]) -> Tensor:
    """The same, with no label in the last sample; with one left in every half."""
    if len(labels) < 4:
        return labels
    bare = labels.clone()
    bare[-1] = ignored[0]
    return bare


def _shortened(mask: Tensor) -> Tensor:
    """The last positions are padding: one in every sample, a quarter of them in the second half, and one more in some."""
    short = mask.clone()
    length, half = mask.shape[1], len(mask) - len(mask) // 2
    short[:, -1:] = 0
    short[half:, length - max(length // 4, 2) :] = 0
    short[::3, length - max(length // 3, 2) :] = 0
    return short
