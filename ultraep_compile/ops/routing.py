"""From the router's choice to physical experts: `expert_load`, `plan`, `reroute`. Integers only, no gradients."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ultraep_compile.errors import RoutingError
from ultraep_compile.ops import watch
from ultraep_compile.ops.layout import ExpertLayout, ordinal_in_group, physical_to_logical
from ultraep_compile.ops.transport import transport_for
from ultraep_compile.planner import make_plan


@torch.library.custom_op("ultraep::expert_load", mutates_args=())
def expert_load(ids: Tensor, scores: Tensor | None, experts: int, ranks: int, group: str, site: str) -> Tensor:
    """Tokens of every source rank for every expert, int32 [R, E], identical on all ranks.

    Args:
        ids: integer [T, K], the router's choice.
        scores: the router's raw scores [T, >= E] or None; only looked at for NaN and infinity.
        site: name of the layer for messages and traces.
    Raises: RoutingError for ids outside 0..E-1 and for scores that are not finite, before anything is exchanged.
    """
    started = time.perf_counter()
    _check_scores(scores, site)
    _check_ids(ids, experts, site)
    transport = transport_for(ranks, group)
    source = transport.source_of_token(ids.shape[0], ids.device) - transport.hosted.start
    cell = source.unsqueeze(1) * experts + ids.to(torch.int64)
    counts = torch.bincount(cell.flatten(), minlength=len(transport.hosted) * experts)
    counts = transport.gather_counts(counts.view(len(transport.hosted), experts).to(torch.int32))
    watch.add_time(site, "load", started)
    return counts


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

    The pairs of one source rank and expert are numbered in token order and dealt over the expert's copies with a
    golden-ratio stride, so that any window of tokens uses all copies. Deterministic.

    Example: expert 0 has copies 0 and 5 with shares 2 and 1; its pairs go to 0, 0, 5 in an interleaved order.
    """
    started = time.perf_counter()
    ranks = shares_RP.shape[0]
    transport = transport_for(ranks, group)
    layout = ExpertLayout(experts, ranks, slot_expert_RS.shape[1])
    logical = physical_to_logical(slot_expert_RS, experts)
    order = torch.argsort(torch.where(logical < 0, experts, logical), stable=True)  # copies of one expert side by side
    hosted = transport.hosted
    shares = shares_RP[hosted.start : hosted.stop].to(torch.int64)[:, order]
    line = torch.cumsum(shares.flatten(), 0)  # all pairs of all hosted sources, laid out by (source, expert, copy)

    source = transport.source_of_token(ids.shape[0], ids.device) - hosted.start
    cell = (source.unsqueeze(1) * experts + ids.to(torch.int64)).flatten()
    ordinal, sizes = ordinal_in_group(cell, len(hosted) * experts)
    starts = torch.cumsum(sizes, 0) - sizes
    size = sizes[cell]
    position = starts[cell] + (ordinal * _golden_stride(sizes)[cell]) % size.clamp(min=1)
    copy = torch.searchsorted(line, position, right=True)
    physical = order[copy % layout.physical].to(torch.int32).view_as(ids)
    watch.rerouted(site, physical, layout, started)
    return physical


@reroute.register_fake
def _(ids: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, experts: int, group: str, site: str) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int32, memory_format=torch.contiguous_format)


def _golden_stride(sizes: Tensor) -> Tensor:
    """A stride near 0.618 n that is coprime with n, per group of n: multiplication by it modulo n is a bijection.

    Example: sizes [5, 8] give [3, 5].
    """
    stride = torch.round(sizes.double() * 0.6180339887498949).to(torch.int64).clamp(min=1)
    for _ in range(64):  # consecutive coprimes are close; the loop ends after a few turns
        bad = torch.gcd(stride, sizes.clamp(min=1)) != 1
        if not bool(bad.any()):
            return stride
        stride = torch.where(bad, stride + 1, stride)
    return torch.where(torch.gcd(stride, sizes.clamp(min=1)) != 1, 1, stride)
