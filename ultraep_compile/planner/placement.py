"""What a planner decides: copies, and how many tokens each physical expert computes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Copies(NamedTuple):
    """X copies, sorted by target rank. A target gets an expert at most once."""

    expert_X: NDArray  # int64, logical expert
    target_X: NDArray  # int64, rank that gets the copy
    tokens_X: NDArray  # int64, tokens of the copy

    @classmethod
    def of(cls, expert_X: NDArray, target_X: NDArray, tokens_X: NDArray) -> Copies:
        """Copies in the order of their slots, sorted."""
        order = np.argsort(target_X, kind="stable")
        return cls(expert_X[order], target_X[order], tokens_X[order])


class Placement(NamedTuple):
    """A planner's answer. Over the copies of an expert, quotas sum to its load."""

    slot_expert_RS: NDArray  # int64 [R, S]: logical expert in each slot, -1 = empty
    quota_P: NDArray  # int64 [P]: tokens of each physical expert


class Instances(NamedTuple):
    """The masters and copies X of the experts that have copies, all of one expert together, by physical
    id."""

    phys_X: NDArray  # int64, physical expert
    expert_X: NDArray  # int64, logical expert
    host_X: NDArray  # int64, rank
    first_X: NDArray  # int64, where in X the instances of this one's expert begin


def instances(masters: int, slot_expert_RS: NDArray) -> Instances:
    """Read from the slots; empty when there are no copies."""
    ranks, slots = slot_expert_RS.shape
    expert_RL = np.empty((ranks, masters + slots), np.int64)
    expert_RL[:, :masters] = np.arange(ranks * masters).reshape(ranks, masters)
    expert_RL[:, masters:] = slot_expert_RS
    expert_P = expert_RL.ravel()
    copied_E = np.zeros(ranks * masters + 1, bool)
    copied_E[slot_expert_RS] = True
    copied_E[-1] = False  # where the -1 of an empty slot was written
    phys_X = np.flatnonzero(copied_E[expert_P])
    phys_X = phys_X[np.argsort(expert_P[phys_X], kind="stable")]
    expert_X = expert_P[phys_X]
    return Instances(phys_X, expert_X, phys_X // (masters + slots), np.searchsorted(expert_X, expert_X))


def running_sum(values_X: NDArray, first_X: NDArray) -> NDArray:
    """Sum of the values before each entry, counted from the entry where its group begins."""
    before_X = values_X.cumsum() - values_X
    return before_X - before_X[first_X]


def place(loads_RM: NDArray, slots: int, copies: Copies | None) -> Placement:
    """Masters keep what no copy takes; the copies on a rank fill its slots in order. None = no copies."""
    ranks, masters = loads_RM.shape
    quota_RL = np.zeros((ranks, masters + slots), np.int64)
    quota_RL[:, :masters] = loads_RM
    slot_expert_RS = np.full((ranks, slots), -1, np.int64)
    if copies is not None:
        expert_X, target_X, tokens_X = copies
        slot_X = np.arange(target_X.size) - np.searchsorted(target_X, target_X)
        slot_expert_RS[target_X, slot_X] = expert_X
        quota_RL[target_X, masters + slot_X] = tokens_X
        np.subtract.at(quota_RL, (expert_X // masters, expert_X % masters), tokens_X)
    return Placement(slot_expert_RS, quota_RL.ravel())
