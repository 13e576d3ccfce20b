"""Who sends which token to which expert, read off the values of a recorded forward.

An expert's input holds rows; each row is a token's, or scaled, or empty. The output of the layer is, token by token, a
weighted sum of what the experts made of that token's rows. Both facts are measured here; then the recorded tensors are
searched for those that say the same: expert ids [T, K] and routing weights [T, K], or weights [T, E].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ultraep_compile.ladder.regions import Parts, places, row_count
from ultraep_compile.passes.lift.values import Refusal

if TYPE_CHECKING:
    from ultraep_compile.ladder.recording import Recording
    from ultraep_compile.ladder.together import Ranks

_MOST_OUTPUTS = 8
"""Tensors to try as the sum of the experts' outputs."""
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Unbalanceable(Refusal):
    """A MoE layer whose experts have equal loads by construction, or that computes every expert for every token."""


class Missed(Refusal):
    """A MoE layer beyond doubt (rows follow the routing) that is not lifted."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Rows of the experts' inputs and outputs, all experts one after the other, on all ranks that share them."""

    inputs: Tensor
    """[S, D_in]"""
    outputs: Tensor
    """[S, D_out]"""
    expert: Tensor
    """[S]"""
    inner: Tensor | None
    """[S]: routing weights read inside the experts."""
    fixed: bool
    """Every expert has equally many rows, whatever the routing."""
    mixed: bool
    """A row depends on several tokens."""

    def of_all(self, ranks: Ranks, here: int) -> Slots:
        """With those of the other ranks; each has `here` experts, and they are numbered by rank."""
        if ranks.size == 1:
            return self
        device = self.inputs.device
        parts = [self.inputs, self.outputs, self.expert + ranks.rank * here, *([] if self.inner is None else [self.inner])]
        every = [[p.to(device) for p in theirs] for theirs in ranks.every([p.detach().cpu() for p in parts])]
        whole = [torch.cat(same) for same in zip(*every, strict=True)]
        fixed = all(ranks.every(self.fixed)) and len(set(ranks.every(len(self.inputs)))) == 1
        return Slots(whole[0], whole[1], whole[2], whole[3] if self.inner is not None else None, fixed, self.mixed)


@dataclass(frozen=True, slots=True)
class Routing:
    """Measured: which token each slot holds, and how slots add up to the output."""

    table: fx.Node
    """The tokens [..., D_in]."""
    output: fx.Node
    """The sum [..., D_out]."""
    tokens: int
    choices: int
    before: Tensor
    """[T, E]: factor on the token's row before the expert; 0 where it is not sent there."""
    after: Tensor
    """[T, E]: factor on the expert's output."""
    owner: Tensor
    """[S]: token of each slot, -1 for an empty one."""
    skip: Tensor | None
    """[T]: factor with which a token itself is in the output, beside its experts; None where it is not."""

    @property
    def sent(self) -> Tensor:
        return self.before != 0


@dataclass(frozen=True, slots=True)
class Sources:
    """Recorded tensors that say where tokens go and with what weight."""

    ids: fx.Node | None
    ids_form: str
    weight: fx.Node | None
    weight_form: str
    """`pairs` [T, K], `experts` [T, E], `slots` [T, E, C] or `one` (no tensor, weight 1)."""
    factor: float
    choices: int
    """K."""
    masked: bool
    """Ids hold pairs that are not sent: their weight is 0."""


def measure(
    recording: Recording, parts: Parts, table_like: int, slots: Slots, experts: int, ranks: Ranks
) -> list[Routing]:
    """Find the token table, the output, and the factors between; several ways where several tensors are such sums.

    Args:
        table_like: number of tokens.
        ranks: measured is where this rank's tokens go and come from; that all ranks found the same tensors is made sure.
    """
    table, owner, before = _token_of_slot(recording, parts, table_like, slots, ranks)
    found = ranks.agreed(lambda: _sums(recording, parts, table_like, slots, experts, table, owner, before))
    if ranks.size == 1:
        return found
    where = places(recording, parts)
    common = set.intersection(*ranks.every({(where[f.output], f.skip is None) for f in found}))
    found = [f for f in found if (where[f.output], f.skip is None) in common]
    choices = [max(column) for column in zip(*ranks.every([f.choices for f in found]), strict=True)]
    if not found:
        raise Refusal("the ranks find the sum of the experts' outputs in different tensors")
    return [dataclasses.replace(f, choices=most) for f, most in zip(found, choices, strict=True)]


def _sums(
    recording: Recording, parts: Parts, table_like: int, slots: Slots, experts: int, table: fx.Node, owner: Tensor, before: Tensor
) -> list[Routing]:
    """Tensors that are weighted sums of the experts' outputs."""
    sent = torch.zeros(table_like, experts, dtype=torch.float64)
    full = owner >= 0
    sent[owner[full], slots.expert[full]] = before[full]
    first = _first_of_pairs(owner, slots.expert, experts)
    rows = recording.values[table].reshape(table_like, -1)
    outputs = list(_outputs(recording, parts, table_like, slots.outputs.shape[1]))[-_MOST_OUTPUTS:]
    # Tokens may also pass by the experts, weighted: choices that no expert serves.
    skips = (None, rows) if rows.shape[1] == slots.outputs.shape[1] else (None,)
    found = []
    for skipped in skips:
        for output in reversed(outputs):
            factors = _factors(recording.values[output], slots, first, table_like, experts, skipped)
            if factors is not None:
                after, skip = factors
                used = torch.where(after.abs() > 1e-9, sent, torch.zeros_like(sent))
                choices = int((used != 0).sum(1).max())
                found.append(Routing(table, output, table_like, choices, used, after, owner, skip))
        if found and skipped is None and all(f.output is outputs[-1] for f in found):
            break  # the last one: nothing is added behind it
    if not found:
        raise Refusal(
            f"no tensor of one row per token is a weighted sum of the experts' outputs (tried {len(outputs)}); expected a sum "
            "over the experts"
        )
    return found


def _token_of_slot(
    recording: Recording, parts: Parts, tokens: int, slots: Slots, ranks: Ranks
) -> tuple[fx.Node, Tensor, Tensor]:
    """(token table, this rank's token of each slot or -1, factor): every row of the experts' inputs is a multiple of a token's."""
    live = slots.inputs.double().norm(dim=1) > 0
    if not bool(live.any()):
        raise Refusal("the experts read zeros only")
    best = 0.0
    if ranks.size == 1:
        for node, is_token, owner, factor in _tables(recording, parts, tokens, slots, live):
            best = max(best, float(is_token.double().mean()))
            if bool(is_token.all()):
                return node, owner, factor
    else:  # a row comes from any rank's table
        where = places(recording, parts)
        mine = {where[n]: (n, is_token, owner, factor) for n, is_token, owner, factor in _tables(recording, parts, tokens, slots, live)}
        every = ranks.every({place: found[1].cpu() for place, found in mine.items()})
        for place in mine:
            if all(place in theirs for theirs in every):
                covered = torch.stack([theirs[place] for theirs in every]).any(0)
                best = max(best, float(covered.double().mean()))
                if bool(covered.all()):
                    node, _, owner, factor = mine[place]
                    return node, owner, factor
    if slots.fixed and slots.mixed:
        raise Unbalanceable(
            "its experts read rows that mix several tokens, and each expert gets equally many whatever the routing: the loads are "
            "equal by construction, there is nothing to balance"
        )
    raise Refusal(f"the rows that experts read are not rows of tokens (at best {best:.0%} of them are)")


def _tables(
    recording: Recording, parts: Parts, tokens: int, slots: Slots, live: Tensor
) -> Iterator[tuple[fx.Node, Tensor, Tensor, Tensor]]:
    """Tensors that may hold the tokens: which live slots have a row of theirs, of which token [S] (-1: none), times what [S]."""
    rows = slots.inputs.double()
    size = rows.norm(dim=1)
    unit = rows[live] / size[live, None]
    tolerance = _CLOSE.get(slots.inputs.dtype, 1e-4)
    for node in recording.graph.nodes:
        value = recording.values.get(node)
        if value is None or parts.label[node] or node.op == "get_attr" or not value.is_floating_point() or value.dim() < 2:
            continue
        if value.shape[-1] != rows.shape[1] or row_count(value) != tokens:
            continue
        table = value.reshape(tokens, -1).double()
        length = table.norm(dim=1)
        match = unit @ (table / length.clamp_min(1e-30)[:, None]).T
        cosine, token = match.max(1)
        is_token = cosine > 1 - tolerance
        owner = torch.full((len(rows),), -1, dtype=torch.int64)
        owner[live] = torch.where(is_token, token, -1)
        factor = torch.zeros(len(rows), dtype=torch.float64)
        factor[live] = torch.where(is_token, size[live] / length[token], 0)
        near_one = (factor - 1).abs() < tolerance
        yield node, is_token, owner, torch.where(near_one, torch.ones_like(factor), factor)


def _outputs(recording: Recording, parts: Parts, tokens: int, width: int) -> Iterator[fx.Node]:
    """Tensors of one row per token that depend on all experts that ran, nearest first."""
    for node in recording.graph.nodes:
        value = recording.values.get(node)
        if value is None or parts.label[node] != parts.present or node in parts.views:
            continue
        if value.dim() >= 2 and value.shape[-1] == width and row_count(value) == tokens and value.is_floating_point():
            yield node


def _first_of_pairs(owner: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Owner of each slot, -1 for an empty one and for the second time that an expert has a token."""
    pairs = torch.where(owner >= 0, owner * experts + expert, -1 - torch.arange(len(owner)))
    _, group = pairs.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(pairs)).scatter_reduce(0, group, torch.arange(len(pairs)), "amin")
    is_first = torch.zeros(len(pairs), dtype=torch.bool)
    is_first[first] = True
    return torch.where(is_first, owner, -1)


def _factors(
    output: Tensor, slots: Slots, owner: Tensor, tokens: int, experts: int, skipped: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """[T, E] so that output[t] = sum over e of factor[t, e] * (what e made of t), plus a multiple of `skipped[t]`, or None."""
    target = output.reshape(tokens, -1).double()
    made = slots.outputs.double()
    after = torch.zeros(tokens, experts, dtype=torch.float64)
    skip = None if skipped is None else torch.zeros(tokens, dtype=torch.float64)
    allowed = 10 * _CLOSE.get(output.dtype, 1e-4) * float(target.norm(dim=1).mean().clamp_min(1e-30))
    for token in range(tokens):
        mine = (owner == token).nonzero().flatten()
        basis = made[mine] if skipped is None else torch.cat([made[mine], skipped[token, None].double()])
        if len(basis) > made.shape[1]:
            raise Refusal(f"a token goes to {len(mine)} experts whose outputs have {made.shape[1]} numbers: weights cannot be told")
        found = torch.zeros(len(basis), dtype=torch.float64)
        if len(basis):
            found = torch.linalg.lstsq(basis.T, target[token, :, None], driver="gelsd").solution.flatten()
        if float((basis.T @ found - target[token]).norm()) > allowed:
            return None
        found = torch.where(found.abs() < 1e-5, torch.zeros_like(found), found)
        after[token, slots.expert[mine]] = found[: len(mine)]
        if skip is not None:
            skip[token] = found[-1]
    return after, skip


# ---- which recorded tensors say so ----------------------------------------------------------------------------------


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
            if masked and not shows and weight_form == "pairs":
                if bool((recording.values[weight].reshape(ids.shape)[~live] != 0).any()):
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


_FORMS = ("pairs", "beyond", "sizes", "one-hot")
"""Of ids: [T, K]; the same with choices that are no expert; rows of each expert [E], the rows standing in that order;
one-hot [T, K, E].
"""


def _ids(recording: Recording, parts: Parts, routing: Routing, experts: int) -> Iterator[tuple[fx.Node, str, Tensor]]:
    tokens, pairs = routing.tokens, routing.sent
    for node in reversed(list(recording.graph.nodes)):
        value = recording.values.get(node)
        if value is None or parts.label[node] or value.dim() == 0 or value.numel() == 0:
            continue
        if value.is_floating_point() or (value.numel() % tokens and tuple(value.shape) != (experts,)):
            continue
        for form, ids in _as_ids(value, tokens, experts):
            if bool((ids < 0).any()) or (form != "pairs" and bool((ids >= experts).any())):
                continue
            beyond = ids >= experts  # a choice that no expert serves: skip, zero or shared
            if bool(beyond.any()):
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
        if value.numel() % tokens or value.dim() == 0 or value.numel() == 0:
            continue
        tolerance = 10 * _CLOSE.get(value.dtype, 1e-4)
        if pairs is not None and value.numel() == pairs.ids.numel() and _leads(value, tokens):
            if (factor := pairs.factor_of(value, tolerance)) is not None:
                yield node, "pairs", factor
        if pairs is not None and not pairs.distinct:
            continue
        if value.numel() == tokens * experts and value.shape[-1] == experts and _leads(value, tokens):
            whole = value.reshape(tokens, experts).double()
            if pairs is not None:
                ids_values = whole[dense != 0]
                if (factor := _ratio(ids_values, dense[dense != 0], tolerance)) is not None:
                    yield node, "experts", factor
            elif (factor := _ratio(whole, dense, tolerance)) is not None:
                yield node, "experts", factor
        if pairs is None and value.dim() >= 3 and value.shape[-2] == experts and _leads(value.flatten(-2), tokens):
            if (factor := _ratio(value.sum(-1).reshape(tokens, experts), dense, tolerance)) is not None:
                yield node, "slots", factor


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


def judge(routing: Routing) -> None:
    """Raise `Unbalanceable` where no planning can help."""
    weights = routing.after * routing.before
    dense = bool((weights != 0).all())
    if dense and float((weights - weights.mean(0)).abs().max()) < 1e-6 * float(weights.abs().max()):
        raise Refusal("the weights of the experts do not depend on the token: an ensemble, not a routed layer")
    if dense:
        raise Unbalanceable("every expert computes every token: the loads are equal by construction, there is nothing to balance")
