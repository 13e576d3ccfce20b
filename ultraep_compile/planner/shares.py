"""Which source rank sends how many tokens to which copy: quotas of copies -> shares of sources, exactly.

First every source that hosts a copy uses it, as far as the copy's quota goes. What is left of the sources'
demand for an expert is laid on a line, source after source; what is left of its copies' quotas on another,
copy after copy (both lines are equally long). A source sends to a copy as many tokens as their intervals
overlap. Sums over copies and over sources are therefore exact, and every source needs few destinations.

Example: an expert with quotas 4 (on rank 0) and 2 (on rank 1), and sources with 3, 1 and 2 tokens. Rank 0
keeps its 3, rank 1 keeps its 1; source 2 sends one token to each copy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.planner.placement import instances, running_sum


def split_quotas(counts_RE: NDArray, slot_expert_RS: NDArray, quota_P: NDArray) -> NDArray:
    """int32 [R, P]: tokens of each source for each physical expert; exact in both margins."""
    ranks, experts = counts_RE.shape
    masters, slots = experts // ranks, slot_expert_RS.shape[1]
    shares_RP = np.zeros((ranks, ranks * (masters + slots)), np.int32)
    shares_RP.reshape(ranks, ranks, -1)[:, :, :masters] = counts_RE.reshape(ranks, ranks, masters)

    phys_X, expert_X, host_X, first_X = instances(masters, slot_expert_RS)
    quota_X = quota_P[phys_X]
    local_X = np.minimum(counts_RE[host_X, expert_X], quota_X)
    left_X = quota_X - local_X
    quota_start_X = running_sum(left_X, first_X)

    is_first_X = first_X == np.arange(first_X.size)
    which_X = is_first_X.cumsum() - 1  # C runs over the copied experts
    demand_CR = counts_RE.T[expert_X[is_first_X]]
    demand_CR[which_X, host_X] -= local_X  # one copy of an expert per rank, so no index repeats
    demand_end_CR = demand_CR.cumsum(1)
    demand_start_CR = demand_end_CR - demand_CR

    overlap_XR = np.minimum(demand_end_CR[which_X], (quota_start_X + left_X)[:, None])
    overlap_XR -= np.maximum(demand_start_CR[which_X], quota_start_X[:, None])
    np.maximum(overlap_XR, 0, out=overlap_XR)
    overlap_XR[np.arange(phys_X.size), host_X] += local_X
    shares_RP[:, phys_X] = overlap_XR.T
    return shares_RP
