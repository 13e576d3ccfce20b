"""Lower bounds on the largest load that any plan can reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile.planner.checks import checked_counts


def lower_bound(counts_RE: Tensor, redundant_experts: int, domain: int | None = None) -> float:
    """No plan has a lower max/mean of the ranks' loads than this; 1.0 when there are no tokens.

    domain: copies stay within blocks of so many consecutive ranks. None: all ranks exchange copies.
    """
    counts = checked_counts(counts_RE, redundant_experts)
    ranks = counts.shape[0]
    loads_RM = counts.sum(0).reshape(ranks, -1)
    total, size = int(loads_RM.sum()), domain or ranks
    if not total:
        return 1.0
    worst = max(smallest_max_load(loads_RM[at : at + size], redundant_experts) for at in range(0, ranks, size))
    return worst * ranks / total


def smallest_max_load(loads_RM: NDArray, slots: int) -> int:
    """No plan has a largest load below this many tokens.

    For the j fullest ranks together: the other R-j ranks have (R-j)*S slots, so at most the hottest (R-j)*S
    experts of the j ranks can leave them, whatever the plan. What stays is at best spread evenly. With j =
    R this is the mean; with S = 0 and j = 1 it is the unbalanced maximum.

    Example: two ranks with experts (5, 5, 5), (1, 0, 0) and one slot each: one 5 can leave, so 10 stay,
    while the mean is 8.
    """
    ranks = loads_RM.shape[0]
    order_R = np.argsort(-loads_RM.sum(1), kind="stable")
    sorted_RM = loads_RM[order_R]
    best = -(-int(loads_RM.sum()) // ranks)
    inside = 0
    for j in range(1, ranks):
        inside += int(sorted_RM[j - 1].sum())
        if inside <= best * j:
            continue
        pool = np.sort(sorted_RM[:j].ravel())[::-1]
        stays = inside - int(pool[: (ranks - j) * slots].sum())
        best = max(best, -(-stays // j))
    return best
