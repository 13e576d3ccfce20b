"""`make_plan`: checks, domains, uneven ranks, and where a plan is made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile.errors import OptionError
from ultraep_compile.planner.checks import check_matrix, check_values
from ultraep_compile.planner.placement import Placement
from ultraep_compile.planner.plan import Plan, as_plan
from ultraep_compile.planner.quota import TOLERANCE, plan_quota
from ultraep_compile.planner.registry import Planner, planner_by_name, split_name
from ultraep_compile.planner.shares import split_quotas
from ultraep_compile.planner.topology import Topology, make_topology

KERNEL_SLOTS = 1024  # slots of a domain that the kernels' tiles hold
KERNEL_EXPERTS = 4096  # experts of a domain, with ranks and masters rounded up to powers of two


def make_plan(
    counts_RE: Tensor,
    redundant_experts: int | Sequence[int],
    planner: str = "quota",
    domain: int | None = None,
    experts_per_rank: Sequence[int] | None = None,
    tolerance: float | None = None,
    check: bool = True,
) -> Plan:
    """Plan one MoE layer of one microbatch.

    Parameters:
        counts_RE: int32 or int64 [R, E], tokens of each source rank for each logical expert, on any device.
        redundant_experts: slots of every rank, or of each; S is the largest. 0: a rank without slots.
        planner: a name in `PLANNERS`. `quota:N`, where one copy takes as long as N tokens: the fastest plan, not the
            most even one.
        domain: ranks d*domain..(d+1)*domain-1 exchange copies among themselves only. None: all with all.
        experts_per_rank: how many experts are at home at each rank, in order. None: equally many. Otherwise M is
            the largest number, and physical ids of masters that a rank lacks get no tokens.
        tolerance: `quota` is content with a largest load that exceeds the mean by this share (0.01); 0: as
            balanced as possible, with more copies.
        check: look at the values, which are read on the host for it. Without, counts on a CUDA device are planned
            there and never waited for; negative ones give a wrong plan.
    Returns:
        Plan on the device of `counts_RE`.
    Raises:
        LoadsError, TopologyError, OptionError: with what to pass instead.
    """
    name, copy_tokens = split_name(planner)
    points, solve = _basis_points(tolerance, name), planner_by_name(planner)
    topology = make_topology(*check_matrix(counts_RE), redundant_experts, domain, experts_per_rank)
    if counts_RE.is_cuda and not check and topology.is_even and (name == "none" or topology.slots == 0):
        return _without_copies(counts_RE, topology)
    if counts_RE.is_cuda and name == "quota" and kernels_fit(topology):
        if check:
            check_values(counts_RE)
        return _plan_on_device(counts_RE, topology, points, copy_tokens)
    if name == "quota":
        solve = partial(plan_quota, tolerance=points, copy_tokens=copy_tokens)
    counts_RC = _padded(check_values(counts_RE), topology)
    placement = _by_domain(solve, counts_RC, topology)
    shares_RP = split_quotas(counts_RC, *placement)
    slot_expert_RS = topology.expert_C[placement.slot_expert_RS]
    return as_plan(slot_expert_RS, shares_RP, counts_RE.device)


def _basis_points(tolerance: float | None, planner: str) -> int:
    if tolerance is None:
        return TOLERANCE
    if planner != "quota":
        raise OptionError(f"The planner {planner!r} knows no tolerance. Leave it out, or plan with 'quota'.")
    if not 0 <= tolerance <= 1:
        raise OptionError(f"tolerance is {tolerance!r}. Pass a share of the mean between 0 and 1, such as 0.01.")
    return round(tolerance * 10000)


def _padded(counts_RE: NDArray, topology: Topology) -> NDArray:
    """int64 [R, R*M]: every expert in the column of its home."""
    if topology.is_even:
        return counts_RE
    counts_RC = np.zeros((topology.ranks, topology.ranks * topology.masters), np.int64)
    counts_RC[:, topology.column_E] = counts_RE
    return counts_RC


def _by_domain(solve: Planner, counts_RC: NDArray, topology: Topology) -> Placement:
    """The placements of the domains, each planned by itself, side by side.

    Tokens from other domains are remote wherever in the domain they are computed; they are added to the row of
    their expert's home, so that a domain looks to a planner like ranks of their own.
    """
    size, masters, slots = topology.domain, topology.masters, topology.slots
    slots_R = np.array(topology.slots_R)
    slot_expert_RS = np.full((topology.ranks, slots), -1, np.int64)
    quota_RL = np.zeros((topology.ranks, masters + slots), np.int64)
    home_C = np.arange(size).repeat(masters)
    for first in range(0, topology.ranks, size):
        rows, columns = slice(first, first + size), slice(first * masters, (first + size) * masters)
        counts = counts_RC[rows, columns].copy()
        counts[home_C, np.arange(home_C.size)] += counts_RC[:, columns].sum(0) - counts.sum(0)
        mine = slots_R[rows]
        placement = solve(counts, int(mine[0]) if (mine == mine[0]).all() else mine)
        width = placement.slot_expert_RS.shape[1]  # the largest number of slots in this domain
        held = placement.slot_expert_RS
        slot_expert_RS[rows, :width] = np.where(held >= 0, held + first * masters, -1)
        quota_RL[rows, : masters + width] = placement.quota_P.reshape(size, -1)
    return Placement(slot_expert_RS, quota_RL.ravel())


def kernels_fit(topology: Topology) -> bool:
    """Whether the Triton kernels can plan this: installed, and a domain fits a warp."""
    lanes, masters = 1 << (topology.domain - 1).bit_length(), 1 << (topology.masters - 1).bit_length()
    fits = topology.domain * topology.slots <= KERNEL_SLOTS and lanes * masters <= KERNEL_EXPERTS
    return topology.slots > 0 and fits and find_spec("triton") is not None


def _without_copies(counts_RE: Tensor, topology: Topology) -> Plan:
    """Every token to the master of its expert, without a host read."""
    ranks, masters, slots = topology.ranks, topology.masters, topology.slots
    shares = counts_RE.new_zeros(ranks, ranks, masters + slots, dtype=torch.int32)
    shares[:, :, :masters] = counts_RE.view(ranks, ranks, masters)
    return Plan(counts_RE.new_full((ranks, slots), -1, dtype=torch.int32), shares.view(ranks, -1))


def _plan_on_device(counts_RE: Tensor, topology: Topology, tolerance: int, copy_tokens: int | None) -> Plan:
    from ultraep_compile.codegen.planner_kernels import plan_on_device

    counts_RC = counts_RE.to(torch.int32).contiguous()
    if not topology.is_even:
        column_E = torch.from_numpy(topology.column_E).to(counts_RE.device)
        padded = counts_RC.new_zeros(topology.ranks, topology.ranks * topology.masters)
        counts_RC = padded.index_copy_(1, column_E, counts_RC)
    made = plan_on_device(counts_RC, topology.slots_R, None, topology.domain, tolerance, copy_tokens)
    slot_expert_RS = made.slot_expert_RS
    if not topology.is_even:
        expert_C = torch.from_numpy(topology.expert_C).to(counts_RE.device, torch.int32)
        slot_expert_RS = expert_C[slot_expert_RS.long()]
    return Plan(slot_expert_RS, made.shares)
