"""Which rank is home to which experts, how many slots each rank has, and which ranks exchange copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """R ranks; rank r is home to the next `experts_R[r]` logical experts and has `slots_R[r]` slots.

    Ranks d*D..(d+1)*D-1 are domain d; copies stay within their domain. Planners work on a padded form in which
    every rank has M = max(experts_R) masters: expert number l of rank r is column r*M + l, missing ones have no
    tokens.
    """

    experts_R: tuple[int, ...]
    slots_R: tuple[int, ...]
    domain: int  # D, divides R

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.experts_R)

    @property
    def masters(self) -> int:
        """M, masters of the rank with the most."""
        return max(self.experts_R)

    @property
    def slots(self) -> int:
        """S, slots of the rank with the most."""
        return max(self.slots_R)

    @property
    def is_even(self) -> bool:
        """Whether every rank has the same number of experts, so that nothing is padded."""
        return len(set(self.experts_R)) == 1

    @cached_property
    def column_E(self) -> NDArray:
        """int64 [E]: the padded column of each logical expert."""
        return np.concatenate([rank * self.masters + np.arange(n) for rank, n in enumerate(self.experts_R)])

    @cached_property
    def expert_C(self) -> NDArray:
        """int64 [R*M + 1]: the logical expert of each padded column, -1 for none; the last entry is for index -1."""
        expert_C = np.full(self.ranks * self.masters + 1, -1, np.int64)
        expert_C[self.column_E] = np.arange(self.column_E.size)
        return expert_C


def make_topology(
    ranks: int,
    experts: int,
    redundant_experts: int | Sequence[int],
    domain: int | None = None,
    experts_per_rank: Sequence[int] | None = None,
) -> Topology:
    """A checked topology; raises TopologyError for anything that cannot be."""
    experts_R = _experts(ranks, experts, experts_per_rank)
    slots_R = _slots(ranks, redundant_experts)
    for rank, (own, slots) in enumerate(zip(experts_R, slots_R, strict=True)):
        if slots > experts - own:
            raise TopologyError(
                f"Too many redundant experts: {slots} slots on rank {rank}, but of {experts} experts on "
                f"{ranks} ranks only {experts - own} live on other ranks. Pass redundant_experts <= {experts - own}."
            )
    size = ranks if domain is None else domain
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or ranks % size:
        divisors = ", ".join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)
        raise TopologyError(f"{ranks} ranks cannot be divided into domains of {size!r}. Choose one of {divisors}.")
    return Topology(experts_R, slots_R, size)


def _experts(ranks: int, experts: int, experts_per_rank: Sequence[int] | None) -> tuple[int, ...]:
    if experts_per_rank is None:
        if experts % ranks:
            raise TopologyError(
                f"{experts} experts cannot be divided over {ranks} ranks. "
                f"Choose a number of ranks that divides {experts}, or say what each has in experts_per_rank."
            )
        return (experts // ranks,) * ranks
    experts_R = tuple(int(n) for n in experts_per_rank)
    if len(experts_R) != ranks or sum(experts_R) != experts or min(experts_R) < 0:
        raise TopologyError(
            f"experts_per_rank {experts_R} does not fit {ranks} ranks and {experts} experts. "
            f"Pass {ranks} numbers >= 0 that sum to {experts}."
        )
    return experts_R


def _slots(ranks: int, redundant_experts: Any) -> tuple[int, ...]:
    one_each = isinstance(redundant_experts, (list, tuple))
    slots_R = tuple(redundant_experts) if one_each else (redundant_experts,) * ranks
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in slots_R):
        raise TopologyError(
            f"redundant_experts is {redundant_experts!r}. Pass the number of slots per rank, an integer >= 0."
        )
    if len(slots_R) != ranks:
        raise TopologyError(
            f"redundant_experts has {len(slots_R)} entries for {ranks} ranks. Pass one number, or one for each rank."
        )
    return slots_R
