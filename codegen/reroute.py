"""Reroute on a GPU: from top-k ids and the plan's shares to where every pair's row goes, in two launches.

The same integers as `ultraep::reroute` and `ops.dispatch.Positions` (the reference, in plain torch), without a host
read: shapes follow from (T, K, layout) alone, and the launches can be captured in a CUDA graph.

Symbols: T tokens, K choices, R ranks, E experts, M masters and S slots a rank, L = M + S, P = R * L physical experts.
A pair's *position* is its place among all rows of its destination rank, over all rounds; its *row* is its place in the
destination's expert-sorted, padded buffer in the round that carries it: `row = places[physical, BASE] + position`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ultraep_compile.codegen import reroute_kernels as kernels
from ultraep_compile.ops.grouped_gemm import ROW_ALIGNMENT
from ultraep_compile.ops.layout import ExpertLayout, ordinal_in_group, physical_to_logical
from ultraep_compile.ops.routing import deal

BASE, FIRST, COUNT, BEGIN = range(4)
"""Columns of `Window.places_P4`."""
EVERYTHING = 2**31 - 1
"""Capacity of a single round that carries all rows."""


class Window(NamedTuple):
    """One round: what every rank's buffer holds, the same on all ranks but for `offsets` and BEGIN."""

    places_P4: Tensor
    """int32 [P, 4] of each physical expert: BASE, row = BASE + position; FIRST position and COUNT of rows in this
    round (a pair travels in it where FIRST <= position < FIRST + COUNT); BEGIN, position of the own rank's first pair."""
    offsets: Tensor
    """int32 [L + 1]: groups of the own buffer, masters then slots, each padded to a multiple of ROW_ALIGNMENT rows."""
    loads_R: Tensor
    """int32 [R]: rows that each rank receives in all rounds; ceil(max / capacity) rounds carry everything."""


class Routing(NamedTuple):
    """Where the pairs of one rank go."""

    physical_TK: Tensor
    """int32 [T, K]: physical expert; -1 where the id is none of 0..E-1, and such a pair travels nowhere."""
    position_TK: Tensor
    """int32 [T, K]: position on the destination rank, -1 likewise."""
    lead_TK: Tensor | None
    """uint8 [T, K]: the first choice of the same token with the same destination rank and round; a token that is sent
    once per destination travels with that choice. (The own choice where a pair travels nowhere.)"""
    window: Window
    """Round 0."""


def reroute_and_place(
    ids_TK: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, layout: ExpertLayout, rank: int,
    capacity: int = EVERYTHING, *, distinct: bool, once_per_rank: bool = False,
) -> Routing:  # fmt: skip
    """Physical expert, position and (once_per_rank) lead of all pairs of this rank; the tables of round 0.

    Args:
        ids_TK: int32 or int64, the router's choice; -1 for padding.
        slot_expert_RS, shares_RP: int32, the plan. The shares of `rank` must be those of `ids_TK`.
        capacity: positions of a rank that one round carries.
        distinct: no token chooses an expert twice, as after a top-k. If it may (a table of experts), pass False, which
            is exact for all ids but slower with K > 1.
    Example: E=2, R=2, slots [[-1], [0]], shares [[2, 0, 1, 1], [0, 0, 0, 0]], ids [[0], [1], [0], [0]] of rank 0: the
        pairs of expert 0 are dealt over physical 0 and 3, so physical is [[3], [2], [0], [0]] and position
        [[1], [0], [0], [1]]; offsets of rank 0 are [0, 8, 8].
    """
    if not ids_TK.is_cuda and not interpreted():
        return reroute_and_place_reference(
            ids_TK, slot_expert_RS, shares_RP, layout, rank, capacity, distinct=distinct, once_per_rank=once_per_rank
        )
    routing, launches = rerouting_stages(
        ids_TK, slot_expert_RS, shares_RP, layout, rank, capacity, distinct=distinct, once_per_rank=once_per_rank
    )
    for launch in launches.values():
        launch()
    return routing


def place(
    physical_TK: Tensor, shares_RP: Tensor, layout: ExpertLayout, rank: int, capacity: int = EVERYTHING,
    *, once_per_rank: bool = False,
) -> Routing:  # fmt: skip
    """`reroute_and_place` for pairs whose physical experts are known already.

    A physical expert has no copies: where it is taken for an expert of a layer without slots, its pairs are dealt to
    itself alone, and its positions are those of the real layout.
    Example: E=2, R=2, S=1, shares [[2, 0, 1, 1], [0, 0, 0, 0]], physical [[3], [2], [0], [0]] of rank 0 give position
        [[1], [0], [0], [1]], as in `reroute_and_place`.
    """
    alone = ExpertLayout(layout.physical, layout.ranks, 0)
    no_slots = shares_RP.new_empty(layout.ranks, 0)
    return reroute_and_place(
        physical_TK, no_slots, shares_RP, alone, rank, capacity, distinct=False, once_per_rank=once_per_rank
    )


def window(
    shares_RP: Tensor, layout: ExpertLayout, rank: int, capacity: int = EVERYTHING, index: int | Tensor = 0
) -> Window:
    """The tables of round `index`, which may be a number on the device: one launch, no host read.

    Example: shares [[2, 0, 1, 1], [0, 0, 0, 0]] with E=2, R=2, S=1, capacity 2, index 0: physical 3 (rank 1's slot)
    has one of its rank's two rows of this round; FIRST is [0, 2, 0, 1], COUNT [2, 0, 1, 1].
    """
    if not shares_RP.is_cuda and not interpreted():
        return window_reference(shares_RP, layout, rank, capacity, index)
    index = index if isinstance(index, Tensor) else torch.tensor([index], dtype=torch.int32, device=shares_RP.device)
    made = _new_window(shares_RP, layout)
    sizes = _table_sizes(layout)
    kernels.tabulate[(triton.cdiv(layout.ranks, sizes["BLOCK"]),)](
        shares_RP.contiguous(), *made, index, rank, capacity, layout.ranks, **sizes, **_launch(shares_RP)
    )
    return made


def rerouting_stages(
    ids_TK: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, layout: ExpertLayout, rank: int,
    capacity: int = EVERYTHING, *, distinct: bool, once_per_rank: bool = False,
):  # fmt: skip
    """The result of `reroute_and_place`, and the launches that fill it, by name."""
    tokens, choices = ids_TK.shape
    ids = (ids_TK if distinct else ids_TK.reshape(-1, 1)).contiguous()  # pairs as tokens of one choice: none repeats
    new = shares_RP.new_empty
    T, K = ids.shape
    tiles, experts, physical = triton.cdiv(T, 64), layout.experts, layout.physical
    made = Routing(
        new(tokens, choices),
        new(tokens, choices),
        new(tokens, choices, dtype=torch.uint8) if once_per_rank else None,
        _new_window(shares_RP, layout),
    )
    sizes, launch = _table_sizes(layout), _launch(shares_RP)
    counts_row = triton.cdiv(experts, 16) * 16
    groups = triton.cdiv(tiles, 128)
    bits, counts = new(tiles, experts, dtype=torch.int64), new(tiles, counts_row, dtype=torch.uint8)
    base = new(groups, experts) if groups > 1 else counts
    first, order, upto = new(experts + 1), new(physical), new(physical)
    shares, slot_expert = shares_RP.contiguous(), slot_expert_RS.contiguous()
    power = triton.next_power_of_2
    words, span = power(counts_row // 4), min(128, power(max(1, tiles)))
    lead_here = once_per_rank and distinct
    blocks = triton.cdiv(layout.ranks, sizes["BLOCK"])
    slots = min(128, power(max(1, layout.ranks * layout.slots)))
    launches = {
        "mark": lambda: kernels.mark[(tiles + 2 * blocks,)](
            ids, shares, slot_expert, bits, counts, *made.window, first, order, upto, rank, 0, capacity,
            T, experts, layout.ranks, counts_row, K, power(K), power(max(16, experts)), **sizes, SLOTS=slots,
            **launch,
        )
    }  # fmt: skip
    if groups > 1:
        launches["add_up"] = lambda: kernels.add_up[(groups, triton.cdiv(experts, 32))](
            counts, base, experts, counts_row, 32, **launch
        )
    if tiles:
        launches["deal"] = lambda: kernels.deal[(tiles,)](
            ids, bits, counts, base, made.window.places_P4, first, order, upto, made.physical_TK, made.position_TK,
            made.lead_TK if lead_here else counts, capacity, T, experts, counts_row, K, power(K),
            span, min(span, max(1, 8192 // words)), words, layout.physical_per_rank, groups > 1, T > 65535,
            lead_here, **launch,
        )  # fmt: skip
    if once_per_rank and not distinct and tokens:
        per_program = max(1, 512 // power(choices) ** 2)
        launches["lead"] = lambda: kernels.lead[(triton.cdiv(tokens, per_program),)](
            made.physical_TK, made.position_TK, made.lead_TK, capacity, tokens, choices, power(choices),
            layout.physical_per_rank, per_program,
        )  # fmt: skip
    return made, launches


def _new_window(shares_RP: Tensor, layout: ExpertLayout) -> Window:
    new = shares_RP.new_empty
    return Window(new(layout.physical, 4), new(layout.physical_per_rank + 1), new(layout.ranks))


def _table_sizes(layout: ExpertLayout) -> dict[str, int]:
    width = triton.next_power_of_2(layout.physical_per_rank)
    block = max(1, min(triton.next_power_of_2(layout.ranks), 16 // width))
    sources = min(64, triton.next_power_of_2(layout.ranks), max(1, 2048 // (width * block)))
    return {"M": layout.masters, "S": layout.slots, "BLOCK": block, "GP": width, "SOURCES": sources}


def _launch(tensor: Tensor) -> dict:
    return {"PDL": True, "launch_pdl": True} if tensor.is_cuda else {"PDL": False}


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Do kernels run on CPU tensors?"""
    return bool(triton.knobs.runtime.interpret)


def window_reference(
    shares_RP: Tensor, layout: ExpertLayout, rank: int, capacity: int = EVERYTHING, index: int | Tensor = 0
) -> Window:
    """`window` in plain torch."""
    shares = shares_RP.to(torch.int64)
    quota = shares.sum(0).view(layout.ranks, -1)
    start = torch.cumsum(quota, 1) - quota
    low = index * capacity
    first = start.clamp(min=low)
    count = ((start + quota).clamp(max=low + capacity) - first).clamp(min=0)
    padded = -(-count // ROW_ALIGNMENT) * ROW_ALIGNMENT
    end = torch.cumsum(padded, 1)
    begin = start.flatten() + shares[:rank].sum(0)
    places = torch.stack([(end - padded - first).flatten(), first.flatten(), count.flatten(), begin], 1)
    offsets = torch.cat([end.new_zeros(1), end[rank]])
    return Window(places.int(), offsets.int(), quota.sum(1).int())


def reroute_and_place_reference(
    ids_TK: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, layout: ExpertLayout, rank: int,
    capacity: int = EVERYTHING, *, distinct: bool, once_per_rank: bool = False,
) -> Routing:  # fmt: skip
    """`reroute_and_place` in plain torch."""
    logical = physical_to_logical(slot_expert_RS, layout.experts)
    logical = torch.where(logical < 0, layout.experts, logical)
    order = torch.argsort(logical, stable=True)
    first = torch.searchsorted(logical[order], torch.arange(layout.experts + 1, device=ids_TK.device))
    line = torch.cumsum(shares_RP[rank].to(torch.int64)[order], 0)
    ids = ids_TK.flatten().to(torch.int64)
    live = (ids >= 0) & (ids < layout.experts)
    group = torch.where(live, ids, layout.experts)
    ordinal, _ = ordinal_in_group(group, layout.experts + 1)
    expert = torch.where(live, ids, 0)
    ordinal = torch.where(live, ordinal, 0)
    copy, number = deal(ordinal, first[expert], first[expert + 1], line, slot_expert_RS.numel() + 1)
    made = window_reference(shares_RP, layout, rank, capacity)
    physical = torch.where(live, order[copy], -1).int().view_as(ids_TK)
    position = torch.where(live, made.places_P4[order[copy], BEGIN] + number, -1).int().view_as(ids_TK)
    lead = leads_reference(physical, position, layout, capacity) if once_per_rank else None
    return Routing(physical, position, lead, made)


def leads_reference(physical_TK: Tensor, position_TK: Tensor, layout: ExpertLayout, capacity: int) -> Tensor:
    """`Routing.lead_TK` in plain torch, without a host read."""
    live = physical_TK >= 0
    k = torch.arange(physical_TK.shape[1], device=physical_TK.device)
    trip = (physical_TK // layout.physical_per_rank).to(torch.int64) << 32 | (position_TK // capacity)
    trip = torch.where(live, trip, -1 - k)
    same = trip.unsqueeze(2) == trip.unsqueeze(1)
    return torch.where(same, k, physical_TK.shape[1]).amin(2).to(torch.uint8)
