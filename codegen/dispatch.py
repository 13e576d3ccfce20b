"""Dispatch and combine over memory that every rank can address: rows straight to their final place, and back.

    push_rows     each pair's row into the destination's expert-sorted buffer, padding included
    spread_rows   on arrival, where tokens were sent once per destination: rows that repeat another one
    unpack_rows   on arrival, where rows travel as fp8 (`wire`); pack_rows before push_rows
    clear_rows    zero behind the last group, for readers of the whole static buffer
    pull_rows     each pair's row from its expert's rank into pair order; packed rows are unpacked on the way
    pull_sum      the same, weighted and added up in top-k order; sum_choices, if the rows have come already

`reroute.reroute_and_place` says where everything goes. Shapes are static, nothing is read on the host, and which rows
travel is decided by the `Window`: rows beyond a round's capacity stay for the next. Nobody waits in here: the caller
lets every rank know that its rows have arrived before a buffer is read, and that they have been read before it is
written again.

Dispatch pushes because the sender knows all places and the receiver none; remote writes need no round trip. Combine
pulls because the reader knows all places, and can read into a tensor of its own: pushed results would have to land in
shared memory, with a table of where each row came from, and be copied out of it.

Peers are an int64 [R] table of addresses on the device (`pool.addresses(name)`), or the R buffers themselves where one
process holds them all (virtual ranks; plain torch then runs where there are no kernels). Buffers are contiguous and
16-byte aligned. Symbols as in `reroute`; N = T * K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import torch
import triton
from torch import Tensor

from ultraep_compile.codegen import dispatch_kernels as kernels
from ultraep_compile.codegen import dispatch_reference as reference
from ultraep_compile.codegen.reroute import Routing, Window, interpreted
from ultraep_compile.codegen.wire import SCALED, pack_rows_reference, packed_bytes, scales_at, unpack_rows_reference
from ultraep_compile.ops.layout import ExpertLayout

Peers = Tensor | Sequence[Tensor]
WARP_WORDS = 1024
"""Words that a warp holds at a time."""
FEW_PROGRAMS = 128
"""Fewer programs than about this many do not fill a device: each must keep more bytes in flight."""


def push_rows(
    source: Tensor, routing: Routing, peers: Peers, rows: int, layout: ExpertLayout, *, references: Peers | None = None,
    window: Window | None = None, gradient: bool = False, programs: int | None = None,
) -> None:  # fmt: skip
    """Write every travelling pair's row to its place in its destination's buffer, and the padding of its group.

    Args:
        source: [T, ...] one row a token, or [T*K, ...] one row a pair; any dtype.
        peers: buffers [rows, ...] with rows of as many bytes. Rows behind the last group are left as they are.
        references: buffers int32 [rows]; with them a token travels once per destination (needs `routing.lead_TK` and
            one row a token), and the receivers call `spread_rows`.
        window: the round; default `routing.window`.
        gradient: padding becomes zero; else it repeats the first row of its group.
        programs: how many run at a time; few leave the rest of the device to others.
    Example: with K=1, R=1, E=2 and ids [[1], [0], [1]], the rows 0, 1, 2 of the source go to rows 8, 0, 9; rows 1..7
        repeat row 0 and rows 10..15 row 8.
    """
    window = window or routing.window
    tokens, choices = routing.physical_TK.shape
    assert source.shape[0] in (tokens, tokens * choices), "one row a token or a pair"
    divisor = choices if source.shape[0] == tokens else 1
    once = references is not None
    assert not once or (routing.lead_TK is not None and (divisor == choices) and not gradient), "nothing to send once"
    if _in_torch(source):
        return reference.push_rows(source, routing, peers, rows, layout, references, window, gradient)
    pairs = tokens * choices
    if source.numel() == 0:
        return None
    words, shape = _words(source, programs)
    table = addresses(peers, source.device)
    kernels.push[(_programs(programs, triton.cdiv(pairs, shape["ROWS"]), source.device),)](
        words, routing.physical_TK, routing.position_TK, routing.lead_TK if once else table, window.places_P4, table,
        addresses(references, source.device) if references is not None else table, pairs, rows, choices, divisor,
        layout.physical_per_rank, **shape, ONCE=once, GRADIENT=gradient,
    )  # fmt: skip
    return None


def pull_rows(
    out: Tensor, routing: Routing, peers: Peers, rows: int, layout: ExpertLayout, *, window: Window | None = None,
    packed: bool = False, zero_rest: bool = False, programs: int | None = None,
) -> Tensor:  # fmt: skip
    """Fill out [T*K, ...] with every travelling pair's row of its expert's buffer; the way back of `push_rows`.

    Args:
        peers: buffers [rows, ...] with rows of as many bytes, or `packed`: uint8 [rows, packed_bytes(D)].
        zero_rest: the pairs of other rounds become zero, so that rounds add up; else their rows are left alone.
    """
    window = window or routing.window
    if _in_torch(out):
        return reference.pull_rows(out, routing, peers, rows, layout, window, packed, zero_rest)
    pairs, device = out.shape[0], out.device
    if out.numel() == 0:
        return out
    where = (routing.physical_TK, routing.position_TK, window.places_P4, addresses(peers, device), pairs, rows)
    if packed:
        shape = _packed_shape(out.shape[1])
        kernels.pull_packed[(_programs(programs, triton.cdiv(pairs, shape["ROWS"]), device),)](
            out, *where, layout.physical_per_rank, **shape, ZERO=zero_rest
        )
    else:
        words, shape = _words(out, programs)
        kernels.pull[(_programs(programs, triton.cdiv(pairs, shape["ROWS"]), device),)](
            words, *where, layout.physical_per_rank, **shape, ZERO=zero_rest
        )
    return out


def pull_sum(
    out_TD: Tensor, routing: Routing, peers: Peers, rows: int, layout: ExpertLayout, weights_TK: Tensor | None = None,
    *, window: Window | None = None, programs: int | None = None,
) -> Tensor:  # fmt: skip
    """out[t] = sum over k of weights[t, k] * row of pair (t, k), in this order, in fp32: `pull_rows` and the sum in one.

    The bits do not depend on the plan. For callers of the raw op: the compiled model weights and adds by itself.
    """
    window = window or routing.window
    if _in_torch(out_TD):
        return reference.pull_sum(out_TD, routing, peers, rows, layout, weights_TK, window)
    (tokens, width), choices = out_TD.shape, routing.physical_TK.shape[1]
    if out_TD.numel() == 0:
        return out_TD
    table = addresses(peers, out_TD.device)
    size = out_TD.element_size()
    kernels.pull_sum[(_programs(programs, tokens, out_TD.device),)](
        out_TD, table if weights_TK is None else weights_TK.contiguous(), routing.physical_TK, routing.position_TK,
        window.places_P4, table, tokens, rows, width, choices, triton.next_power_of_2(choices),
        layout.physical_per_rank, weights_TK is not None, size, gcd(16, width * size),
        min(1024, triton.next_power_of_2(width)), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out_TD


def sum_choices(pairs: Tensor, choices: int) -> Tensor:
    """[T*K, ...] -> [T, ...]: every token's rows added up in top-k order, in fp32; `pull_sum` of rows that have arrived.

    Example: rows [[1], [2], [3], [4]] of two choices each give [[3], [7]].
    """
    if _in_torch(pairs):
        return reference.sum_choices(pairs, choices)
    pairs = pairs.contiguous()
    out = pairs.new_empty(pairs.shape[0] // choices, *pairs.shape[1:])
    if out.numel():
        tokens, width = out.shape[0], out[0].numel()
        kernels.sum_choices[(_programs(None, tokens, out.device),)](
            pairs, out, tokens, width, choices, min(1024, triton.next_power_of_2(width)), num_warps=4
        )
    return out


def spread_rows(buffer: Tensor, references: Tensor, window: Window, programs: int | None = None) -> None:
    """Copy the rows that were not sent from those that they repeat: buffer[i] = buffer[references[i]] up to the last group.

    Example: offsets [0, 8, 16] and references [0]*8 + [0, 9]... : row 8 becomes a copy of row 0, row 9 came itself.
    """
    if _in_torch(buffer):
        used = int(window.offsets[-1])
        buffer[:used] = buffer[references[:used].long()]
        return
    if buffer.numel():
        words, _ = _words(buffer, programs)
        kernels.spread[(_programs(programs, buffer.shape[0], buffer.device),)](
            words, references, window.offsets, window.offsets.shape[0] - 1, words.shape[1],
            min(4096, triton.next_power_of_2(words.shape[1])), num_warps=4,
        )  # fmt: skip


def clear_rows(buffer: Tensor, window: Window, programs: int | None = None) -> None:
    """Zero the rows behind the last group of the own buffer."""
    if _in_torch(buffer):
        buffer[int(window.offsets[-1]) :] = 0
        return
    if buffer.numel():
        words, _ = _words(buffer, programs)
        kernels.clear[(_programs(programs, buffer.shape[0], buffer.device),)](
            words, window.offsets, buffer.shape[0], window.offsets.shape[0] - 1, words.shape[1],
            min(4096, triton.next_power_of_2(words.shape[1])), num_warps=4,
        )  # fmt: skip


def pack_rows(rows_ND: Tensor, programs: int | None = None) -> Tensor:
    """uint8 [N, packed_bytes(D)]: rows in the fp8 wire format, see `wire`. Bytes that hold nothing are left as they are."""
    if _in_torch(rows_ND):
        return pack_rows_reference(rows_ND)
    n, width = rows_ND.shape
    wire = rows_ND.new_empty(n, packed_bytes(width), dtype=torch.uint8)
    if n:
        shape = _packed_shape(width)
        count = _programs(programs, triton.cdiv(n, shape["ROWS"]), rows_ND.device)
        kernels.pack[(count,)](rows_ND.contiguous(), wire, n, **shape)
    return wire


def unpack_rows(wire: Tensor, out_ND: Tensor, window: Window | None = None, programs: int | None = None) -> Tensor:
    """Fill out [N, D] from packed rows: all of them, or with a window those up to the last group of the own buffer."""
    n, width = out_ND.shape
    if _in_torch(out_ND):
        used = n if window is None else int(window.offsets[-1])
        out_ND[:used] = unpack_rows_reference(wire[:used], width, out_ND.dtype)
        return out_ND
    if n:
        shape = _packed_shape(width)
        groups = 0 if window is None else window.offsets.shape[0] - 1
        kernels.unpack[(_programs(programs, triton.cdiv(n, shape["ROWS"]), out_ND.device),)](
            wire,
            out_ND,
            wire if window is None else window.offsets,
            n,
            groups,
            **shape,
            ALL=window is None,
        )
    return out_ND


def addresses(peers: Peers, device: torch.device) -> Tensor:
    """int64 [R] table of where the peers' buffers begin."""
    if isinstance(peers, Tensor):
        return peers
    assert all(p.is_contiguous() and p.data_ptr() % 16 == 0 for p in peers), "whole, aligned buffers"
    return torch.tensor([p.data_ptr() for p in peers], dtype=torch.int64, device=device)


def _in_torch(tensor: Tensor) -> bool:
    return not tensor.is_cuda and not interpreted()


def _programs(asked: int | None, work: int, device: torch.device) -> int:
    return max(1, min(asked or _all_of(device), work))


@lru_cache(maxsize=16)
def _all_of(device: torch.device) -> int:
    """Programs that fill a device."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _words(rows: Tensor, programs: int | None) -> tuple[Tensor, dict[str, int]]:
    """The rows as [N, WORDS] integers, and how a kernel cuts them into tiles. Few programs hold more words at a time."""
    assert rows.is_contiguous(), "rows are addressed as whole words"
    flat = rows.view(rows.shape[0], -1)
    size = flat.shape[1] * flat.element_size()
    word = torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.uint8
    words = flat.view(word)
    warps = 8 if programs is None or programs >= FEW_PROGRAMS else 16
    block = min(128 * warps, triton.next_power_of_2(words.shape[1]))
    shape = {"WORDS": words.shape[1], "ROWS": min(256, warps * WARP_WORDS // block), "BLOCK": block}
    return words, {**shape, "HINT": gcd(16, size), "num_warps": warps}


def _packed_shape(width: int) -> dict[str, int]:
    blocks = triton.next_power_of_2(triton.cdiv(width, SCALED))
    return {
        "D": width,
        "ROW": packed_bytes(width),
        "SCALES": scales_at(width),
        "ROWS": max(1, min(64, 16384 // (blocks * SCALED))),
        "BLOCKS": blocks,
        "num_warps": 8,
    }
