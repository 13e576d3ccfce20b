"""Give every rank of a process group its own experts, in place, without the model noticing.

A stacked expert tensor [E, ...] becomes a `DTensor` sharded on dim 0, so `state_dict`, optimizers and distributed
checkpoints see the same name, shape and dtype. Read in a forward, the attribute goes through `ultraep::unshard`, which
gathers the whole: the model stays correct in eager mode and under any compiler, and the `ultraep` backend removes the
gather where it balances. Read anywhere else (initialisation, freezing, checkpointing) it is the `DTensor` itself.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from types import FrameType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ultraep_compile.errors import ShardingError
from ultraep_compile.ops.transport import CollectiveTransport, transport_for
from ultraep_compile.preparation import prepare

_SHARDED = "_ultraep_sharded_parameters"


@torch.library.custom_op("ultraep::unshard", mutates_args=())
def unshard(local: Tensor, experts: int, ranks: int, group: str) -> Tensor:
    """All ranks' experts [E, ...] from this rank's [E/R, ...].

    Its gradient is the owner's share of the gradient of the mean of the ranks' losses.
    """
    transport = transport_for(ranks, group)
    assert isinstance(transport, CollectiveTransport)
    out = local.new_empty(experts, *local.shape[1:])
    transport.all_gather(out, local)
    return out


@unshard.register_fake
def _(local: Tensor, experts: int, ranks: int, group: str) -> Tensor:
    return local.new_empty(experts, *local.shape[1:])


@torch.library.custom_op("ultraep::reshard_grad", mutates_args=())
def reshard_grad(grad: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's part [E/R, ...] of the mean over ranks of `grad` [E, ...]."""
    transport = transport_for(ranks, group)
    assert isinstance(transport, CollectiveTransport)
    parts = [p.contiguous() for p in grad.chunk(ranks)]
    # gloo has no reduce_scatter for every build: exchange the parts, then add them in rank order.
    arrived = transport.all_to_all(torch.cat(parts), [p.shape[0] for p in parts], [parts[0].shape[0]] * ranks)
    wide = arrived.view(ranks, -1, *grad.shape[1:]).to(torch.promote_types(grad.dtype, torch.float32))
    return (wide.sum(0) / ranks).to(grad.dtype)


@reshard_grad.register_fake
def _(grad: Tensor, ranks: int, group: str) -> Tensor:
    return grad.new_empty(grad.shape[0] // ranks, *grad.shape[1:])


def _unshard_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, ctx.ranks, ctx.group = inputs


unshard.register_autograd(
    lambda ctx, grad: (reshard_grad(grad.contiguous(), ctx.ranks, ctx.group), None, None, None),
    setup_context=_unshard_setup,
)


def stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, list[str]]]:
    """Modules that hold stacked experts: (name, module, E, names of its per-expert parameters and buffers).

    By structure alone: a module, not a convolution, that owns at least one 3-D parameter, or buffer of quantised weights;
    every parameter it owns with the same leading size belongs to the experts (biases, scales), and so does every buffer
    but those of shape [E], which may as well count tokens. Nothing here looks at names.
    """
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.dim() > 1}
        weights = [*own.values(), *(b for b in buffers.values() if b.element_size() == 1 and b.dtype != torch.bool)]
        sizes = [w.shape[0] for w in weights if w.dim() == 3]
        if not sizes or isinstance(module, nn.modules.conv._ConvNd):
            continue
        experts = max(set(sizes), key=sizes.count)
        own |= buffers
        if experts > 1:
            yield name, module, experts, [n for n, p in own.items() if p.dim() and p.shape[0] == experts]


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep only this rank's experts of every stacked expert module; in place, returns the model. Calls `prepare(model)`.

    Args:
        model: every rank must hold the same weights (same seed or checkpoint), or a model on the meta device, to be
            filled after `to_empty` by a checkpoint.
        mesh: one-dimensional device mesh; rank r keeps experts r*E/R .. (r+1)*E/R - 1.
    Raises: ShardingError if the experts cannot be divided, or the model has none.

    Call it before making the optimizer. Expert parameters are marked so that `DistributedDataParallel` leaves them
    alone; to `fully_shard` give them as `ignored_params`. Their gradients come out as those of the mean of the mesh's
    ranks' losses, like DDP's. `ultraep_compile.clip_grad_norm_` clips sharded and other parameters by one norm.
    """
    if mesh.ndim != 1:
        raise ShardingError(
            f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}. Pass the one-dimensional expert mesh, e.g. mesh['ep']."
        )
    prepare(model)
    found = [f for f in stacked_experts(model) if not hasattr(f[1], _SHARDED)]
    if not found and not any(hasattr(m, _SHARDED) for m in model.modules()):
        raise ShardingError(f"no stacked experts found: {_what_there_is(model)}")
    ranks = mesh.size()
    for name, module, experts, _ in found:
        if experts % ranks:
            fits = [r for r in range(1, experts + 1) if experts % r == 0]
            raise ShardingError(
                f"{name}: {experts} experts cannot be divided over {ranks} ranks. Use a mesh of a size out of {fits}."
            )
        _refuse_unregistered(name, module, experts)
    _refuse_foreign_ties(model, found)
    if ranks < dist.get_world_size():
        warnings.warn(
            f"ultraep: experts are divided over {ranks} of {dist.get_world_size()} processes, and their gradients are those of "
            "these. Where others hold the same experts, average the gradients of expert parameters over them.",
            stacklevel=2,
        )
    ignored: set[str] = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    ties: dict[Tensor, Tensor] = {}
    for name, module, experts, tensors in found:
        for tensor in tensors:
            _shard(module, tensor, mesh, ties)
            ignored.add(f"{name}.{tensor}" if name else tensor)
        module.__class__ = _sharded_class(type(module), tuple(tensors), experts, ranks, mesh.get_group().group_name)
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # pyright: ignore[reportArgumentType]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)  # pyright: ignore[reportArgumentType]
    return model


def _save_pretrained(self: Any, save_directory: Any, *args: Any, state_dict: dict | None = None, **kwargs: Any) -> Any:
    """transformers' `save_pretrained` with gathered experts, since its format holds whole tensors. Call it on every rank;
    rank 0 writes.
    """
    writes = dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    for name, tensor in (self.state_dict() if state_dict is None else state_dict).items():
        value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if writes:
            whole[name] = value
    return type(self).save_pretrained(self, save_directory, *args, state_dict=whole, **kwargs)


def _refuse_unregistered(name: str, module: nn.Module, experts: int) -> None:
    for attribute, value in vars(module).items():
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == experts:
            raise ShardingError(
                f"{f'{name}.' if name else ''}{attribute} is a tensor of shape {list(value.shape)} for {experts} experts, but "
                "neither a parameter nor a buffer: no checkpoint has it and it cannot be divided. Register it as a buffer."
            )


def _refuse_foreign_ties(model: nn.Module, found: list[tuple[str, nn.Module, int, list[str]]]) -> None:
    """A tensor may be tied between expert modules, where all its places change together, but not to anything else."""
    places = {(m, tensor) for _, m, _, tensors in found for tensor in tensors}
    names = {getattr(m, tensor): f"{name}.{tensor}" for name, m, _, tensors in found for tensor in tensors}
    for path, module in model.named_modules():
        for tensor, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and value in names and (module, tensor) not in places:
                raise ShardingError(
                    f"{names[value]} is tied to {path}.{tensor}, which holds no experts. Untie them first."
                )


def _what_there_is(model: nn.Module) -> str:
    """Why there is nothing to shard, and what to do."""
    for name, module in model.named_modules():
        parts = list(module.children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
        shapes = {tuple((n, p.shape) for n, p in part.named_parameters()) for part in parts}
        if len(parts) > 1 and len(shapes) == 1 and "expert" in name.lower():
            return (
                f"{name} is a {type(module).__name__} of {len(parts)} modules, one for each expert, and only parameters of "
                "shape [experts, in, out] can be sharded. Stack them, or keep the experts whole and pass options={'group': ...}."
            )
    return (
        "no module owns a parameter of shape [experts, in, out]. `ultraep-compile explain` shows what the model looks like "
        "to us."
    )


def _shard(module: nn.Module, name: str, mesh: DeviceMesh, ties: dict[Tensor, Tensor]) -> None:
    """Put this rank's part into the place of a whole tensor. `ties` keeps tied tensors tied."""
    holder = module._parameters if name in module._parameters else module._buffers
    whole = holder[name]
    assert whole is not None
    if whole not in ties:
        part = _own_part(whole.detach(), mesh)
        ties[whole] = nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part
        vars(ties[whole]).update(vars(whole))  # marks that optimizers and libraries left
    holder[name] = ties[whole]  # pyright: ignore[reportArgumentType]


def _own_part(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    here = whole.shape[0] // mesh.size()
    local = whole.narrow(0, mesh.get_local_rank() * here, here).clone(memory_format=torch.contiguous_format)
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=stride)


@functools.cache
def _sharded_class(base: type[nn.Module], names: tuple[str, ...], experts: int, ranks: int, group: str) -> type:
    """The module's own class, but reading a sharded tensor in a forward gathers it, and loading divides whole tensors."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Any:
            tensor = self._parameters[name] if name in self._parameters else self._buffers[name]
            if isinstance(tensor, DTensor) and (torch.compiler.is_compiling() or _in_a_forward()):
                return torch.ops.ultraep.unshard(tensor.to_local(), experts, ranks, group)
            return tensor

        return property(read)

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in names:
            given = state_dict.get(prefix + name)
            tensor = self._parameters.get(name, self._buffers.get(name))
            if not isinstance(given, Tensor) or isinstance(given, DTensor) or not isinstance(tensor, DTensor):
                continue
            if given.shape == tensor.shape:
                given = given if tensor.is_meta else given.to(tensor.device)
                state_dict[prefix + name] = _own_part(given, tensor.device_mesh)
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    members: dict[str, Any] = {name: reader(name) for name in names}
    members |= {_SHARDED: names, "_load_from_state_dict": load, "__module__": base.__module__}
    return type(base.__name__, (base,), members)


def _in_a_forward() -> bool:
    """Is a module being called? Only there do weights take part in a computation; elsewhere they are held, initialised or
    saved, perhaps on one rank alone, and a gather would wait for the others for ever.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._wrapped_call_impl.__code__:
        frame = frame.f_back
    return frame is not None
