"""Classes of modules whose parameters are divided: what reads, loads, copies and casts them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ultraep_compile.errors import ShardingError
from ultraep_compile.ladder.divided import DIVISION, Division
from ultraep_compile.ladder.install import swap_class
from ultraep_compile.ops.expert_tensor import ExpertTensor, mark, own
from ultraep_compile.ops.groups import resolve

_SHARDED = "_ultraep_sharded_parameters"


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, _SHARDED)


def replace(module: nn.Module, name: str, part_of: Callable[[Tensor], Tensor], ties: dict[Tensor, Tensor]) -> None:
    """Put this rank's part into the place of a whole tensor. `ties` keeps tied tensors tied."""
    holder = module._parameters if name in module._parameters else module._buffers
    whole = holder[name]
    assert whole is not None
    if isinstance(whole, DTensor):
        return  # another layer has the same experts
    if whole not in ties:
        part = part_of(whole.detach())
        ties[whole] = nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part
        if isinstance(part, ExpertTensor):
            mark(ties[whole], vars(part)["_expert_group"])  # pyright: ignore[reportArgumentType]
        vars(ties[whole]).update(vars(whole))  # marks that optimizers and libraries left
    holder[name] = ties[whole]  # pyright: ignore[reportArgumentType]


def own_part(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    here = whole.shape[0] // mesh.size()
    local = whole.narrow(0, mesh.get_local_rank() * here, here).clone(memory_format=torch.contiguous_format)
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=stride)


@functools.cache
def sharded_class(base: type[nn.Module], names: tuple[str, ...], ranks: int, group: str) -> type:
    """The module's own class, but reading a sharded tensor in a forward gathers it, and loading divides whole tensors."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Any:
            tensor = self._parameters[name] if name in self._parameters else self._buffers[name]
            if isinstance(tensor, DTensor) and (torch.compiler.is_compiling() or _in_a_forward()):
                return torch.ops.ultraep.unshard(tensor.to_local(), tensor.shape[0], ranks, group)
            return tensor

        return property(read)

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in names:
            given = state_dict.get(prefix + name)
            tensor = self._parameters.get(name, self._buffers.get(name))
            _refuse_part_of_other(prefix + name, given, group)
            if not isinstance(given, Tensor) or isinstance(given, DTensor) or not isinstance(tensor, DTensor):
                continue
            if given.shape == tensor.shape:
                given = given if tensor.is_meta else given.to(tensor.device)
                state_dict[prefix + name] = own_part(given, tensor.device_mesh)
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    def save(self: nn.Module, destination: dict[str, Any], prefix: str, *rest: Any) -> None:
        base._save_to_state_dict(self, destination, prefix, *rest)
        for name in names:
            _sign(destination.get(prefix + name), group)

    members: dict[str, Any] = {name: reader(name) for name in names}
    members |= {_SHARDED: names, "_load_from_state_dict": load, "_save_to_state_dict": save, "__module__": base.__module__}
    return type(base.__name__, (base,), members)


_PART_OF = "_ultraep_part_of"


def _sign(part: Any, group: str) -> None:
    """Whose part this is: the sign stays on the tensor through `torch.save` and `torch.load`."""
    if isinstance(part, DTensor):
        setattr(part, _PART_OF, _rank_in(group))


def _refuse_part_of_other(name: str, given: Any, group: str) -> None:
    """A file that one rank wrote holds that rank's experts: on another they would take the places of its own."""
    rank = getattr(given, _PART_OF, None)
    if rank is not None and rank != (mine := _rank_in(group)):
        raise ShardingError(
            f"{name}: this state dict has the experts of rank {rank}, and is loaded on rank {mine}. torch.save of a sharded model's "
            "state_dict writes the part of the rank that calls it. Save with torch.distributed.checkpoint, or a whole one "
            "(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), model.save_pretrained)."
        )


def _rank_in(group: str) -> int:
    return dist.get_rank(resolve(group))


def _in_a_forward() -> bool:
    """Is a module being called? Only there do weights take part in a computation; elsewhere they are held, initialised or
    saved, perhaps on one rank alone, and a gather would wait for the others for ever.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._wrapped_call_impl.__code__:
        frame = frame.f_back
    return frame is not None


def divide_class(module: nn.Module, division: Division) -> None:
    """Give a lifted layer a class that knows how its experts are divided."""
    base = type(module)
    names = {name for role in division.lists for name in role}

    def parameter(self: nn.Module, path: str) -> Tensor | None:
        parent, _, name = path.rpartition(".")
        return self.get_submodule(parent)._parameters.get(name)

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in names:
            given, tensor = state_dict.get(prefix + name), parameter(self, name)
            _refuse_part_of_other(prefix + name, given, division.group)
            if type(given) is DTensor and isinstance(tensor, ExpertTensor):
                mark(given, division.group)  # torch made it, of a whole one
            if not isinstance(given, Tensor) or isinstance(given, DTensor) or not isinstance(tensor, ExpertTensor):
                continue
            if given.shape == tensor.shape:
                given = given if tensor.is_meta else given.to(tensor.device)
                state_dict[prefix + name] = own(given, tensor.owner, division.group)
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = base.state_dict(self, *args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in names:
            if type(value := state.get(prefix + name)) is DTensor:
                mark(value, division.group)
            _sign(state.get(prefix + name), division.group)
        return state

    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        base._apply(self, *args, **kwargs)
        for name in names:
            if isinstance(tensor := parameter(self, name), DTensor):
                mark(tensor, division.group)
        return self

    members = {DIVISION: division, "_load_from_state_dict": load, "state_dict": state_dict, "_apply": apply, _SHARDED: ()}
    swap_class(module, members)
