"""From the router's choice to physical experts: `expert_load`, `plan`, `reroute`. Integers only, no gradients."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ultraep_compile.errors import RoutingError
from ultraep_compile.ops import watch
from ultraep_compile.ops.late_checks import check_later
from ultraep_compile.ops.layout import ExpertLayout, ordinal_in_group, physical_to_logical
from ultraep_compile.ops.transport import SymmetricTransport, transport_for
from ultraep_compile.planner import make_plan


@torch.library.custom_op("ultraep::expert_load", mutates_args=())
def expert_load(ids: Tensor, scores: Tensor | None, experts: int, ranks: int, group: str, site: str) -> Tensor:
    """Tokens of every source rank for every expert, int32 [R, E], identical on all ranks.

    Args:
        ids: integer [T, K], the router's choice.
        scores: the router's raw scores [T, >= E] or None; only looked at for NaN and infinity.
        site: name of the layer for messages and traces.
    Raises: RoutingError for ids outside 0..E-1 and for scores that are not finite, before anything is exchanged; on a GPU
        with symmetric memory at the layer's next call (see `late_checks`).
    """
    started = time.perf_counter()
    transport = transport_for(ranks, group)
    if isinstance(transport, SymmetricTransport):
        counts = transport.exchange_counts(_own_counts(ids, scores, experts, site), layer_name(site))
    else:
        _check_scores(scores, site)
        _check_ids(ids, experts, site)
        source = transport.source_of_token(ids.shape[0], ids.device) - transport.hosted.start
        cell = source.unsqueeze(1) * experts + ids.to(torch.int64)
        counts = torch.bincount(cell.flatten(), minlength=len(transport.hosted) * experts).to(torch.int32)
        counts = transport.gather_counts(counts.view(len(transport.hosted), experts))
    watch.add_time(site, "load", started)
    return counts


def _own_counts(ids: Tensor, scores: Tensor | None, experts: int, site: str) -> Tensor:
    """int32 [E]: this process's tokens for each expert; on a GPU nothing is read on the host."""
    if ids.is_cuda:
        from ultraep_compile.codegen.count_kernels import expert_counts

        check_later(ids, scores, experts, layer_name(site))
        return expert_counts(ids, experts)
    _check_scores(scores, site)
    _check_ids(ids, experts, site)
    return torch.bincount(ids.flatten(), minlength=experts).to(torch.int32)


@expert_load.register_fake
def _(ids: Tensor, scores: Tensor | None, experts: int, ranks: int, group: str, site: str) -> Tensor:
    return ids.new_empty(ranks, experts, dtype=torch.int32)


def layer_name(site: str) -> str:
    """The module's name in a site key `name@digest`."""
    return site.rpartition("@")[0] or site


def _check_scores(scores: Tensor | None, site: str) -> None:
    if scores is None or bool(torch.isfinite(scores).all()):
        return
    token, column = torch.nonzero(~torch.isfinite(scores.flatten(0, -2)))[0].tolist()
    value = scores.flatten(0, -2)[token, column].item()
    raise RoutingError(
        f"{layer_name(site)}: the router's score of token {token} for expert {column} is {value}. No expert can be chosen by such a "
        "score; look for an overflow before this layer (learning rate, loss scale, a bad batch) and skip or repair the step."
    )


def _check_ids(ids: Tensor, experts: int, site: str) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < experts:
        return
    token, choice = torch.nonzero((ids < 0) | (ids >= experts))[0].tolist()
    raise RoutingError(
        f"{layer_name(site)}: token {token}, choice {choice} is routed to expert {ids[token, choice].item()}, but this layer has "
        f"experts 0..{experts - 1}. Correct the router (or the table of expert ids) that produced it."
    )


@torch.library.custom_op("ultraep::plan", mutates_args=())
def plan(counts_RE: Tensor, redundant_experts: int, planner: str, site: str) -> tuple[Tensor, Tensor]:
    """Placement and exact shares for these loads: slot_expert_RS int32 [R, S], shares_RP int32 [R, P].

    See `ultraep_compile.planner.make_plan`. Every rank computes the same plan from the same counts.
    """
    started = time.perf_counter()
    made = make_plan(counts_RE, redundant_experts, planner, check=False)  # counted by `expert_load`
    watch.planned(site, counts_RE, made.slot_expert_RS, made.shares_RP, started)
    return made.slot_expert_RS, made.shares_RP


@plan.register_fake
def _(counts_RE: Tensor, redundant_experts: int, planner: str, site: str) -> tuple[Tensor, Tensor]:
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
        watch.rerouted(site, physical, layout, started)
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
    watch.rerouted(site, physical, layout, started)
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
