"""Planners of other systems: copies placed on a history of counts, tokens divided over whatever copies there are.

`eplb` divides them evenly, as DeepSeek's EPLB; `lplb` by a linear program, as DeepSeek's LPLB. Both place as EPLB
does: the expert with the highest load per instance gets the next copy until the slots are used up, then copies
are packed, longest first. One difference: those systems may move every expert, while here masters stay at home.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.planner.placement import Placement, instances, place
from ultraep_compile.planner.registry import register


def eplb_slots(counts_RE: NDArray, slots: int | NDArray) -> NDArray:
    """int64 [R, S]: what the slots hold, from counts summed over any number of microbatches.

    Example: loads 8, 2 on two ranks with a slot each: expert 0 gets the first copy (8 a head), which then holds 4
    of its tokens; at 4 and 2 a head expert 0 has a copy everywhere, so expert 1 gets the second.
    """
    (ranks, experts), load_E = counts_RE.shape, counts_RE.sum(0)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E.tolist()) if load]
    heapify(heap)
    number_E = np.ones(experts, np.int64)
    slots_R = np.broadcast_to(slots, ranks)
    for _ in range(int(slots_R.sum()) if ranks > 1 else 0):
        if not heap or not heap[0][0]:
            break
        expert = heap[0][1]
        number_E[expert] += 1
        more = number_E[expert] < ranks  # one instance a rank at most
        heapreplace(heap, (-int(load_E[expert]) / int(number_E[expert]) if more else 0.0, expert))

    each_E = load_E / number_E
    load_R = each_E.reshape(ranks, -1).sum(1)
    taken_RE = np.eye(ranks, dtype=bool).repeat(experts // ranks, 1)
    slot_expert_RS, used_R = np.full((ranks, int(slots_R.max())), -1, np.int64), np.zeros(ranks, np.int64)
    for expert in np.argsort(-each_E, kind="stable").tolist():
        for _ in range(int(number_E[expert]) - 1):
            open_R = (used_R < slots_R) & ~taken_RE[:, expert]
            if not open_R.any():  # the only slots left are on ranks that have this expert
                break
            rank = int(np.where(open_R, load_R, np.inf).argmin())
            slot_expert_RS[rank, used_R[rank]] = expert
            used_R[rank] += 1
            taken_RE[rank, expert] = True
            load_R[rank] += each_E[expert]
    return slot_expert_RS


def divide_evenly(counts_RE: NDArray, slot_expert_RS: NDArray) -> NDArray:
    """int64 [P]: the same number of tokens for every instance of an expert; odd ones to the lowest ranks."""
    quota_P, inst = _masters_only(counts_RE, slot_expert_RS)
    load_X = counts_RE.sum(0)[inst.expert_X]
    place_X = np.arange(inst.first_X.size) - inst.first_X
    number_X = np.searchsorted(inst.first_X, inst.first_X, "right") - inst.first_X
    quota_P[inst.phys_X] = load_X // number_X + (place_X < load_X % number_X)
    return quota_P


def divide_by_lp(counts_RE: NDArray, slot_expert_RS: NDArray) -> NDArray:
    """int64 [P]: the quotas over these instances that make the fullest rank as empty as possible, exactly.

    First a linear program for the lowest largest load; then the transport problem with every rank capped at that
    load, rounded up. Its corners are whole numbers, and the simplex method ends in one.
    Source: scipy's HiGHS (`linprog`).
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, hstack

    quota_P, inst = _masters_only(counts_RE, slot_expert_RS)
    if not inst.phys_X.size:
        return quota_P
    ranks, width = counts_RE.shape[0], quota_P.size // counts_RE.shape[0]
    x, ones = inst.phys_X.size, np.ones(inst.phys_X.size)
    quota_P[inst.phys_X] = 0
    fixed_R = quota_P.reshape(ranks, width).sum(1).astype(float)
    expert_C, which_X = np.unique(inst.expert_X, return_inverse=True)
    load_C = counts_RE.sum(0)[expert_C]
    by_expert = csr_array((ones, (which_X, np.arange(x))), shape=(expert_C.size, x))
    by_rank = csr_array((ones, (inst.host_X, np.arange(x))), shape=(ranks, x))
    scale = max(float(load_C.max()), 1.0)  # the solver's tolerances are absolute
    with_top = hstack([by_rank, csr_array(-np.ones((ranks, 1)))])
    no_top = hstack([by_expert, csr_array((expert_C.size, 1))])
    cost = np.append(np.zeros(x), 1.0)
    lowest = linprog(cost, with_top, -fixed_R / scale, no_top, load_C / scale, method="highs-ds")
    assert lowest.status == 0, lowest.message
    cap_R = np.ceil(lowest.fun * scale - 1e-4) - fixed_R
    found = linprog(np.zeros(x), by_rank, cap_R, by_expert, load_C, method="highs-ds")
    if found.status != 0:  # counts so large that the tolerance is more than a token
        found = linprog(np.zeros(x), by_rank, cap_R * (1 + 1e-9) + 1, by_expert, load_C, method="highs-ds")
    assert found.status == 0, found.message
    quota_P[inst.phys_X] = np.maximum(np.rint(found.x), 0)
    missing_C = load_C - np.bincount(which_X, quota_P[inst.phys_X], expert_C.size).astype(np.int64)
    for copied in np.flatnonzero(missing_C):  # floats of 2^53 and more: put right on the largest quota
        mine = inst.phys_X[which_X == copied]
        quota_P[mine[quota_P[mine].argmax()]] += missing_C[copied]
    return quota_P


def _masters_only(counts_RE: NDArray, slot_expert_RS: NDArray):
    """Quotas with all tokens at the masters, and the instances that may share them."""
    ranks, slots = slot_expert_RS.shape
    masters = counts_RE.shape[1] // ranks
    bare = place(counts_RE.sum(0).reshape(ranks, masters), slots, None)
    return bare.quota_P, instances(masters, slot_expert_RS)


@register("eplb", divide_evenly)
def plan_eplb(counts_RE: NDArray, slots: int | NDArray) -> Placement:
    """Copies as EPLB places them, tokens divided evenly over the instances."""
    slot_expert_RS = eplb_slots(counts_RE, slots)
    return Placement(slot_expert_RS, divide_evenly(counts_RE, slot_expert_RS))


@register("lplb", divide_by_lp)
def plan_lplb(counts_RE: NDArray, slots: int | NDArray) -> Placement:
    """Copies as EPLB places them, tokens divided by a linear program."""
    slot_expert_RS = eplb_slots(counts_RE, slots)
    return Placement(slot_expert_RS, divide_by_lp(counts_RE, slot_expert_RS))
