"""Planners to compare with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.planner.placement import Copies, Placement, place
from ultraep_compile.planner.registry import register


@register("none")
def plan_none(counts_RE: NDArray, slots: int | NDArray) -> Placement:
    """No copies: every token goes to the master of its expert."""
    return place(counts_RE.sum(0).reshape(counts_RE.shape[0], -1), int(np.max(slots)), None)


@register("greedy")
def plan_greedy(counts_RE: NDArray, slots: int | NDArray) -> Placement:
    """Greedy exports alone, as in UltraEP (arXiv 2606.04101), at thresholds 1% of the largest load
    apart."""
    ranks = counts_RE.shape[0]
    loads_RM = counts_RE.sum(0).reshape(ranks, -1)
    total, worst = int(loads_RM.sum()), int(loads_RM.sum(1).max())
    tau = max(-(-total // ranks), total * 101 // (100 * ranks))
    while np.any(slots) and tau < worst:
        copies = greedy_copies(loads_RM, slots, tau)
        if copies is not None:
            return place(loads_RM, int(np.max(slots)), copies)
        tau += max(1, worst // 100)
    return place(loads_RM, int(np.max(slots)), None)


def greedy_copies(loads_RM: NDArray, slots: int | NDArray, tau: int) -> Copies | None:
    """Overloaded ranks, fullest first, export their hottest experts to the emptiest ranks, and never
    import.

    A copy gets no fewer tokens than an even share of what its source must still shed. None: `tau` is
    missed.
    """
    ranks, masters = loads_RM.shape
    load_R = loads_RM.sum(1)
    slack_R, free_R = np.maximum(tau - load_R, 0), np.broadcast_to(slots, ranks).copy()
    exports: list[tuple[int, int, int]] = []
    for source in np.argsort(-load_R, kind="stable").tolist():
        need = int(load_R[source]) - tau
        for local in np.argsort(-loads_RM[source], kind="stable").tolist():
            left, open_R = int(loads_RM[source, local]), free_R > 0
            while need > 0 and left > 0:
                eligible_R = np.where(open_R, slack_R, 0)
                target = int(eligible_R.argmax())
                tokens = min(need, left, int(eligible_R[target]))
                if tokens == 0 or tokens * int((eligible_R > 0).sum()) < need:
                    break
                exports.append((source * masters + local, target, tokens))
                open_R[target] = False
                slack_R[target] -= tokens
                free_R[target] -= 1
                need, left = need - tokens, left - tokens
        if need > 0:
            return None
    return Copies.of(*np.array(exports, np.int64).reshape(-1, 3).T)
