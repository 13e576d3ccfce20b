"""Plans on earlier counts, used for the counts at hand: what planning on history costs.

The copies stay where the earlier plan put them. Planners with a rule of their own (`eplb`, `lplb`) divide the
tokens at hand by it; for the others the tokens of an expert are divided as the earlier plan divided its tokens.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile.errors import LoadsError
from ultraep_compile.planner.checks import checked_counts
from ultraep_compile.planner.placement import instances, place
from ultraep_compile.planner.plan import Plan, as_plan, quotas
from ultraep_compile.planner.registry import DIVIDE
from ultraep_compile.planner.shares import split_quotas


def reuse_plan(earlier: Plan, counts_RE: Tensor, planner: str = "quota") -> Plan:
    """The copies of `earlier` with the tokens of `counts_RE` divided over them.

    Parameters:
        earlier: a plan by `planner`, made on any counts of this shape, for example a sum of microbatches.
        counts_RE: int32 or int64 [R, E], the counts to serve.
    Returns:
        Plan with exact margins for `counts_RE`, on the device of `counts_RE`.
    """
    slot_expert_RS = earlier.slot_expert_RS.cpu().numpy().astype(np.int64)
    ranks, slots = slot_expert_RS.shape
    counts = checked_counts(counts_RE, slots)
    if earlier.shares_RP.shape != (ranks, counts.shape[1] + ranks * slots) or counts.shape[0] != ranks:
        raise LoadsError(
            f"The earlier plan is for {ranks} ranks and {earlier.shares_RP.shape[1] - ranks * slots} experts, "
            f"the counts are {list(counts.shape)}. Pass counts of the same layer."
        )
    divide = DIVIDE.get(planner)
    if divide is not None:
        quota_P = divide(counts, slot_expert_RS)
    else:
        quota_P = divide_in_proportion(counts, slot_expert_RS, quotas(earlier).cpu().numpy())
    shares_RP = split_quotas(counts, slot_expert_RS, quota_P)
    return as_plan(slot_expert_RS, shares_RP, counts_RE.device)


def divide_in_proportion(counts_RE: NDArray, slot_expert_RS: NDArray, earlier_P: NDArray) -> NDArray:
    """int64 [P]: an expert's tokens over its instances in the ratio of the quotas `earlier_P`, exactly.

    Each instance gets the difference of two rounded running sums, so that quotas sum to the load; an expert
    without earlier tokens stays with its master. Plain integers: the products pass 2^63.

    Example: earlier quotas 3 and 1, seven tokens now: 7*3//4 = 5 and 7 - 5 = 2.
    """
    ranks, slots = slot_expert_RS.shape
    masters = counts_RE.shape[1] // ranks
    quota_P = place(counts_RE.sum(0).reshape(ranks, masters), slots, None).quota_P
    inst = instances(masters, slot_expert_RS)
    load_E = counts_RE.sum(0).tolist()
    bounds = [*np.unique(inst.first_X).tolist(), inst.phys_X.size]
    for first, end in pairwise(bounds):
        phys_x, load = inst.phys_X[first:end], load_E[inst.expert_X[first]]
        weights = earlier_P[phys_x].tolist()
        total, seen, given = sum(weights), 0, 0
        if total:
            for phys, weight in zip(phys_x.tolist(), weights, strict=True):
                seen += weight
                upto = load * seen // total
                quota_P[phys] = upto - given
                given = upto
    # an expert without earlier tokens keeps all at its master: its copies' quotas are still 0
    return quota_P
