"""What torch exchanges for a `DTensor`, under a deadline of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ultraep_compile.exchange.line import line_of

T = TypeVar("T")


def over_mesh(mesh: DeviceMesh, call: Callable[[], T], what: str) -> T:
    """The result of a call in which torch exchanges over a mesh; all of its ranks make it."""
    if mesh.get_coordinate() is None or mesh.size() == 1:
        return call()
    wide = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    return line_of(mesh.get_group(wide[0])).guard(call, what)


def whole(tensor: Tensor, what: str) -> Tensor:
    """A tensor, or the whole of a distributed one; then all ranks of its mesh come here."""
    if type(tensor) is not DTensor:  # kinds of our own have their own exchange
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return over_mesh(tensor.device_mesh, tensor.full_tensor, what)
