"""The fp8 wire format: rows of e4m3 bytes followed by one fp32 scale for every 128 elements.

A packed row has `packed_bytes(D)` bytes: D e4m3 numbers, up to a multiple of 16; ceil(D / 128) scales; again up to a
multiple of 16. Scales are powers of two, the smallest that bring the largest of their 128 elements to at most 448.
For a format with an exponent a power of two costs no precision, and packing is the same bit for bit wherever it runs:
x becomes e4m3(x / scale) * scale, off by at most 2^-4 of |x|, and by at most scale * 2^-10 where |x| < scale * 2^-6.
Infinities travel as NaN (e4m3 has none), and do not disturb the rest of their 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALED = 128
"""Elements that share a scale."""


def scales_at(width: int) -> int:
    """Byte of a packed row at which its scales begin."""
    return -(-width // 16) * 16


def packed_bytes(width: int) -> int:
    """Bytes of a packed row of `width` elements. Example: 4096 elements take 4096 + 4 * 32 = 4224."""
    return scales_at(width) + -(-4 * -(-width // SCALED) // 16) * 16


def pack_rows_reference(rows_ND: Tensor) -> Tensor:
    """uint8 [N, packed_bytes(D)] of floating rows; bytes that hold nothing are zero.

    Example: a row of one element 3.0 is scaled by 2^-7 to 384, the byte 0x7c; the scale is 2^-7.
    """
    n, width = rows_ND.shape
    blocks = -(-width // SCALED)
    x = torch.nn.functional.pad(rows_ND.float(), (0, blocks * SCALED - width)).view(n, blocks, SCALED)
    finite = x.abs() < float("inf")
    most = torch.where(finite, x.abs(), 0).amax(2, keepdim=True)
    bits = most.view(torch.int32)
    exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp(min=1)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    y = torch.where(finite, x * inverse, float("nan")).to(torch.float8_e4m3fn).view(torch.uint8)
    wire = rows_ND.new_zeros(n, packed_bytes(width), dtype=torch.uint8)
    wire[:, :width] = y.flatten(1)[:, :width]
    at = scales_at(width)
    wire[:, at : at + 4 * blocks] = (exponent << 23).view(n, blocks).contiguous().view(torch.uint8)
    return wire


def unpack_rows_reference(wire: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[N, width] of packed rows."""
    blocks, at = -(-width // SCALED), scales_at(width)
    x = wire[:, :width].contiguous().view(torch.float8_e4m3fn).float()
    scale = wire[:, at : at + 4 * blocks].contiguous().view(torch.float32)
    return (x * scale.repeat_interleave(SCALED, 1)[:, :width]).to(dtype)
