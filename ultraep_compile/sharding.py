"""Give every rank of a process group its own experts, in place, without the model noticing.

A stacked expert tensor [E, ...] becomes a `DTensor` sharded on dim 0, a tensor of one expert an `ExpertTensor` on its
owner, so `state_dict`, optimizers and distributed checkpoints see the same name, shape and dtype. Read in a forward, a
stacked attribute goes through `ultraep::unshard`, which gathers the whole: the model stays correct in eager mode and
under any compiler, and the `ultraep` backend removes the gather where it balances. Read anywhere else (initialisation,
freezing, checkpointing) it is the `DTensor` itself. Layers that were lifted gather once a call (`ladder/divided.py`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ultraep_compile.errors import ArgumentError, ShardingError, need_model
from ultraep_compile.exchange import at, failing
from ultraep_compile.exchange.distributed_tensors import whole
from ultraep_compile.ladder.divided import Division, division_of
from ultraep_compile.ladder.install import LayerFacts, lifted_layer
from ultraep_compile.ops.expert_tensor import follow_optimizers, own
from ultraep_compile.preparation import findings_of, prepare
from ultraep_compile.sharded_modules import divide_class, is_sharded, own_part, replace, sharded_class

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class _Stack:
    """Tensors of one module that hold all experts along dim 0."""

    path: str
    module: nn.Module
    experts: int
    names: list[str]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A lifted layer: its experts' parameters as paths inside the module."""

    path: str
    module: nn.Module
    facts: LayerFacts

    def lists(self) -> Iterator[tuple[str, ...]]:
        """Roles with a parameter for each expert. One without dims stays whole on all ranks."""
        for names in self.facts.holders:
            if len(names) > 1 and self.module.get_parameter(names[0]).dim():
                yield names

    def stacks(self) -> Iterator[str]:
        """Parameters in which the experts stand one after the other."""
        for names in self.facts.holders:
            shape = self.module.get_parameter(names[0]).shape
            if len(names) == 1 and (shape[0] % (self.facts.experts or 1) == 0 or self.groups_of(names[0])):
                yield names[0]

    def groups_of(self, name: str) -> int | None:
        """Groups along the first dim of a parameter [groups, experts of a group, ...]; None where experts have one dim."""
        shape, experts = self.module.get_parameter(name).shape, self.facts.experts
        several = any(math.prod(shape[:depth]) == experts for depth in range(2, len(shape) - 1))
        return shape[0] if several and shape[0] != experts else None


def shard_experts(
    model: nn.Module, mesh: DeviceMesh, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None
) -> nn.Module:
    """Keep only this rank's experts of every MoE layer; in place, returns the model. Calls `prepare(model, example_inputs)`.

    Args:
        model: every rank must hold the same weights (same seed or checkpoint), or a model on the meta device, to be
            filled after `to_empty` by a checkpoint.
        mesh: one-dimensional device mesh; rank r keeps experts r*E/R .. (r+1)*E/R - 1.
        example_inputs: of one forward. Needed where experts are modules of their own or rows of a flat matrix, which only a
            forward tells from other modules; not needed again after `prepare(model, example_inputs)`, nor for transformers
            models that bring `dummy_inputs`.
    Raises: ShardingError if the experts cannot be divided, or the model has none.

    Call it before making the optimizer. Expert parameters are marked so that `DistributedDataParallel` leaves them
    alone; to `fully_shard` give them as `ignored_params`. Their gradients come out as those of the mean of the mesh's
    ranks' losses, like DDP's. `ultraep_compile.clip_grad_norm_` clips sharded and other parameters by one norm.
    """
    need_model(model, "shard_experts")
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError(
            f"shard_experts was given {type(mesh).__name__} for a mesh. Give it the one-dimensional device mesh of the ranks "
            "that share the experts: init_device_mesh(...), or mesh['ep'] of a larger one."
        )
    if mesh.ndim != 1:
        raise ShardingError(
            f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}. Pass the one-dimensional expert mesh, e.g. mesh['ep']."
        )
    _refuse_wrapped(model)
    prepare(model, example_inputs)
    _refuse_divided(model)
    layers, stacks = _what_to_divide(model)
    if not (layers or stacks) and example_inputs is None and _bring_own_inputs(model):
        layers, stacks = _what_to_divide(model)
    if not (layers or stacks):
        if any(is_sharded(m) or division_of(m) is not None for m in model.modules()):
            raise ShardingError(
                "the experts of this model are divided already. Call shard_experts once; for another mesh, load a checkpoint "
                "into a model that is not divided."
            )
        raise ShardingError(f"no experts found that could be divided: {_what_there_is(model)}")
    ranks, group = mesh.size(), mesh.get_group().group_name
    _refuse_uneven_groups(layers, ranks)
    for path, experts in [*((s.path, s.experts) for s in stacks), *((x.path, x.facts.experts or 1) for x in layers)]:
        if experts % ranks:
            fits = [r for r in range(1, experts + 1) if experts % r == 0]
            raise ShardingError(
                f"{path}: {experts} experts cannot be divided over {ranks} ranks. Use a mesh of a size out of {fits}."
            )
    _refuse_foreign_shards(stacks, layers)
    for stack in stacks:
        _refuse_unregistered(stack.path, stack.module, stack.experts)
    _refuse_foreign_ties(model, layers, stacks)
    if ranks < dist.get_world_size():
        warnings.warn(
            f"ultraep: experts are divided over {ranks} of {dist.get_world_size()} processes, and their gradients are those of "
            "these. Where others hold the same experts, average the gradients of expert parameters over them.",
            stacklevel=2,
        )
    names = _divide(layers, stacks, mesh, ranks, group)
    ignored = names | set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # pyright: ignore[reportArgumentType]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)  # pyright: ignore[reportArgumentType]
    return model


def _refuse_divided(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if (layer := lifted_layer(module)) is not None and layer.facts.ranks > 1:
            raise ShardingError(
                f"{path or type(module).__name__} divides its experts over {layer.facts.ranks} ranks by itself, and is balanced over these: "
                "leave shard_experts out and compile the model with backend='ultraep'."
            )


def _refuse_wrapped(model: nn.Module) -> None:
    """DDP and FSDP1 keep the parameters that they were given: gradients of others they never see."""
    for path, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel)):
            raise ShardingError(
                f"{path or 'the model'} is wrapped by {type(module).__name__} already, which would go on averaging the parameters that "
                f"it found. Call shard_experts on the model first, then wrap it."
            )


def _refuse_foreign_shards(stacks: list[_Stack], layers: list[_Layer]) -> None:
    """Experts that tensor parallelism or FSDP2 has divided are not whole experts on any rank."""
    places = [(s.path or type(s.module).__name__, s.module, s.names) for s in stacks]
    places += [(x.path or type(x.module).__name__, x.module, [n for role in x.lists() for n in role]) for x in layers]
    for path, module, names in places:
        for name in names:
            parent, _, last = name.rpartition(".")
            tensor = getattr(module.get_submodule(parent), last)
            if isinstance(tensor, DTensor):
                raise ShardingError(
                    f"{path}.{name} is divided already, by {tensor.placements} over a mesh of {tensor.device_mesh.size()} ranks. Call "
                    "shard_experts first, and leave the experts' parameters out of tensor parallelism and fully_shard (ignored_params)."
                )


def _refuse_uneven_groups(layers: list[_Layer], ranks: int) -> None:
    """Parameters are divided along their first dim: where experts stand in groups, a rank keeps whole groups."""
    for layer in layers:
        for name in layer.stacks():
            count = layer.groups_of(name) or ranks
            if count % ranks:
                fits = [r for r in range(1, count + 1) if count % r == 0]
                raise ShardingError(
                    f"{layer.path or type(layer.module).__name__}: {name} holds {layer.facts.experts} experts in {count} groups, "
                    f"which cannot be divided over {ranks} ranks. Use a mesh of a size out of {fits}."
                )


def _what_to_divide(model: nn.Module) -> tuple[list[_Layer], list[_Stack]]:
    """What is not divided yet. A stack inside a lifted layer counts as both: the layer knows how to gather it."""
    layers = [
        _Layer(path, module, layer.facts)
        for path, module in model.named_modules()
        if (layer := lifted_layer(module)) is not None and division_of(module) is None
    ]
    stacks = {id(m): _Stack(p, m, e, names) for p, m, e, names in stacked_experts(model) if not is_sharded(m)}
    for layer in layers:
        for inside in layer.stacks():
            parent, _, name = inside.rpartition(".")
            module = layer.module.get_submodule(parent)
            path = ".".join(p for p in (layer.path, parent) if p)
            stack = stacks.setdefault(id(module), _Stack(path, module, layer.facts.experts or 1, []))
            if name not in stack.names and not is_sharded(module):
                stack.names.append(name)
    return layers, [s for s in stacks.values() if s.names]


def _bring_own_inputs(model: nn.Module) -> bool:
    """Prepare a model of transformers with the example that it brings itself."""
    try:
        inputs: Any = model.dummy_inputs
        device = next(model.parameters()).device
        given: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        prepare(model, given)
    except Exception as reason:  # it was only worth a try
        log.debug("the model brings no example inputs that it can run", exc_info=reason)
        return False
    return True


def _divide(layers: list[_Layer], stacks: list[_Stack], mesh: DeviceMesh, ranks: int, group: str) -> set[str]:
    """Replace parameters by this rank's part of them; the names of all that were."""
    names: set[str] = set()
    ties: dict[Tensor, Tensor] = {}
    for stack in stacks:
        for name in stack.names:
            replace(stack.module, name, lambda whole: own_part(whole, mesh), ties)
            names.add(".".join(p for p in (stack.path, name) if p))
        stack.module.__class__ = sharded_class(type(stack.module), tuple(stack.names), ranks, group)
    owners = [int(r) for r in mesh.mesh.flatten()]
    if layers:
        follow_optimizers()
    for layer in layers:
        lists = tuple(layer.lists())
        for role in lists:
            each = len(role) // ranks
            for expert, inside in enumerate(role):
                parent, _, name = inside.rpartition(".")
                holder = layer.module.get_submodule(parent)
                replace(holder, name, lambda whole, e=expert, n=each: own(whole, owners[e // n], group), ties)
                names.add(".".join(p for p in (layer.path, inside) if p))
        divide_class(layer.module, Division(ranks, group, lists, tuple(layer.stacks())))
    return names


def _save_pretrained(self: Any, save_directory: Any, *args: Any, state_dict: dict | None = None, **kwargs: Any) -> Any:
    """transformers' `save_pretrained` with gathered experts, since its format holds whole tensors. Call it on every rank;
    rank 0 writes.
    """
    writes = dist.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    with at(phase="save"), failing():
        for name, tensor in (self.state_dict() if state_dict is None else state_dict).items():
            value = whole(tensor, f"the whole of {name}")
            if writes:
                gathered[name] = value.cpu() if isinstance(tensor, DTensor) else value
        return type(self).save_pretrained(self, save_directory, *args, state_dict=gathered, **kwargs)


def _refuse_unregistered(name: str, module: nn.Module, experts: int) -> None:
    for attribute, value in vars(module).items():
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == experts:
            raise ShardingError(
                f"{f'{name}.' if name else ''}{attribute} is a tensor of shape {list(value.shape)} for {experts} experts, but "
                "neither a parameter nor a buffer: no checkpoint has it and it cannot be divided. Register it as a buffer."
            )


def _refuse_foreign_ties(model: nn.Module, layers: list[_Layer], stacks: list[_Stack]) -> None:
    """A tensor may be tied between experts, where all its places change together, but not to anything else."""
    places = {(s.module, name): f"{s.path}.{name}" for s in stacks for name in s.names}
    for layer in layers:
        for inside in (name for role in layer.lists() for name in role):
            parent, _, name = inside.rpartition(".")
            places[layer.module.get_submodule(parent), name] = f"{layer.path}.{inside}"
    names = {getattr(module, name): path for (module, name), path in places.items()}
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and value in names and (module, name) not in places:
                raise ShardingError(f"{names[value]} is tied to {path}.{name}, which holds no experts. Untie them first.")


def _what_there_is(model: nn.Module) -> str:
    """Why there is nothing to divide, and what to do."""
    refused = [f for f in findings_of(model) if f.rung in ("missed", "unbalanceable")]
    if refused:
        return f"{refused[0].path} is {refused[0].rung}: {refused[0].reason}"
    if findings_of(model):
        return "the model is dense as far as its forward shows. `ultraep-compile explain` shows what it looks like to us."
    return (
        "no module owns a parameter of shape [experts, in, out]. If its experts are modules of their own, only a forward can "
        "tell: call shard_experts(model, mesh, example_inputs). `ultraep-compile explain` shows what the model looks like to us."
    )
