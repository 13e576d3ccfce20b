"""The plan, and what can be read off it.

R ranks, S slots per rank, E experts, M = E/R masters per rank, P = R*(M+S) physical experts. Physical
expert p lives on rank p // (M+S); its local index p % (M+S) is a master (< M, of logical expert rank*M +
local) or a slot (>= M, of the logical expert written in the slot).

Example: two ranks with one expert and one slot each (M = S = 1, P = 4), and counts [[3, 1], [4, 0]]. The
plan `slot_expert_RS = [[-1], [0]]`, `shares_RP = [[3, 0, 1, 0], [1, 0, 0, 3]]` copies expert 0 to rank 1,
which then computes three of its own four tokens: the loads are [4, 4] instead of [7, 1], and 2 of 8 tokens
leave their rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Plan(NamedTuple):
    """Where the copies of the experts are, and how many tokens each source rank sends to each copy."""

    slot_expert_RS: Tensor  # int32 [R, S]: logical expert in each slot, -1 = empty
    shares_RP: Tensor  # int32 [R, P]: tokens that source rank r sends to physical expert p


def as_plan(slot_expert_RS: NDArray, shares_RP: NDArray, device: torch.device) -> Plan:
    """The plan on a device; both arrays fit int32."""
    slots, shares = (torch.from_numpy(a.astype(np.int32, copy=False)).to(device) for a in (slot_expert_RS, shares_RP))
    return Plan(slots, shares)


def masters_per_rank(plan: Plan) -> int:
    """M, from the shapes of the plan."""
    ranks, slots = plan.slot_expert_RS.shape
    return plan.shares_RP.shape[1] // ranks - slots


def logical_expert(plan: Plan, experts_per_rank: Sequence[int] | None = None) -> Tensor:
    """int64 [P]: the logical expert that each physical expert is a copy of, -1 for an empty slot.

    `experts_per_rank` says how many masters each rank has, where not all have M; -1 for those that it lacks.
    """
    ranks, masters = plan.slot_expert_RS.shape[0], masters_per_rank(plan)
    home_RM = torch.arange(ranks * masters, device=plan.slot_expert_RS.device).view(ranks, masters)
    if experts_per_rank is not None:
        local_M = torch.arange(masters, device=home_RM.device)
        number_R = torch.tensor(experts_per_rank, device=home_RM.device)
        home_RM = (number_R.cumsum(0) - number_R)[:, None] + local_M
        home_RM = torch.where(local_M < number_R[:, None], home_RM, -1)
    return torch.cat([home_RM, plan.slot_expert_RS.long()], 1).flatten()


def quotas(plan: Plan) -> Tensor:
    """int64 [P]: tokens that each physical expert computes, from all source ranks."""
    return plan.shares_RP.long().sum(0)


def loads_before(counts_RE: Tensor) -> Tensor:
    """int64 [R]: tokens that each rank computes when every token goes to the master of its expert."""
    return counts_RE.long().sum(0).view(counts_RE.shape[0], -1).sum(1)


def loads_after(plan: Plan) -> Tensor:
    """int64 [R]: tokens that each rank computes under the plan."""
    return quotas(plan).view(plan.slot_expert_RS.shape[0], -1).sum(1)


def imbalance(loads_R: Tensor) -> float:
    """max/mean of the ranks' loads; 1.0 when there are no tokens at all."""
    total = int(loads_R.long().sum())
    return int(loads_R.max()) * loads_R.numel() / total if total else 1.0


def remote_tokens(plan: Plan) -> Tensor:
    """int64 [R]: tokens of each source rank that another rank computes."""
    ranks = plan.slot_expert_RS.shape[0]
    shares_RRL = plan.shares_RP.long().view(ranks, ranks, -1)
    return shares_RRL.sum((1, 2)) - shares_RRL.diagonal().sum(0)


def replica_count(plan: Plan) -> int:
    """Slots in use, over all ranks."""
    return int((plan.slot_expert_RS >= 0).sum())


def max_ingress(plan: Plan) -> int:
    """The most copies that arrive at one rank."""
    return int((plan.slot_expert_RS >= 0).sum(1).max()) if plan.slot_expert_RS.numel() else 0
