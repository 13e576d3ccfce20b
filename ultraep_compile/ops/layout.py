"""Who lives where: experts, ranks, slots, and the position of every routed pair on its destination rank.

Symbols as in docs/architecture.md. A *pair* is one (token, choice); pairs are numbered token-major, `t * K + k`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Static shape of one expert-parallel layer."""

    experts: int
    """E: logical experts of the layer."""
    ranks: int
    """R: ranks that share them; E is a multiple of R."""
    slots: int
    """S: places for redundant experts on each rank."""

    @property
    def masters(self) -> int:
        """M: experts at home on each rank."""
        return self.experts // self.ranks

    @property
    def physical_per_rank(self) -> int:
        return self.masters + self.slots

    @property
    def physical(self) -> int:
        """P: masters and slots of all ranks."""
        return self.ranks * self.physical_per_rank

    def capacity(self, pairs: int) -> int:
        """Rows that each rank's buffer holds when `pairs` pairs are spread over R ranks.

        The planner keeps every rank near the mean, so one eighth (and a few rows, for tiny batches) is ample; what
        does not fit makes a further round. Works on ints and SymInts.
        """
        mean = (pairs + self.ranks - 1) // self.ranks
        return mean + (mean + 7) // 8 + 16


def source_ranks(tokens: int, ranks: int, device: torch.device) -> Tensor:
    """Virtual source rank of every token, int64 [T]: contiguous slices whose lengths differ by at most 1.

    Example: 5 tokens over 3 ranks give [0, 0, 1, 1, 2].
    """
    t = torch.arange(tokens, device=device)
    base, longer = divmod(tokens, ranks)
    edge = longer * (base + 1)
    return torch.where(t < edge, t // (base + 1), longer + (t - edge) // max(base, 1))


def physical_to_logical(slot_expert_RS: Tensor, experts: int) -> Tensor:
    """Logical expert of every physical expert, int64 [P]; -1 for an empty slot.

    Example: E=4, R=2, slots [[3], [-1]] give [0, 1, 3, 2, 3, -1].
    """
    ranks = slot_expert_RS.shape[0]
    masters = torch.arange(experts, device=slot_expert_RS.device).view(ranks, experts // ranks)
    return torch.cat([masters, slot_expert_RS.to(torch.int64)], dim=1).flatten()


def ordinal_in_group(group_N: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Number of earlier elements of the same group, and the group sizes: int64 [N], int64 [groups].

    Example: groups [1, 0, 1, 1] give ordinals [0, 0, 1, 2] and sizes [1, 3].
    """
    order = torch.argsort(group_N, stable=True)
    sizes = torch.bincount(group_N, minlength=groups)
    starts = torch.cumsum(sizes, 0) - sizes
    ordinal = torch.empty_like(order)
    ordinal[order] = torch.arange(group_N.numel(), device=group_N.device) - starts[group_N[order]]
    return ordinal, sizes


def rows_by_group(offsets: Tensor) -> Tensor:
    """Group of every used row, int64 [offsets[-1]].

    Example: offsets [0, 2, 2, 3] give [0, 0, 2].
    """
    return torch.arange(offsets.shape[0] - 1, device=offsets.device).repeat_interleave((offsets[1:] - offsets[:-1]).long())
