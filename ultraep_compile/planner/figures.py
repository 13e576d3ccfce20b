"""What a plan is judged by, as plain numbers, and its instances as a table that other programs can read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile.errors import LoadsError
from ultraep_compile.planner.plan import (
    Plan,
    imbalance,
    loads_after,
    loads_before,
    logical_expert,
    max_ingress,
    quotas,
    remote_tokens,
    replica_count,
)


def plan_figures(counts_RE: Tensor, plan: Plan) -> dict[str, float]:
    """`before` and `after` (max/mean of the ranks' loads), `replicas`, `remote_share`; the most copies that arrive
    at one rank (`max_ingress`) and that one rank's experts have elsewhere (`max_egress`)."""
    return {
        "before": imbalance(loads_before(counts_RE)),
        "after": imbalance(loads_after(plan)),
        "replicas": replica_count(plan),
        "max_ingress": max_ingress(plan),
        "max_egress": int(by_home(plan, copies_of(plan)).max()),
        "remote_share": int(remote_tokens(plan).sum()) / max(int(counts_RE.long().sum()), 1),
    }


def copies_of(plan: Plan) -> NDArray:
    """int64 [E]: copies of each expert, its master not counted."""
    held_RS = plan.slot_expert_RS.cpu().numpy()
    ranks, slots = held_RS.shape
    return np.bincount(held_RS[held_RS >= 0], minlength=plan.shares_RP.shape[1] - ranks * slots)


def by_home(plan: Plan, values_E: NDArray) -> NDArray:
    """[R]: the sum of `values_E` over the experts whose master each rank has."""
    expert_P, (ranks, slots) = logical_expert(plan).cpu().numpy(), plan.slot_expert_RS.shape
    masters_RM = expert_P.reshape(ranks, -1)[:, : expert_P.size // ranks - slots]
    return values_E[masters_RM].sum(1)


def plan_table(plan: Plan) -> tuple[NDArray, NDArray]:
    """A plan as `instances` int32 [I, 3] and `shares` int32 [R, I].

    A row of `instances` is (logical expert, rank, quota), by expert with the master first, then by rank; empty
    slots are left out. Columns of `shares` belong to those rows: summed over sources they are the quotas, summed
    over an expert's instances they are the counts of the source.
    """
    expert_P, quota_P = logical_expert(plan).cpu().numpy(), quotas(plan).cpu().numpy()
    ranks, slots = plan.slot_expert_RS.shape
    width = expert_P.size // ranks
    is_slot_P = np.arange(expert_P.size) % width >= width - slots
    order = np.lexsort((is_slot_P, expert_P))
    order = order[expert_P[order] >= 0]
    if quota_P.max(initial=0) > np.iinfo(np.int32).max:
        expert = int(expert_P[quota_P.argmax()])
        raise LoadsError(
            f"An instance of expert {expert} gets {quota_P.max()} tokens, more than the file's int32 can hold. "
            "Write smaller counts, for example those of one microbatch."
        )
    table = np.stack([expert_P[order], order // width, quota_P[order]], 1).astype(np.int32)
    return table, plan.shares_RP.cpu().numpy()[:, order]
