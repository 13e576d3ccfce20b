"""Are weights that every rank should hold whole the same on all of them? By digests, which are cheap to send."""

from __future__ import annotations

import weakref
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.errors import TopologyError
from ultraep_compile.exchange import line_of
from ultraep_compile.ops.groups import resolve

Value = TypeVar("Value")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits read as integers, int64 []: exact, and the same in any order of summing.

    Example: float32 [0.0, 1.0] -> 0x3f800000 = 1065353216.
    """
    return _bits(tensor).sum(dtype=torch.int64)


_EXACT = 2**20  # elements up to which every place has a weight of its own: 8 MiB of products
_ROW = 1024


def ordered_digest(tensor: Tensor) -> Tensor:
    """A sum of a tensor's bits in which every place has its own weight, int64 []: it changes where values change places, too.

    Large tensors are read as a table whose sums of rows and of columns are weighed, so that nothing of their size is made.
    """
    flat = _bits(tensor).reshape(-1)
    if flat.numel() <= _EXACT:
        return (flat * _weights(flat.numel(), flat.device)).sum()
    whole = flat.numel() // _ROW * _ROW
    table = flat[:whole].view(-1, _ROW)
    rows, columns = table.sum(1, dtype=torch.int64), table.sum(0, dtype=torch.int64)
    weighed = [x * _weights(x.numel(), x.device) for x in (rows, columns, flat[whole:])]
    return sum((x.sum() * (2 * n + 1) for n, x in enumerate(weighed)), flat.new_zeros((), dtype=torch.int64))


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits read as integers of its elements' size."""
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return plain.contiguous().view(_INTEGERS[plain.element_size()])


def _weights(count: int, device: torch.device) -> Tensor:
    """`count` odd numbers in no evident order, int64; products with them wrap around."""
    place = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    return ((place ^ (place >> 29)) * 0x3F58476D1CE4E5B9) | 1


_compared: weakref.WeakKeyDictionary[dist.ProcessGroup, set[tuple]] = weakref.WeakKeyDictionary()


def weights_must_be_alike(layer: str, group: str, params: list[Tensor]) -> None:
    """At the first step of a layer with experts that all ranks hold whole; all ranks come here together.

    Raises: TopologyError on all ranks.
    """
    ranks = resolve(group)
    compared, what = _compared.setdefault(ranks, set()), (layer, *(p.shape for p in params))
    if what in compared or not params:
        return
    mine = tuple(torch.stack([digest(p) for p in params]).tolist())
    digests = line_of(ranks).gather_objects(mine, "digests of all ranks' weights")
    if len(set(digests)) > 1:
        other = next(r for r, d in enumerate(digests) if d != digests[0])
        raise TopologyError(
            f"{layer}: with the option 'group' every rank must hold all experts, the same on all ranks, but the weights of ranks 0 and "
            f"{other} differ. If each rank holds experts of its own (the model is expert-parallel already), leave 'group' out; if "
            "they should be the same, load the same weights on all ranks, or call shard_experts."
        )
    compared.add(what)


def from_all_ranks(group: str, value: Value) -> list[Value]:
    """Every rank's value, in rank order, on all of them; the value alone without a group. All ranks must come here together."""
    if not group:
        return [value]
    return line_of(resolve(group)).gather_objects(value, "what every rank has")
