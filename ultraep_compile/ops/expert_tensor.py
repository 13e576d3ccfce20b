"""A tensor of one expert that one rank holds: what `shard_experts` makes of the parameters of experts that are modules.

It is a `DTensor` on the mesh of its owner alone, which is what torch's checkpoints, optimizers and compilers understand
as "another rank has it". Three things differ from a plain one: `full_tensor` brings the value to every rank of the group,
so does what `get_model_state_dict(..., full_state_dict=True)` calls, and `set_model_state_dict(..., broadcast_from_rank0=True)`
may write to it on ranks that hold nothing. Torch makes plain ones of an optimizer's state when it loads a whole state dict;
`follow_optimizers` sees to it that they are of this kind again.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from ultraep_compile.exchange import line_named

_SUBCLASSES_DISPATCH = torch.__version__ >= "2.13"
"""Does torch come to `__torch_dispatch__` for kinds of `DTensor`? 2.11 does not: what Python calls is marked there instead."""


class ExpertTensor(DTensor):
    """See the module. Made by `own`, or by `mark` from a `DTensor` that torch computed from one."""

    _expert_group: str
    """Name of the group whose ranks share the experts."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        return _like_given(out, args, kwargs, func._schema.is_mutable)

    if not _SUBCLASSES_DISPATCH:

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **(kwargs or {}))
            return _like_given(out, args, kwargs, mutable=True)

    @staticmethod
    def __tensor_unflatten__(*parts: Any) -> ExpertTensor:
        return mark(DTensor.__tensor_unflatten__(*parts), "")

    @property
    def owner(self) -> int:
        """Global rank that holds the value."""
        return int(self.device_mesh.mesh.flatten()[0])

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        """What this rank holds. To torch's broadcast of a state dict, which writes to it on all ranks as if each had a part,
        the others give memory that is forgotten.
        """
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code.co_name == "_distribute_tensors":
            if self.device_mesh.get_coordinate() is None:
                return self._local_tensor.new_empty(self.shape)
        return super().to_local(grad_placements=grad_placements)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The value, on every rank of the group; all of them must call this."""
        line = line_named(vars(self)["_expert_group"])
        out = torch.empty(self.shape, dtype=self.dtype, device=self.to_local().device)
        if dist.get_rank() == self.owner:
            out.copy_(self.to_local().detach())
        line.broadcast(out, line.ranks.index(self.owner), "an expert's whole weights")
        return out

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **_: Any) -> DTensor:
        """Called by torch to gather a state dict."""
        return DTensor.from_local(self.full_tensor(), _mesh_of(dist.get_rank(), self.device.type), [Replicate()], run_check=False)

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        grad = DTensor.grad.__get__(self)  # type: ignore[attr-defined]
        return mark(grad, vars(self).get("_expert_group", "")) if type(grad) is DTensor else grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        DTensor.grad.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertTensor:
        if id(self) in memo:
            return memo[id(self)]
        new = _distributed(self._local_tensor.detach().clone(), self.device_mesh, self.shape, self.stride())
        if isinstance(self, nn.Parameter):
            new = nn.Parameter(new, self.requires_grad)
        assert isinstance(new, DTensor)
        new = mark(new, vars(self)["_expert_group"])
        memo[id(self)] = new
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        return new


def _like_given(out: Any, args: Any, kwargs: Any, mutable: bool) -> Any:
    """What an op made of our tensors: ours as well, and the very tensor where it wrote to one."""
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, ExpertTensor)]
    group = next((vars(t).get("_expert_group", "") for t in given), "")
    written = {id(t._local_tensor): t for t in given} if mutable else {}

    def as_given(value: Any) -> Any:
        if type(value) is not DTensor:
            return value
        return written.get(id(value._local_tensor)) if id(value._local_tensor) in written else mark(value, group)

    return pytree.tree_map(as_given, out)


def own(whole: Tensor, owner: int, group: str) -> ExpertTensor:
    """An expert's tensor, held by global rank `owner`. Every rank of the world must come here in the same order."""
    mine = dist.get_rank() == owner
    local = whole.detach().clone(memory_format=torch.contiguous_format) if mine else whole.new_empty(0)
    stride = torch.empty(whole.shape, device="meta").stride()
    return mark(_distributed(local, _mesh_of(owner, whole.device.type), whole.shape, stride), group)


def mark(tensor: DTensor, group: str) -> ExpertTensor:
    """Make a `DTensor` on its owner's mesh one of ours, in place."""
    tensor.__class__ = ExpertTensor
    tensor._expert_group = group  # type: ignore[attr-defined]
    if tensor.device_mesh.get_coordinate() is None and tensor._local_tensor.dim() != max(tensor.dim(), 1):
        # Elsewhere torch keeps a part of one dim; autograd of `to_local` wants as many dims as the whole has.
        tensor._local_tensor = tensor._local_tensor.new_empty(0, *tensor.shape[1:])
    return tensor  # type: ignore[return-value]


torch.serialization.add_safe_globals([ExpertTensor])  # as DTensor is: for `torch.load(weights_only=True)`


@functools.cache
def follow_optimizers() -> None:
    """From an optimizer's first step on, which loading a state dict makes if there was none: what it loads for our tensors
    is made ours.
    """
    known: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def loaded(optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            if isinstance(parameter, ExpertTensor):
                for value in state.values():
                    if type(value) is DTensor:
                        mark(value, vars(parameter)["_expert_group"])

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in known or not any(isinstance(p, ExpertTensor) for g in optimizer.param_groups for p in g["params"]):
            return
        known.add(optimizer)
        optimizer.register_load_state_dict_post_hook(loaded)

    register_optimizer_step_pre_hook(before_step)


def _distributed(local: Tensor, mesh: DeviceMesh, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    return DTensor.from_local(local, mesh, [Replicate()], run_check=False, shape=shape, stride=stride)


_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, list[DeviceMesh]]] = weakref.WeakKeyDictionary()


def _mesh_of(rank: int, device: str) -> DeviceMesh:
    """The mesh of one rank; the meshes of all are made together, since every process must take part."""
    kind = next((t for t in ("cuda", "cpu") if t == device), "cuda" if torch.cuda.is_available() else "cpu")
    world = dist.group.WORLD
    assert world is not None
    of_world = _meshes.setdefault(world, {})
    if kind not in of_world:
        of_world[kind] = [DeviceMesh(kind, [each]) for each in range(dist.get_world_size())]
    return of_world[kind][rank]
