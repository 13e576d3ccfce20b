"""Lifted experts at run time: the call that a replayed forward makes, and what the graph passes need to know of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from ultraep_compile.codegen.row_function import RowSignature, TensorSpec, compile_row_function
from ultraep_compile.ops.experts import ExpertSite, register_site
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.routing import TOO_MANY
from ultraep_compile.passes.lift.called import LiftedExperts, register_lifted
from ultraep_compile.passes.lift.markers import expert_mm, expert_take


def caller(
    name: str,
    lifted: LiftedExperts,
    hidden: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    consts: list[Tensor],
    group: str = "",
    ranks: int = 1,
) -> Callable[..., Tensor]:
    """The function `(hidden [T, D], ids [T, K], weight [T, K] or None, params, consts) -> [T*K, D_out]` for given shapes.

    It runs on one rank, or over the group of a layer that is divided already, `params` being this rank's. Compiled by the
    `ultraep` backend over several ranks, the op inside is replaced by the balanced one.
    """
    keys: dict[torch.dtype, str] = {}
    layout = ExpertLayout(lifted.experts, ranks, 0)
    for dtype in {hidden.dtype, torch.bfloat16, torch.float32}:
        keys[dtype] = _register(name, lifted, layout, group, hidden, weight, params, consts, hidden.dtype, dtype)
    experts = lifted.experts

    def lifted_rows(
        hidden: Tensor, ids: Tensor, weight: Tensor | None, params: list[Tensor], consts: list[Tensor]
    ) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, params = hidden.to(dtype), [p.to(dtype) for p in params]
            consts = [c.to(dtype) if c.is_floating_point() else c for c in consts]
        key = keys[hidden.dtype]
        counts = torch.ops.ultraep.expert_load.default(ids, None, experts, ranks, group, key)
        empty = ids.new_empty(ranks, 0, dtype=torch.int32)  # no slots: ids are physical experts, counts are shares
        return torch.ops.ultraep.experts.default(hidden, weight, ids, empty, counts, params, consts, key)[0]

    return lifted_rows


def reference_caller(lifted: LiftedExperts) -> Callable[..., Tensor]:
    """The same in plain torch, for checks."""

    def lifted_rows(
        hidden: Tensor, ids: Tensor, weight: Tensor | None, params: list[Tensor], consts: list[Tensor]
    ) -> Tensor:
        rows = hidden.repeat_interleave(ids.shape[1], dim=0)
        extra = [] if weight is None else [weight.reshape(-1, 1)]
        return lifted.row_function(rows, ids.reshape(-1), *extra, *params, *consts)

    return lifted_rows


def _register(
    name, lifted, layout: ExpertLayout, group: str, hidden, weight, params, consts, old: torch.dtype, new: torch.dtype
) -> str:
    """Compile the row function for one dtype of rows and weights and make it known to the op."""

    def spec(tensor: Tensor, leading: int) -> TensorSpec:
        dtype = new if tensor.dtype == old else tensor.dtype
        return TensorSpec(tuple(tensor.shape[leading:]), dtype)

    signature = RowSignature(
        masters=layout.masters,
        slots=0,
        rows=spec(hidden, 1),
        weight=TensorSpec((1,), weight.dtype) if weight is not None else None,
        params=tuple(spec(p, 1) for p in params),
        consts=tuple(spec(c, 0) for c in consts),
    )
    program = compile_row_function(
        lifted.row_function, signature, is_product=lambda t: t is expert_mm, is_take=lambda t: t is expert_take
    )
    content = repr((name, program.key, dataclasses.asdict(layout), group, lifted.python_state))
    key = f"{name}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    register_site(key, ExpertSite(name, layout, group, bool(group), program, summed=bool(group)))
    register_lifted(key, lifted)
    return key


@torch.library.custom_op("ultraep::chosen", mutates_args=())
def chosen(weights: Tensor, choices: int) -> Tensor:
    """The experts with a weight that is not zero, for each token: ids [T, K] from weights [T, E].

    A token with more than K of them has first id `TOO_MANY - their number`: nothing may be left out, and `expert_load`, where
    all ranks meet, makes an error of it that all of them raise.

    Example:
        >>> chosen(torch.tensor([[0., 2., 0., 1.]]), 2).tolist()
        [[1, 3]]
        >>> chosen(torch.tensor([[0., 2., 3., 1.]]), 2)[0, 0] == TOO_MANY - 3
        tensor(True)
    """
    # Tokens with fewer choices fill up with experts in turn, so that nobody gets all of them; their weight is zero.
    rank = (weights != 0).to(torch.float32) * 2 - _share(weights)
    ids = rank.topk(choices, dim=1, sorted=False).indices.sort(1).values
    counts = (weights != 0).sum(1)
    ids[:, 0] = torch.where(counts > choices, TOO_MANY - counts, ids[:, 0])
    return ids


def _share(weights: Tensor) -> Tensor:
    tokens, experts = weights.shape
    spread = (torch.arange(tokens, device=weights.device)[:, None] + torch.arange(experts, device=weights.device)) % experts
    return spread.to(torch.float32) / experts


@chosen.register_fake
def _(weights: Tensor, choices: int) -> Tensor:
    return weights.new_empty(weights.shape[0], choices, dtype=torch.int64)
