"""What travels between ranks: any nest of tensors and plain values, with its shapes written in front.

A message is a header (JSON, so that reading it runs no code) and one buffer of bytes with all tensors behind one
another. Nobody guesses a shape: the receiver allocates what the header says."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

_ALIGN = 16  # bytes: every dtype can be viewed at such an offset
_TENSOR, _TUPLE = "tensor", "tuple"


def pack(value: Any) -> tuple[Any, list[Tensor]]:
    """A description of `value` that JSON can hold, and its tensors in order.

    >>> pack((torch.ones(2, 3), None, 5))[0]
    {'tuple': [{'tensor': ['float32', [2, 3]]}, None, 5]}
    """
    tensors: list[Tensor] = []

    def describe(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part.detach())
            return {_TENSOR: [str(part.dtype).removeprefix("torch."), list(part.shape)]}
        if isinstance(part, (tuple, list)):
            return {_TUPLE: [describe(x) for x in part]}
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        raise TypeError(
            f"a {type(part).__name__} cannot travel between stages; tensors, numbers, strings, None and tuples of them can"
        )

    return describe(value), tensors


def unpack(description: Any, tensors: list[Tensor]) -> Any:
    """The inverse of `pack`; lists come back as tuples."""
    left = iter(tensors)

    def build(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if _TENSOR in part:
            return next(left)
        return tuple(build(x) for x in part[_TUPLE])

    return build(description)


def encode(fields: dict[str, Any], width: int) -> tuple[Tensor, Tensor | None]:
    """`fields` as JSON in `width` bytes; what does not fit comes as a second tensor, announced by the first."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    if len(text) <= width - 8:
        return _fixed(text, 0, width), None
    return _fixed(b"", len(text), width), torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _fixed(text: bytes, more: int, width: int) -> Tensor:
    head = len(text).to_bytes(4, "little") + more.to_bytes(4, "little") + text
    return torch.frombuffer(bytearray(head.ljust(width, b"\0")), dtype=torch.uint8)


def decode(head: Tensor) -> tuple[dict[str, Any] | None, int]:
    """(fields, 0), or (None, bytes of the second tensor)."""
    raw = bytes(head.numpy())
    length, more = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")
    return (None, more) if more else (json.loads(raw[8 : 8 + length]), 0)


def shapes(description: Any) -> list[tuple[torch.dtype, list[int]]]:
    """dtype and shape of each tensor of a description, in order."""
    if not isinstance(description, dict):
        return []
    if _TENSOR in description:
        name, shape = description[_TENSOR]
        return [(getattr(torch, name), shape)]
    return [entry for part in description[_TUPLE] for entry in shapes(part)]


def to_bytes(tensors: list[Tensor]) -> Tensor:
    """All tensors in one buffer, each at a multiple of 16 bytes. A lone contiguous tensor is not copied."""
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in tensors if t.numel()]
    if len(flat) == 1:
        return flat[0]
    sizes = [_padded(f.numel()) for f in flat]
    buffer = flat[0].new_empty(sum(sizes)) if flat else torch.empty(0, dtype=torch.uint8)
    at = 0
    for part, size in zip(flat, sizes, strict=True):
        buffer[at : at + part.numel()] = part
        at += size
    return buffer


def from_bytes(buffer: Tensor, entries: list[tuple[torch.dtype, list[int]]]) -> list[Tensor]:
    """The tensors in a buffer, as views of it."""
    tensors, at = [], 0
    for dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        tensors.append(buffer[at : at + size].view(dtype).view(shape) if size else buffer.new_empty(shape, dtype=dtype))
        at += _padded(size)
    return tensors


def buffer_size(entries: list[tuple[torch.dtype, list[int]]]) -> int:
    """Bytes that `to_bytes` makes of tensors of these shapes."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in entries]
    sizes = [s for s in sizes if s]
    return sizes[0] if len(sizes) == 1 else sum(_padded(s) for s in sizes)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
