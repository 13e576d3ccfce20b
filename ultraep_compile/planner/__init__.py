"""Counts of tokens -> a plan: which experts get copies on which ranks, and how many tokens go to each copy.

Symbols: R ranks, E experts, S slots per rank, M = E/R masters per rank, P = R*(M+S) physical experts. Pure
integer arithmetic, so equal counts give equal plans on every rank without a broadcast. On the host a plan is
made in numpy and plain integers: the arrays are small (64 x 256), where a numpy call costs a fraction of a torch
call. Counts on a CUDA device stay there: `quota` is also three Triton launches that make the same plans.
"""

from __future__ import annotations

from ultraep_compile.planner import baselines, peers, quota  # noqa: F401  (they register their planners)
from ultraep_compile.planner.bounds import lower_bound
from ultraep_compile.planner.checks import validate_plan
from ultraep_compile.planner.make import make_plan
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
from ultraep_compile.planner.registry import PLANNERS, register

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
