"""Which parameters a rank of a pipeline holds, under which names, and with whom it shares them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultraep_compile.exchange import line_of
from ultraep_compile.exchange.distributed_tensors import whole
from ultraep_compile.multimodal.parts import Parts


@dataclass(frozen=True, slots=True)
class Holdings:
    """Names of this rank's parameters. Names, since a parameter may be replaced (fully_shard) before the first step."""

    named: tuple[str, ...]  # held here, each parameter once
    replicated: tuple[str, ...]  # of encoders and generators, trained or not: on every rank
    tied: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]  # (ranks whose stages share them, names), trained or not
    owners: dict[str, int]  # lowest rank that holds each parameter of the whole model
    counted: frozenset[str]  # those whose norm this rank counts


def part_names(parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the parts with the prefix of its names where there is no model to name them."""
    for encoder in parts.encoders:
        yield f"encoders.{encoder.name}.", encoder.module
    for stage in parts.stages:
        yield f"stages.{stage.index}.", stage.module
    for generator in parts.generators:
        yield f"generators.{generator.name}.", generator.module


def names_of(model: nn.Module | None, parts: Parts) -> dict[str, nn.Parameter]:
    """All parameters by the model's names, tied ones under each of theirs."""
    if model is not None:
        return dict(model.named_parameters(remove_duplicate=False))
    return {
        prefix + name: p
        for prefix, module in part_names(parts)
        for name, p in module.named_parameters(remove_duplicate=False)
    }


def holdings(names: dict[str, nn.Parameter], parts: Parts, stage_rank: tuple[int, ...], rank: int) -> Holdings:
    """What `rank` holds. Parameters that no part reads stay on rank 0, so that the state stays whole."""
    first = {p: name for name, p in reversed(names.items())}
    where: dict[nn.Parameter, set[int]] = {}
    for stage, r in zip(parts.stages, stage_rank, strict=True):
        for p in stage.module.parameters():
            where.setdefault(p, set()).add(r)
    everywhere = dict.fromkeys(p for part in (*parts.encoders, *parts.generators) for p in part.module.parameters())
    where |= {p: set(range(max(stage_rank) + 1)) for p in everywhere}
    for p in names.values():
        where.setdefault(p, {0})
    named = tuple(dict.fromkeys(first[p] for p in names.values() if rank in where[p]))
    shared: dict[tuple[int, ...], list[str]] = {}
    for p, ranks in where.items():
        if 1 < len(ranks) and p not in everywhere:
            shared.setdefault(tuple(sorted(ranks)), []).append(first[p])
    return Holdings(
        named,
        tuple(first[p] for p in everywhere),
        tuple((ranks, tuple(tied)) for ranks, tied in sorted(shared.items())),
        {name: min(where[p]) for name, p in names.items()},
        frozenset(first[p] for p in names.values() if min(where[p]) == rank),
    )


def let_go(model: nn.Module, held: Iterable[nn.Parameter]) -> None:
    """Replace every parameter of the model that this rank does not hold by one without memory, in place."""
    keep = {id(p) for p in held}
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in keep or p.is_meta:
                continue
            if id(p) not in empty:
                empty[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
            module._parameters[name] = empty[id(p)]


def gather_state(state: dict[str, Tensor], owners: dict[str, int], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The whole model's tensors on pipeline rank 0, on the CPU; an empty dict elsewhere. Collective over the pipeline.

    `state`: every entry; those that other ranks hold on the meta device. What nobody owns (buffers) is rank 0's."""
    line, gathered = line_of(group), {}
    if line.size > 1:
        line.open("data", "the whole model's state")  # by all: messages go between two ranks only
    for name, tensor in state.items():
        owner = owners.get(name, 0)
        if line.rank == owner:
            value = whole(tensor.detach(), f"the whole of {name}").cpu().contiguous()
            if line.rank:
                line.pass_on(value, 0, True, f"{name} on its way to rank 0")
            else:
                gathered[name] = value.clone()
        elif line.rank == 0:
            gathered[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            line.pass_on(gathered[name], owner, False, f"{name} on its way to rank 0")
    return gathered
