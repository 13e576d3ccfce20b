"""What a `DTensor` needs of other ranks, over our lines: a failure then leaves nothing under way in the user's group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ultraep_compile.exchange.line import Line, line_of

T = TypeVar("T")


def over_mesh(mesh: DeviceMesh, call: Callable[[], T], what: str) -> T:
    """The result of a call in which torch itself exchanges over a mesh; all of its ranks make it."""
    if mesh.get_coordinate() is None or mesh.size() == 1:
        return call()
    wide = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    return line_of(mesh.get_group(wide[0])).guard(call, what)


def plainly_divided(tensor: DTensor) -> bool:
    """Is a tensor cut along dims, or whole, on every mesh dim? Not so partial sums and the strided shards of several dims."""
    return all(type(p) in (Shard, Replicate) for p in tensor.placements)


def shards(tensor: DTensor) -> Iterator[tuple[Line, int]]:
    """(line of the ranks between which a tensor is cut, dim it is cut along), last cut first."""
    for dim in reversed(range(tensor.device_mesh.ndim)):
        placement = tensor.placements[dim]
        if isinstance(placement, Shard) and tensor.device_mesh.size(dim) > 1:
            yield line_of(tensor.device_mesh.get_group(dim)), placement.dim


def whole(tensor: Tensor, what: str) -> Tensor:
    """A tensor, or the whole of a distributed one; then all ranks of its mesh come here."""
    if type(tensor) is not DTensor:  # kinds of our own have their own exchange
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if not plainly_divided(tensor):
        return over_mesh(tensor.device_mesh, tensor.full_tensor, what)
    made = tensor.to_local().detach()
    if tensor.device_mesh.get_coordinate() is not None:
        for line, dim in shards(tensor):
            made = _joined(line, made, dim, what)
    return made


def _joined(line: Line, part: Tensor, dim: int, what: str) -> Tensor:
    """Every rank's part behind one another along `dim`; parts may be of different sizes."""
    shapes = line.gather_objects(tuple(part.shape), what)
    most = max(torch.Size(s).numel() for s in shapes)
    padded = part.new_zeros(most)
    padded[: part.numel()] = part.reshape(-1)
    rows = part.new_empty(line.size, most)
    line.all_gather(rows, padded, what)
    return torch.cat([row[: torch.Size(s).numel()].view(s) for row, s in zip(rows, shapes, strict=True)], dim)
