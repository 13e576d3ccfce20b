"""Give every rank of a process group its own experts, in place, without the model noticing.

A stacked expert parameter [E, ...] becomes a `DTensor` sharded on dim 0, so `state_dict`, optimizers and distributed
checkpoints see the same name, shape and dtype. Reading the attribute in a forward goes through `ultraep::unshard`, which
gathers the whole parameter: the model stays correct in eager mode and under any compiler, and the `ultraep` backend removes
the gather where it balances.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ultraep_compile.errors import ShardingError
from ultraep_compile.ops.transport import CollectiveTransport, transport_for

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
    """Modules that hold stacked experts: (name, module, E, names of its per-expert parameters).

    By structure alone: a module, not a convolution, that owns at least one 3-D parameter; everything it owns with the same
    leading size belongs to the experts (biases, scales). Nothing here looks at names.
    """
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        sizes = [p.shape[0] for p in own.values() if p.dim() == 3]
        if not sizes or isinstance(module, nn.modules.conv._ConvNd):
            continue
        experts = max(set(sizes), key=sizes.count)
        if experts > 1:
            yield name, module, experts, [n for n, p in own.items() if p.dim() and p.shape[0] == experts]


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep only this rank's experts of every stacked expert module; in place, returns the model.

    Args:
        model: every rank must hold the same weights (same seed or checkpoint).
        mesh: one-dimensional device mesh; rank r keeps experts r*E/R .. (r+1)*E/R - 1.
    Raises: ShardingError if the experts cannot be divided, or the model has none.

    Wrap the result in `DistributedDataParallel` for the dense part: expert parameters are marked so that DDP leaves them
    alone. Their gradients come out as those of the mean of the ranks' losses, like DDP's.
    """
    if mesh.ndim != 1:
        raise ShardingError(
            f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}. Pass the one-dimensional expert mesh, e.g. mesh['ep']."
        )
    ranks, group = mesh.size(), mesh.get_group().group_name
    found = [f for f in stacked_experts(model) if not hasattr(f[1], _SHARDED)]
    if not found and not any(hasattr(m, _SHARDED) for m in model.modules()):
        raise ShardingError(
            "no stacked experts found: no module owns a parameter of shape [experts, in, out]. `ultraep-compile explain` shows "
            "what the model looks like to us."
        )
    for name, _, experts, _ in found:
        if experts % ranks:
            fits = [r for r in range(1, experts + 1) if experts % r == 0]
            raise ShardingError(
                f"{name}: {experts} experts cannot be divided over {ranks} ranks. Use a mesh of a size out of {fits}."
            )
    ignored: set[str] = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, module, experts, parameters in found:
        for parameter in parameters:
            _shard_parameter(module, parameter, mesh, experts)
            ignored.add(f"{name}.{parameter}" if name else parameter)
        _install_properties(module, parameters, experts, ranks, group)
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # pyright: ignore[reportArgumentType]
    return model


def _shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, experts: int) -> None:
    whole = module._parameters[name]
    assert whole is not None
    here = experts // mesh.size()
    rank = mesh.get_local_rank()
    local = whole.detach()[rank * here : (rank + 1) * here].clone()
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    module._parameters[name] = nn.Parameter(sharded, requires_grad=whole.requires_grad)


def _install_properties(module: nn.Module, names: list[str], experts: int, ranks: int, group: str) -> None:
    """Make `module.<name>` read the gathered parameter, by a subclass of the module's own class."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            return torch.ops.ultraep.unshard(self._parameters[name].to_local(), experts, ranks, group)  # pyright: ignore

        return property(read)

    base = type(module)
    members: dict[str, Any] = {name: reader(name) for name in names}
    module.__class__ = type(base.__name__, (base,), {**members, _SHARDED: tuple(names), "__module__": base.__module__})
