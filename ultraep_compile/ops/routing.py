"""From the router's choice to physical experts: `expert_load`, `plan`, `reroute`. Integers only, no gradients."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultraep_compile.errors import RoutingError
from ultraep_compile.exchange import at, here
from ultraep_compile.ops import watch
from ultraep_compile.ops.agreement import RUNS, common
from ultraep_compile.ops.late_checks import check_later
from ultraep_compile.ops.layout import ExpertLayout, ordinal_in_group, physical_to_logical
from ultraep_compile.ops.looked_at import look
from ultraep_compile.ops.padding import real_among
from ultraep_compile.ops.transport import (
    CollectiveTransport,
    SymmetricTransport,
    Transport,
    deadline_of,
    transport_for,
)
from ultraep_compile.planner import Plan, make_plan


@torch.library.custom_op(
    "ultraep::expert_load",
    mutates_args=(),
    schema="(Tensor ids, Tensor? scores, SymInt experts, SymInt ranks, str group, str site, Tensor[]? seen=None) -> Tensor",
)
def expert_load(
    ids: Tensor,
    scores: Tensor | None,
    experts: int,
    ranks: int,
    group: str,
    site: str,
    seen: Sequence[Tensor] | None = None,
) -> Tensor:
    """Tokens of every source rank for every expert, int32 [R, E], identical on all ranks.

    Args:
        ids: integer [T, K], the router's choice.
        scores: the router's raw scores [T, >= E] or None; only looked at for NaN and infinity.
        site: name of the layer for messages and traces.
        seen: what the layer is given, for the watch.
    Raises: RoutingError for ids outside 0..E-1 and for scores that are not finite, on all ranks: what a rank finds travels
        with its counts, so that none is left waiting for another. On a GPU with symmetric memory at the layer's next call
        (see `late_checks`).
    """
    started = time.perf_counter()
    if not watch.in_backward():
        look(site, seen)
    transport = transport_for(ranks, group)
    scores = _to_be_judged(scores, ids)
    with at(layer_name(site), "recomputation" if watch.in_backward() else "forward"):
        if isinstance(transport, SymmetricTransport) and ids.is_cuda:
            from ultraep_compile.codegen.count_kernels import expert_counts

            check_later(ids, scores, experts, layer_name(site))
            counts = transport.exchange_row(expert_counts(ids, experts), layer_name(site))
        else:
            counts = _checked_counts(ids, scores, experts, transport, group, site)
    watch.add_time(site, "load", started)
    return counts


def _checked_counts(
    ids: Tensor, scores: Tensor | None, experts: int, transport: Transport | SymmetricTransport, group: str, site: str
) -> Tensor:
    if isinstance(transport, CollectiveTransport):
        transport.line.settle()  # before the host waits for what the device waits for
    fault = _score_fault(scores) or _id_fault(ids, experts)
    if fault is not None and not group:
        raise RoutingError(f"{layer_name(site)}: {fault.text(experts)}")
    hosted = len(transport.hosted)
    counts = ids.new_zeros(hosted, experts, dtype=torch.int32)
    if fault is None:
        source = transport.source_of_token(ids.shape[0], ids.device) - transport.hosted.start
        cell = source.unsqueeze(1) * experts + ids.to(torch.int64)
        counts = torch.bincount(cell.flatten(), minlength=hosted * experts).view(hosted, experts).to(torch.int32)
    if not group:
        return transport.gather_counts(counts)
    fields = _agreed.get(site) or {}
    facts = {RUNS: f"the {here().phase} of layer {layer_name(site)}", **fields}
    found = say_and_do(transport, facts, layer_name(site), fault, counts[0])
    _raise_faults([numbers[experts:-1] for numbers in found.tolist()], experts, site)
    return found[:, :experts].contiguous()


_agreed: dict[str, dict[str, str]] = {}


def must_agree(site: str, **fields: object) -> None:
    """What all ranks of a group must have alike at this layer; compared whenever they exchange counts."""
    _agreed[site] = {name: str(value) for name, value in fields.items()}


def say_and_do(
    transport: Transport, facts: dict[str, str], where: str, fault: Fault | None = None, counts_E: Tensor | None = None
) -> Tensor:
    """Every exchange of a group begins here: all ranks' counts [E] and faults, int32 [R, E + 6], and the last of the 6 numbers
    is the same on all.

    However different what ranks are about to do, they send equally many numbers: as many as the widest layer has that they
    have agreed on.
    Raises: TopologyError on every rank where they do different things (`facts`).
    """
    assert isinstance(transport, CollectiveTransport)
    shared = common(transport.group)
    doing = repr(facts)
    header = [*(fault or Fault()).packed(), shared.word(doing)]
    width = 0 if counts_E is None else counts_E.shape[0]
    device = _device_of(transport) if counts_E is None else counts_E.device
    row = torch.zeros(max(shared.widest, width) + len(header), dtype=torch.int32, device=device)
    row[-len(header) :] = torch.tensor(header, dtype=torch.int32)
    if counts_E is not None:
        row[:width] = counts_E
    shared.went_to(doing)
    found = transport.exchange_row(row, where)
    if len(set(found[:, -1].tolist())) > 1:
        shared.disagree(facts, where, deadline_of(transport.group.group_name))
    return torch.cat([found[:, :width], found[:, -len(header) :]], 1)


def begin_backward(transport: Transport, what: str, where: str, on_gpu: bool) -> None:
    """Before the exchanges of a backward, which carry no word: look whether all ranks have come to it, wherever this rank has not
    come to it from the same place before. So a rank that has more layers or calls than others is found out in the first step.

    Raises: TopologyError on every rank. On GPUs with symmetric memory nothing is compared: the host would have to wait.
    """
    if not isinstance(transport, CollectiveTransport) or (on_gpu and isinstance(transport, SymmetricTransport)):
        return
    shared, facts = common(transport.group), {RUNS: f"the backward of {what}"}
    if shared.comes_anew_to(repr(facts)) and not (on_gpu and torch.cuda.is_current_stream_capturing()):
        say_and_do(transport, facts, where)


def _device_of(transport: CollectiveTransport) -> torch.device:
    if transport.line.uses_nccl:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@expert_load.register_fake
def _(ids, scores, experts, ranks, group, site, seen=None) -> Tensor:
    return ids.new_empty(ranks, experts, dtype=torch.int32)


def layer_name(site: str) -> str:
    """The module's name in a site key `name@digest`."""
    return site.rpartition("@")[0] or site


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing wrong with a rank's routing."""

    kind: int = 0
    """0: nothing; 1: a score that is not finite; 2: an id out of range; 3: more experts than choices (see `TOO_MANY`); 4: an
    expert named twice (see `REPEATED`)."""
    token: int = 0
    column: int = 0
    """Expert of a score, choice of an id; of kind 3, the number of choices."""
    value: float = 0
    """The score, the id; of kind 3, how many experts the token has weights for."""

    def packed(self) -> list[int]:
        """As int32 numbers: ids do not always fit one, nor all scores a float of that size."""
        return [self.kind, self.token, self.column, *struct.unpack("<2i", struct.pack("<d", self.value))]

    @classmethod
    def unpacked(cls, numbers: list[int]) -> Fault:
        kind, token, column, *bits = numbers
        (value,) = struct.unpack("<d", struct.pack("<2i", *bits))
        return cls(kind, token, column, value)

    def text(self, experts: int) -> str:
        if self.kind == 1:
            return (
                f"the router's score of token {self.token} for expert {self.column} is {self.value}. No expert can be chosen by "
                "such a score; look for an overflow before this layer (learning rate, loss scale, a bad batch) and skip or "
                "repair the step."
            )
        if self.kind == 3:
            return (
                f"token {self.token} has weights for {int(self.value)} experts, but no token had more than {self.column} when the "
                "model was prepared. Call ultraep_compile.prepare again with a batch that shows it."
            )
        if self.kind == 4:
            return (
                f"token {self.token} names expert {int(self.value)} more than once (again in choice {self.column}), and this layer's own "
                "forward keeps one of both results (as `y[rows] += ...` does, which one is not defined), with gradients of both. Add "
                "results with index_add_, which sums them, or give ids that are distinct for each token."
            )
        return (
            f"token {self.token}, choice {self.column} is routed to expert {int(self.value)}, but this layer has experts "
            f"0..{experts - 1}. Correct the router (or the table of expert ids) that produced it."
        )


def _to_be_judged(scores: Tensor | None, ids: Tensor) -> Tensor | None:
    """Scores of padding are as good as any; those that are computed again in backward were judged in forward."""
    if scores is None or watch.in_backward():
        return None
    real = real_among(ids.shape[0], scores.device)
    rows = scores.flatten(0, -2)
    return rows if real is None else rows.masked_fill(~real.unsqueeze(1), 0.0)


def _score_fault(scores: Tensor | None) -> Fault | None:
    if scores is None or bool(torch.isfinite(scores).all()):
        return None
    rows = scores.flatten(0, -2)
    token, column = torch.nonzero(~torch.isfinite(rows))[0].tolist()
    return Fault(1, token, column, rows[token, column].item())


TOO_MANY = -(1 << 30)
"""What an id is counted down from where a token has weights for more experts than it has choices."""


REPEATED = -(1 << 29)
"""What an id is counted down from where a token names an expert a second time and that has no meaning."""


def _id_fault(ids: Tensor, experts: int) -> Fault | None:
    if ids.numel() == 0:
        return None
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < experts:
        return None
    token, choice = torch.nonzero((ids < 0) | (ids >= experts))[0].tolist()
    if TOO_MANY - experts <= int(ids[token, choice]) < TOO_MANY:
        return Fault(3, token, ids.shape[1], TOO_MANY - int(ids[token, choice]))
    if REPEATED - experts < int(ids[token, choice]) <= REPEATED:
        return Fault(4, token, choice, REPEATED - int(ids[token, choice]))
    return Fault(2, token, choice, ids[token, choice].item())


def _raise_faults(reports: list[list[int]], experts: int, site: str) -> None:
    """The same error on all ranks, if any of them has one."""
    found = {rank: Fault.unpacked(numbers) for rank, numbers in enumerate(reports) if numbers[0]}
    if found:
        rank, fault = next(iter(found.items()))
        others = f" (and on ranks {', '.join(map(str, list(found)[1:]))})" if len(found) > 1 else ""
        raise RoutingError(f"{layer_name(site)}: on rank {rank}{others}, {fault.text(experts)}")


@torch.library.custom_op("ultraep::plan", mutates_args=())
def plan(
    counts_RE: Tensor, redundant_experts: int, planner: str, site: str, least: int = 0
) -> tuple[Tensor, Tensor]:
    """Placement and exact shares for these loads: slot_expert_RS int32 [R, S], shares_RP int32 [R, P].

    See `ultraep_compile.planner.make_plan`. Every rank computes the same plan from the same counts. Where all ranks
    together have fewer than `least` routed pairs, nothing is copied.
    """
    started = time.perf_counter()
    made = _plan_if_worth(counts_RE, redundant_experts, planner, least)
    watch.planned(site, counts_RE, made.slot_expert_RS, made.shares_RP, started)
    return made.slot_expert_RS, made.shares_RP


def _plan_if_worth(counts_RE: Tensor, redundant_experts: int, planner: str, least: int) -> Plan:
    """Counted by `expert_load`, so not checked again."""
    if not least or planner == "none":
        return make_plan(counts_RE, redundant_experts, planner, check=False)
    few = counts_RE.sum() < least
    if not counts_RE.is_cuda:
        return make_plan(counts_RE, redundant_experts, "none" if bool(few) else planner, check=False)
    made, bare = (make_plan(counts_RE, redundant_experts, p, check=False) for p in (planner, "none"))
    return Plan(*(torch.where(few, b, m) for b, m in zip(bare, made, strict=True)))  # the host does not wait for counts


@plan.register_fake
def _(counts_RE: Tensor, redundant_experts: int, planner: str, site: str, least: int = 0) -> tuple[Tensor, Tensor]:
    ranks, experts = counts_RE.shape
    layout = ExpertLayout(int(experts), int(ranks), redundant_experts)
    return (
        counts_RE.new_empty(layout.ranks, layout.slots, dtype=torch.int32),
        counts_RE.new_empty(layout.ranks, layout.physical, dtype=torch.int32),
    )


@torch.library.custom_op("ultraep::reroute", mutates_args=())
def reroute(ids: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, experts: int, group: str, site: str) -> Tensor:
    """Physical expert of every pair, int32 [T, K], such that every source rank keeps to its shares exactly.

    The pairs of one source rank and expert are dealt evenly in token order (see `deal`), so that any window of tokens
    uses all copies. Deterministic.

    Example: expert 0 has copies 0 and 5 with shares 2 and 1; its pairs go to 5, 0, 0.
    """
    started = time.perf_counter()
    ranks = shares_RP.shape[0]
    transport = transport_for(ranks, group)
    layout = ExpertLayout(experts, ranks, slot_expert_RS.shape[1])
    if isinstance(transport, SymmetricTransport) and ids.is_cuda:
        from ultraep_compile.codegen.reroute import reroute_and_place

        plan = (slot_expert_RS.contiguous(), shares_RP.contiguous())
        physical = reroute_and_place(ids, *plan, layout, transport.rank, distinct=False).physical_TK
        watch.rerouted(site, physical, layout, transport, started)
        return physical
    logical = physical_to_logical(slot_expert_RS, experts)
    logical = torch.where(logical < 0, experts, logical)
    order = torch.argsort(logical, stable=True)  # copies of one expert side by side
    hosted = transport.hosted
    shares = shares_RP[hosted.start : hosted.stop].to(torch.int64)[:, order]
    line = torch.cumsum(shares.flatten(), 0)  # all pairs of all hosted sources, laid out by (source, expert, copy)
    first = torch.searchsorted(logical[order], torch.arange(experts + 1, device=ids.device))

    source = transport.source_of_token(ids.shape[0], ids.device) - hosted.start
    expert = ids.to(torch.int64)
    ordinal, _ = ordinal_in_group((source.unsqueeze(1) * experts + expert).flatten(), len(hosted) * experts)
    row = (source * layout.physical).unsqueeze(1)
    copy, _ = deal(
        ordinal, (row + first[expert]).flatten(), (row + first[expert + 1]).flatten(), line, slot_expert_RS.numel() + 1
    )
    physical = order[copy % layout.physical].to(torch.int32).view_as(ids)
    watch.rerouted(site, physical, layout, transport, started)
    return physical


@reroute.register_fake
def _(ids: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, experts: int, group: str, site: str) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int32, memory_format=torch.contiguous_format)


def deal(ordinal: Tensor, first: Tensor, last: Tensor, line: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Deal numbered pairs over the copies of their expert, exactly by shares and evenly in any window.

    The copies are halved again and again: of the n pairs at a node whose left half has shares l, pair k goes left where
    floor(k*l/n) steps up, and floor(k*l/n) earlier ones went left. So every copy gets its share exactly, in token order,
    and a pair's number among those of its copy falls out of the same arithmetic.

    Args:
        ordinal: int64 [N], number of the pair among those of its expert.
        first, last: int64 [N], the expert's copies are columns first..last-1 of `line`.
        line: int64, inclusive prefix sum of the shares of all columns.
        copies: no expert has more.
    Returns: column of the chosen copy, and the pair's number among those of that copy.

    Example: shares 2 and 1 (line [2, 3]): pairs 0, 1, 2 go to columns 1, 0, 0 with numbers 0, 0, 1.
    """
    before = torch.cat([line.new_zeros(1), line])
    low, high = before[first], before[last]
    for _ in range((copies - 1).bit_length()):
        middle = (first + last) // 2
        open_ = last - first > 1
        size, left = high - low, before[middle] - low
        size = size.clamp(min=1)
        share = ordinal * left
        lefts = share // size
        goes_left = open_ & (share - lefts * size + left >= size)
        goes_right = open_ & ~goes_left
        ordinal = torch.where(goes_left, lefts, torch.where(goes_right, ordinal - lefts, ordinal))
        last = torch.where(goes_left, middle, last)
        high = torch.where(goes_left, before[middle], high)
        first = torch.where(goes_right, middle, first)
        low = torch.where(goes_right, before[middle], low)
    return first, ordinal
