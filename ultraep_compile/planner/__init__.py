"""Counts of tokens -> a plan: which experts get copies on which ranks, and how many tokens go to each copy.

Symbols: R ranks, E experts, S slots per rank, M = E/R masters per rank, P = R*(M+S) physical experts. Pure
integer arithmetic, so equal counts give equal plans on every rank without a broadcast. Planning runs on the
host in numpy and plain integers: the arrays are small (64 x 256), where a numpy call costs a fraction of a
torch call. Counts on a CUDA device are copied to the host, and the plan back to the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ultraep_compile.planner import baselines, peers, quota  # noqa: F401  (they register their planners)
from ultraep_compile.planner.bounds import lower_bound
from ultraep_compile.planner.checks import checked_counts, validate_plan
from ultraep_compile.planner.placement import Placement
from ultraep_compile.planner.plan import (
    Plan,
    imbalance,
    loads_after,
    loads_before,
    logical_expert,
    max_ingress,
    quotas,
    remote_tokens,
    replica_count,
)
from ultraep_compile.planner.registry import PLANNERS, planner_by_name, register
from ultraep_compile.planner.shares import split_quotas


def make_plan(counts_RE: Tensor, redundant_experts: int, planner: str = "quota") -> Plan:
    """Plan one MoE layer of one microbatch.

    Parameters:
        counts_RE: int32 or int64 [R, E], tokens of each source rank for each logical expert, on any device.
        redundant_experts: S, slots per rank.
        planner: a name in `PLANNERS`.
    Returns:
        Plan on the device of `counts_RE`.
    """
    solve = planner_by_name(planner)
    counts = checked_counts(counts_RE, redundant_experts)
    placement = solve(counts, redundant_experts)
    shares_RP = split_quotas(counts, *placement)
    return Plan(
        torch.from_numpy(placement.slot_expert_RS.astype(np.int32)).to(counts_RE.device),
        torch.from_numpy(shares_RP).to(counts_RE.device),
    )


__all__ = [
    "PLANNERS",
    "Placement",
    "Plan",
    "imbalance",
    "loads_after",
    "loads_before",
    "logical_expert",
    "lower_bound",
    "make_plan",
    "max_ingress",
    "quotas",
    "register",
    "remote_tokens",
    "replica_count",
    "validate_plan",
]
