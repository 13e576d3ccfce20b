"""Quotas moved between the copies of an expert so that fewer tokens leave their rank.

A copy with a smaller quota than its rank has tokens for the expert sends some of them away; one with a larger
quota takes tokens in. The second gives to the first as much as the first's rank can take without passing the
threshold.

Example: an expert with copies on two ranks that hold 5 of its tokens each, quotas 3 and 7. With a threshold
that leaves room for two tokens on the first rank, the quotas become 5 and 5, and no token travels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.planner.placement import Placement, instances, running_sum


def keep_local(counts_RE: NDArray, placement: Placement, tau: int) -> Placement:
    """The same copies with other quotas: no rank above `tau`, every copy in use, no fewer tokens at home."""
    ranks = counts_RE.shape[0]
    slot_expert_RS, quota_P = placement
    phys_X, expert_X, host_X, first_X = instances(counts_RE.shape[1] // ranks, slot_expert_RS)
    quota_X, own_X = quota_P[phys_X], counts_RE[host_X, expert_X]

    room_R = np.maximum(tau - quota_P.reshape(ranks, -1).sum(1), 0)
    by_host_X = np.argsort(host_X, kind="stable")
    host_first_X = np.searchsorted(host_X[by_host_X], host_X[by_host_X])
    wanted_X = np.maximum(own_X - quota_X, 0)
    taken_X = np.empty_like(wanted_X)
    taken_X[by_host_X] = _share_out(wanted_X[by_host_X], host_first_X, room_R[host_X[by_host_X]])
    spare_X = np.maximum(quota_X - np.maximum(own_X, 1), 0)

    moved_X = np.minimum(_total(taken_X, first_X), _total(spare_X, first_X))
    quota_P = quota_P.copy()
    quota_P[phys_X] += _share_out(taken_X, first_X, moved_X) - _share_out(spare_X, first_X, moved_X)
    return Placement(slot_expert_RS, quota_P)


def _share_out(wanted_X: NDArray, first_X: NDArray, available_X: NDArray) -> NDArray:
    """What each entry gets of its group's `available_X`, first come first served."""
    return np.clip(available_X - running_sum(wanted_X, first_X), 0, wanted_X)


def _total(values_X: NDArray, first_X: NDArray) -> NDArray:
    """The sum of its group for each entry."""
    last_X = np.searchsorted(first_X, first_X, "right") - 1
    return (running_sum(values_X, first_X) + values_X)[last_X]
