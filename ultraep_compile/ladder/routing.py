"""Who sends which token to which expert, read off the values of a recorded forward.

An expert's input holds rows; each row is a token's, or scaled, or empty. The output of the layer is, token by token, a
weighted sum of what the experts made of that token's rows. Both facts are measured here; then `sources` looks for recorded tensors that say
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ultraep_compile.ladder.regions import Parts, places, row_count
from ultraep_compile.passes.lift.nodes import op_name
from ultraep_compile.passes.lift.rules.products import PRODUCTS
from ultraep_compile.passes.lift.values import Refusal

if TYPE_CHECKING:
    from ultraep_compile.ladder.recording import Recording
    from ultraep_compile.ladder.together import Ranks

_MOST_OUTPUTS = 8
"""Tensors to try as the sum of the experts' outputs."""
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


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

    def shared(self) -> bool:
        """Do all experts read the same rows? Then they are heads of one state, where those rows are not the tokens."""
        first, *others = (self.inputs[self.expert == e] for e in self.expert.unique())
        return all(torch.equal(first, other) for other in others)

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
    base: fx.Node | None = None
    """What the experts' outputs were added to, where it is not zero."""

    @property
    def sent(self) -> Tensor:
        return self.before != 0


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
            whole, base = recording.values[output], _base(recording, parts, output)
            whole = whole if base is None else whole - recording.values[base]
            factors = _factors(whole, slots, first, table_like, experts, skipped)
            if factors is not None:
                after, skip = factors
                used = torch.where(after.abs() > 1e-9, sent, torch.zeros_like(sent))
                choices = int((used != 0).sum(1).max())
                found.append(Routing(table, output, table_like, choices, used, after, owner, skip, base))
        if found and skipped is None and all(f.output is outputs[-1] for f in found):
            break  # the last one: nothing is added behind it
    if not found:
        raise Refusal(
            f"no tensor of one row per token is a weighted sum of the experts' outputs (tried {len(outputs)}); expected a sum "
            "over the experts"
        )
    # What comes behind the sum is computed as the forward does it: tokens picked for choices that no expert serves break graphs.
    return sorted(found, key=lambda f: -outputs.index(f.output))


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
    if slots.fixed and slots.mixed and not slots.shared():
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
    tolerance = CLOSE.get(slots.inputs.dtype, 1e-4)
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
            if bool(value.isfinite().all()):
                yield node


_ADDING = frozenset({"index_add", "scatter_add", "scatter_reduce", "index_put", "add", "iadd", "setitem"})


def _base(recording: Recording, parts: Parts, output: fx.Node) -> fx.Node | None:
    """What results were added to one after the other, if it is not zero: another layer's output, or the tokens themselves."""
    node = output
    while parts.label[node] and op_name(node) in _ADDING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value = recording.values.get(node)
    if node is output or parts.label[node] or value is None or value.shape != recording.values[output].shape:
        return None
    return node if bool((value != 0).any()) else None


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
    allowed = 10 * CLOSE.get(output.dtype, 1e-4) * float(target.norm(dim=1).mean().clamp_min(1e-30))
    for token in range(tokens):
        mine = (owner == token).nonzero().flatten()
        basis = made[mine] if skipped is None else torch.cat([made[mine], skipped[token, None].double()])
        if len(basis) > made.shape[1]:
            raise Refusal(f"a token goes to {len(mine)} experts whose outputs have {made.shape[1]} numbers: weights cannot be told")
        found = torch.zeros(len(basis), dtype=torch.float64)
        if len(basis):
            found = torch.linalg.lstsq(basis.T, target[token, :, None], driver="gelsd").solution.flatten()
        if not float((basis.T @ found - target[token]).norm()) <= allowed:
            return None
        found = torch.where(found.abs() < 1e-5, torch.zeros_like(found), found)
        after[token, slots.expert[mine]] = found[: len(mine)]
        if skip is not None:
            skip[token] = found[-1]
    return after, skip


_CHOICES = frozenset({"topk", "argmax", "sort", "argsort", "max", "multinomial", "gumbel_softmax"})


def _is_chosen_from(recording: Recording, output: fx.Node) -> bool:
    """Are the numbers of a row weighed against each other, and places of the best taken? Then they are scores, made by a router."""
    width = recording.raw[output].shape[-1]
    todo, seen = [output], set[fx.Node]()
    while todo:
        node = todo.pop()
        if op_name(node) in _CHOICES and node is not output:
            return True
        value = recording.raw.get(node)
        if node in seen or value is None or not value.dim() or value.shape[-1] != width:
            continue
        seen.add(node)
        todo += [u for u in node.users if op_name(u) not in PRODUCTS]
    return False


def judge(recording: Recording, routing: Routing) -> None:
    """Raise `Unbalanceable` where no planning can help."""
    if _is_chosen_from(recording, routing.output):
        raise Refusal("what they make are scores, among which a router chooses")
    weights = routing.after * routing.before
    dense = bool((weights != 0).all())
    if dense and float((weights - weights.mean(0)).abs().max()) < 1e-6 * float(weights.abs().max()):
        raise Refusal("the weights of the experts do not depend on the token: an ensemble, not a routed layer")
    if dense:
        raise Unbalanceable("every expert computes every token: the loads are equal by construction, there is nothing to balance")
