"""Which rank should be home to which experts: a slow planner, for the moment of a checkpoint.

Copies never leave a domain, so no plan makes the fullest domain emptier: with domains of 8 ranks that mean is the bound,
not the slots. Moving an expert for good does. Experts are dealt over the domains by their loads so far, the longest
first to the emptiest domain with room (LPT), then exchanged between the fullest domain and another one while that
helps; and in the same way over the ranks of each domain, so that few copies are needed.

The answer is an order of the experts: position p, whose home is rank p // M, gets logical expert `order_E[p]`. Counts
in that order are `counts_RE[:, order_E]`; a model's weights follow in `ultraep_compile.permutation`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile.errors import LoadsError
from ultraep_compile.planner.checks import check_matrix, check_values
from ultraep_compile.planner.topology import make_topology


def spread_homes(counts: Tensor, domain: int | None = None) -> Tensor:
    """int64 [E]: the logical expert that each position should hold.

    Parameters:
        counts: int [R, E], or [N, R, E] of N microbatches, which count together.
        domain: ranks that exchange copies; divides R. None: all do, and only the ranks of each are evened out.
    Raises:
        LoadsError, TopologyError: with what to pass instead.

    Example: loads 4, 4, 1, 1 on 4 ranks in domains of 2. At home in order, the first domain has 8 of 10 tokens;
    in the order 0, 2, 1, 3 both have 5.

    >>> spread_homes(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]), domain=2).tolist()
    [0, 2, 1, 3]
    """
    if isinstance(counts, Tensor) and counts.dim() == 3 and counts.shape[0]:
        check_matrix(counts[0])
        counts_RE = np.sum([check_values(one) for one in counts], 0)
    else:
        check_matrix(counts)
        counts_RE = check_values(counts)
    ranks, experts = counts_RE.shape
    size = make_topology(ranks, experts, 0, domain).domain
    load_E, masters = counts_RE.sum(0), experts // ranks
    order: list[int] = []
    for mine in _dealt(load_E, np.arange(experts), ranks // size):
        for own in _dealt(load_E, mine, size):
            order += sorted(own.tolist())
    assert len(order) == experts == masters * ranks
    return torch.tensor(order)


def in_order(counts: Tensor, order_E: Tensor) -> Tensor:
    """Counts [..., E] of logical experts as counts by position."""
    if counts.shape[-1] != order_E.numel():
        raise LoadsError(
            f"The order is one of {order_E.numel()} experts, the load matrix has {counts.shape[-1]}. "
            "Pass the order that was made for these experts."
        )
    return counts[..., order_E.to(counts.device)]


def _dealt(load_E: NDArray, which: NDArray, bins: int) -> list[NDArray]:
    """`which` experts in equally large groups of nearly equal loads."""
    room = which.size // bins
    groups: list[list[int]] = [[] for _ in range(bins)]
    load_B = np.zeros(bins, np.int64)
    for expert in which[np.argsort(-load_E[which], kind="stable")].tolist():
        free = [b for b in range(bins) if len(groups[b]) < room]
        emptiest = min(free, key=lambda b: (load_B[b], b))
        groups[emptiest].append(expert)
        load_B[emptiest] += load_E[expert]
    while _exchange(load_E, groups, load_B):
        pass
    return [np.array(group) for group in groups]


def _exchange(load_E: NDArray, groups: list[list[int]], load_B: NDArray) -> bool:
    """The best exchange of one expert of the fullest group; False where none makes the fuller of the two emptier."""
    fullest = int(load_B.argmax())
    mine = np.array(groups[fullest])
    best: tuple[int, int, int, int] | None = None
    for other in range(len(groups)):
        if other == fullest:
            continue
        theirs = np.array(groups[other])
        gain = load_E[mine][:, None] - load_E[theirs][None, :]  # what leaves the fullest group
        fuller = np.maximum(load_B[fullest] - gain, load_B[other] + gain)
        at = int(fuller.argmin())
        i, j = divmod(at, theirs.size)
        if best is None or fuller.flat[at] < best[0]:
            best = (int(fuller.flat[at]), other, i, j)
    if best is None or best[0] >= load_B[fullest]:
        return False
    _, other, i, j = best
    gain = load_E[groups[fullest][i]] - load_E[groups[other][j]]
    groups[fullest][i], groups[other][j] = groups[other][j], groups[fullest][i]
    load_B[fullest] -= gain
    load_B[other] += gain
    return True
