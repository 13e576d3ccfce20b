"""`dispatch` in plain torch, over buffers in one process: what the kernels are compared with. Reads on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultraep_compile.codegen.reroute import BASE, COUNT, FIRST, Routing, Window
from ultraep_compile.codegen.wire import unpack_rows_reference
from ultraep_compile.ops.grouped_gemm import ROW_ALIGNMENT
from ultraep_compile.ops.layout import ExpertLayout

Peers = Tensor | Sequence[Tensor]


def places(routing: Routing, window: Window, layout: ExpertLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Of every pair: does it travel in this round, destination rank, row there. int64 [N] but the first."""
    physical, position = routing.physical_TK.flatten().long(), routing.position_TK.flatten().long()
    place = window.places_P4[physical.clamp(min=0)].long()
    travels = (physical >= 0) & (position >= place[:, FIRST]) & (position < place[:, FIRST] + place[:, COUNT])
    return travels, physical // layout.physical_per_rank, place[:, BASE] + position


def push_rows(
    source: Tensor, routing: Routing, peers: Peers, rows: int, layout: ExpertLayout, references: Peers | None,
    window: Window, gradient: bool,
) -> None:  # fmt: skip
    travels, rank, row = places(routing, window, layout)
    tokens, choices = routing.physical_TK.shape
    pair = torch.arange(tokens * choices)
    divisor = choices if source.shape[0] == tokens else 1
    leader = pair
    if references is not None:
        assert routing.lead_TK is not None
        leader = pair // choices * choices + routing.lead_TK.flatten().long()
    place = window.places_P4[routing.physical_TK.flatten().long().clamp(min=0)].long()
    opens = travels & (routing.position_TK.flatten().long() == place[:, FIRST])
    for r in range(layout.ranks):
        here = travels & (rank == r)
        assert not bool((here & (row >= rows)).any()), "a buffer holds its round"
        carried = here & (leader == pair)
        buffer = peers[r].view(-1, *source.shape[1:])
        buffer[row[carried]] = source[pair[carried] // divisor]
        if references is not None:
            references[r][row[here]] = row[leader[here]].int()
        for p in torch.nonzero(here & opens).flatten().tolist():
            first, count = int(row[p]), int(place[p, COUNT])
            padding = slice(first + count, first + -(-count // ROW_ALIGNMENT) * ROW_ALIGNMENT)
            if references is not None:
                references[r][padding] = row[leader[p]].int()
            else:
                buffer[padding] = 0 if gradient else source[p // divisor]


def pull_rows(
    out: Tensor, routing: Routing, peers: Peers, rows: int, layout: ExpertLayout, window: Window, packed: bool,
    zero_rest: bool,
) -> Tensor:  # fmt: skip
    travels, rank, row = places(routing, window, layout)
    if zero_rest:
        out[~travels] = 0
    for r in range(layout.ranks):
        here = travels & (rank == r)
        got = peers[r][row[here]]
        out[here] = unpack_rows_reference(got, out.shape[1], out.dtype) if packed else got.view(-1, *out.shape[1:])
    return out


def pull_sum(
    out_TD: Tensor, routing: Routing, peers: Peers, rows: int, layout: ExpertLayout, weights_TK: Tensor | None,
    window: Window,
) -> Tensor:  # fmt: skip
    tokens, choices = routing.physical_TK.shape
    pairs = pull_rows(
        out_TD.new_empty(tokens * choices, out_TD.shape[1]), routing, peers, rows, layout, window, False, True
    )
    total = torch.zeros(tokens, out_TD.shape[1])
    for k in range(choices):
        row = pairs[k::choices].float()
        total += row if weights_TK is None else row * weights_TK[:, k : k + 1].float()
    out_TD.copy_(total)
    return out_TD


def sum_choices(pairs: Tensor, choices: int) -> Tensor:
    total = pairs[::choices].float()
    for k in range(1, choices):
        total = total + pairs[k::choices].float()
    return total.to(pairs.dtype)
