"""Rows to their physical experts and back, in rounds over a buffer of fixed size: `ultraep::dispatch`, `ultraep::combine`.

Every pair has a position on its destination rank: physical experts in order, within one the source ranks in order,
within one source the tokens in order. Shares alone fix all positions, so sender and receiver agree without a second
exchange. Round j carries the positions j*C .. (j+1)*C-1 of every rank; nothing is ever dropped.

Inside a buffer the groups stand masters first, then slots, each padded to whole blocks of `ROW_ALIGNMENT` rows. Padding
repeats the first row of its group, so that whatever runs on it stays finite where real rows do; its gradient is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ultraep_compile.ops.grouped_gemm import ROW_ALIGNMENT
from ultraep_compile.ops.layout import ExpertLayout, ordinal_in_group
from ultraep_compile.ops.transport import CollectiveTransport, Transport, VirtualTransport, transport_for

EVERYTHING = 1 << 62
"""A round capacity that no load reaches."""


def buffer_rows(capacity: int, layout: ExpertLayout, hosted: int) -> int:
    """Rows of a buffer that holds `capacity` rows of each hosted rank with every group padded. Ints or SymInts."""
    return hosted * capacity + (ROW_ALIGNMENT - 1) * hosted * layout.physical_per_rank


@dataclass(slots=True)
class Positions:
    """Where every pair goes, before it is cut into rounds."""

    layout: ExpertLayout
    transport: Transport
    shares_RP: Tensor
    """int64; rows are source ranks."""
    physical: Tensor
    """int64 [T*K]"""
    position: Tensor
    """int64 [T*K]: place on the destination rank."""

    @classmethod
    def of(cls, physical_TK: Tensor, shares_RP: Tensor, layout: ExpertLayout, transport: Transport) -> Positions:
        shares = shares_RP.to(torch.int64)
        physical = physical_TK.flatten().to(torch.int64)
        tokens, choices = physical_TK.shape
        hosted = transport.hosted
        source = transport.source_of_token(tokens, physical.device).repeat_interleave(choices)
        cell = (source - hosted.start) * layout.physical + physical
        ordinal, _ = ordinal_in_group(cell, len(hosted) * layout.physical)
        start = _starts_within_rank(shares.sum(0), layout)
        below = torch.cumsum(shares, 0) - shares
        position = start[physical] + below[source, physical] + ordinal
        return cls(layout, transport, shares, physical, position)

    def rank_loads(self) -> list[int]:
        """Rows that each rank receives in all rounds."""
        return self.shares_RP.sum(0).view(self.layout.ranks, -1).sum(1).tolist()

    def round(self, index: int, capacity: int, rows: int) -> Round:
        """Round `index` of windows of `capacity` positions, over a buffer of `rows` rows."""
        low, high = index * capacity, (index + 1) * capacity
        hosted, layout = self.transport.hosted, self.layout
        quota = self.shares_RP.sum(0)
        start = _starts_within_rank(quota, layout)
        first = start.clamp(min=low)
        count = ((start + quota).clamp(max=high) - first).clamp(min=0)
        local = torch.arange(layout.physical, device=quota.device).view(layout.ranks, -1)[hosted.start : hosted.stop]
        groups = torch.cat([local[:, : layout.masters].flatten(), local[:, layout.masters :].flatten()])
        padded = -(-count[groups] // ROW_ALIGNMENT) * ROW_ALIGNMENT
        offsets = torch.cat([padded.new_zeros(1), torch.cumsum(padded, 0)])
        base = torch.zeros_like(quota)
        base[groups] = offsets[:-1] - first[groups]  # row = base + position
        make = _virtual_round if isinstance(self.transport, VirtualTransport) else _collective_round
        return make(self, low, high, rows, base, offsets, count[groups])


def _starts_within_rank(quota_P: Tensor, layout: ExpertLayout) -> Tensor:
    per_rank = quota_P.view(layout.ranks, -1)
    return (torch.cumsum(per_rank, 1) - per_rank).flatten()


@dataclass(slots=True)
class Round:
    """One trip of rows to the hosted experts and back."""

    transport: Transport
    rows: int
    offsets: Tensor
    """int32 [G + 1], multiples of ROW_ALIGNMENT."""
    own_pairs: Tensor
    """int64: pairs of this process that travel in this round, in sending order."""
    arrived_rows: Tensor
    """int64: buffer row of every arriving row, in arriving order."""
    padding_rows: Tensor
    """int64: rows that fill up the last block of a group."""
    repeated_rows: Tensor
    """int64: the first row of that group, for each of them."""
    send: list[int]
    receive: list[int]

    def to_experts(self, source: Tensor, divisor: int, *, is_gradient: bool = False) -> Tensor:
        """Buffer [rows, D] with row `pair // divisor` of `source` at every pair's place.

        Padding repeats a real row, or is zero for a gradient.
        """
        travelling = source[self.own_pairs // divisor if divisor > 1 else self.own_pairs]
        if isinstance(self.transport, CollectiveTransport):
            travelling = self.transport.all_to_all(travelling, self.send, self.receive, "rows on their way to experts")
        buffer = source.new_zeros(self.rows, *source.shape[1:])
        buffer[self.arrived_rows] = travelling
        if not is_gradient:
            buffer[self.padding_rows] = buffer[self.repeated_rows]
        return buffer

    def to_tokens(self, buffer: Tensor, out: Tensor) -> None:
        """Write every travelling pair's row of the buffer into `out` [T*K, D]."""
        travelling = buffer[self.arrived_rows]
        if isinstance(self.transport, CollectiveTransport):
            travelling = self.transport.all_to_all(travelling, self.receive, self.send, "rows on their way back")
        out[self.own_pairs] = travelling


def _padding(offsets: Tensor, count_G: Tensor) -> tuple[Tensor, Tensor]:
    """`Round.padding_rows` and `Round.repeated_rows`.

    Example: offsets [0, 8, 8], counts [6, 0] give [6, 7] and [0, 0].
    """
    extra = offsets[1:] - offsets[:-1] - count_G
    inside = torch.arange(int(extra.sum()), device=offsets.device) - (torch.cumsum(extra, 0) - extra).repeat_interleave(
        extra
    )
    return (offsets[:-1] + count_G).repeat_interleave(extra) + inside, offsets[:-1].repeat_interleave(extra)


def _virtual_round(
    p: Positions, low: int, high: int, rows: int, base: Tensor, offsets: Tensor, count_G: Tensor
) -> Round:
    row = base[p.physical] + p.position
    if low == 0 and high >= EVERYTHING:
        pairs = torch.arange(row.numel(), device=row.device)
    else:
        pairs = torch.nonzero((p.position >= low) & (p.position < high)).flatten()
        row = row[pairs]
    return Round(p.transport, rows, offsets.to(torch.int32), pairs, row, *_padding(offsets, count_G), [], [])


def _collective_round(
    p: Positions, low: int, high: int, rows: int, base: Tensor, offsets: Tensor, count_G: Tensor
) -> Round:
    layout, transport = p.layout, p.transport
    assert isinstance(transport, CollectiveTransport)
    pairs = torch.nonzero((p.position >= low) & (p.position < high)).flatten()
    destination = p.physical[pairs] // layout.physical_per_rank
    by_place = torch.argsort(p.position[pairs], stable=True)
    by_place = by_place[torch.argsort(destination[by_place], stable=True)]
    send = torch.bincount(destination, minlength=layout.ranks).tolist()
    # What arrives: per source, blocks of my physical experts in order, each a run of consecutive positions.
    mine = slice(transport.rank * layout.physical_per_rank, (transport.rank + 1) * layout.physical_per_rank)
    shares = p.shares_RP[:, mine]
    start = _starts_within_rank(p.shares_RP.sum(0), layout)[mine]
    block = start + torch.cumsum(shares, 0) - shares
    begin, end = block.clamp(min=low), (block + shares).clamp(max=high)
    length = (end - begin).clamp(min=0)
    receive = length.sum(1).tolist()
    flat = length.flatten()
    inside = torch.arange(int(flat.sum()), device=flat.device) - (torch.cumsum(flat, 0) - flat).repeat_interleave(flat)
    arrived = (base[mine] + begin).flatten().repeat_interleave(flat) + inside
    padding = _padding(offsets, count_G)
    return Round(transport, rows, offsets.to(torch.int32), pairs[by_place], arrived, *padding, send, receive)


@torch.library.custom_op("ultraep::dispatch", mutates_args=())
def dispatch(
    source: Tensor, physical_TK: Tensor, shares_RP: Tensor, experts: int, capacity: int, index: int, group: str
) -> tuple[Tensor, Tensor]:
    """Round `index` of rows on their way to the experts hosted by this process.

    Args:
        source: [T, D], one row a token, or [T*K, D], one row a pair.
        capacity: positions of a rank that one round carries.
        group: process group name, "" for virtual ranks.
    Returns: buffer [`buffer_rows`, D] sorted by group (padding zero), offsets int32 [G + 1].
    """
    layout, transport = _layout_of(shares_RP, experts), transport_for(shares_RP.shape[0], group)
    rows = buffer_rows(capacity, layout, len(transport.hosted))
    trip = Positions.of(physical_TK, shares_RP, layout, transport).round(index, capacity, rows)
    divisor = physical_TK.shape[1] if source.shape[0] == physical_TK.shape[0] else 1
    return trip.to_experts(source, divisor, is_gradient=True), trip.offsets


@dispatch.register_fake
def _(source, physical_TK, shares_RP, experts, capacity, index, group):
    layout = _layout_of(shares_RP, experts)
    hosted = 1 if group else layout.ranks
    groups = hosted * layout.physical_per_rank
    buffer = source.new_empty(buffer_rows(capacity, layout, hosted), *source.shape[1:])
    return buffer, source.new_empty(groups + 1, dtype=torch.int32)


@torch.library.custom_op("ultraep::combine", mutates_args=())
def combine(
    buffer: Tensor, physical_TK: Tensor, shares_RP: Tensor, experts: int, capacity: int, index: int, group: str
) -> Tensor:
    """The way back of `dispatch`: rows in pair order [T*K, D]; zero for pairs of other rounds, so rounds add up."""
    layout, transport = _layout_of(shares_RP, experts), transport_for(shares_RP.shape[0], group)
    trip = Positions.of(physical_TK, shares_RP, layout, transport).round(index, capacity, buffer.shape[0])
    out = buffer.new_zeros(physical_TK.numel(), *buffer.shape[1:])
    trip.to_tokens(buffer, out)
    return out


@combine.register_fake
def _(buffer, physical_TK, shares_RP, experts, capacity, index, group):
    return buffer.new_empty(physical_TK.shape[0] * physical_TK.shape[1], *buffer.shape[1:])


def _layout_of(shares_RP: Tensor, experts: int) -> ExpertLayout:
    ranks, physical = int(shares_RP.shape[0]), int(shares_RP.shape[1])
    return ExpertLayout(experts, ranks, (physical - experts) // ranks)


def _dispatch_setup(ctx, inputs, output):
    source, physical_TK, shares_RP, *ctx.rest = inputs
    ctx.pairs_per_row = physical_TK.shape[1] if source.shape[0] == physical_TK.shape[0] else 1
    ctx.save_for_backward(physical_TK, shares_RP)


def _dispatch_backward(ctx, grad, _):
    physical_TK, shares_RP = ctx.saved_tensors
    pairs = combine(grad, physical_TK, shares_RP, *ctx.rest)
    if ctx.pairs_per_row > 1:
        pairs = pairs.view(-1, ctx.pairs_per_row, *pairs.shape[1:]).sum(1)
    return pairs, None, None, None, None, None, None


dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


def _combine_setup(ctx, inputs, output):
    _, physical_TK, shares_RP, *ctx.rest = inputs
    ctx.save_for_backward(physical_TK, shares_RP)


def _combine_backward(ctx, grad):
    buffer, _ = dispatch(grad.contiguous(), *ctx.saved_tensors, *ctx.rest)
    return buffer, None, None, None, None, None, None


combine.register_autograd(_combine_backward, setup_context=_combine_setup)
