"""What `make_plan` accepts, and what it promises about the plan it returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile.errors import LoadsError
from ultraep_compile.planner.plan import Plan, loads_after, logical_expert
from ultraep_compile.planner.topology import make_topology

COUNT_LIMIT = 2**31 - 1  # shares are int32


def check_matrix(counts_RE: Tensor) -> tuple[int, int]:
    """(R, E); raises on anything but a matrix of integer counts. Does not look at the values."""
    if not isinstance(counts_RE, Tensor):
        kind = type(counts_RE).__name__
        raise LoadsError(f"The load matrix is a {kind}, not a tensor. Wrap it in torch.as_tensor.")
    if counts_RE.dtype not in (torch.int32, torch.int64):
        raise LoadsError(f"The load matrix has dtype {counts_RE.dtype}. Pass token counts as int32 or int64.")
    if counts_RE.dim() != 2 or counts_RE.numel() == 0:
        shape = list(counts_RE.shape)
        raise LoadsError(f"The load matrix has shape {shape}. Pass [ranks, experts], a row per source rank.")
    return counts_RE.shape[0], counts_RE.shape[1]


def check_values(counts_RE: Tensor) -> NDArray:
    """int64 [R, E] on the host; raises on counts that are negative or beyond int32."""
    counts = counts_RE.detach().cpu().numpy().astype(np.int64)
    low, high = int(counts.min()), int(counts.max())
    if low < 0 or high > COUNT_LIMIT:
        rank, expert = divmod(int(counts.argmin() if low < 0 else counts.argmax()), counts.shape[1])
        raise LoadsError(
            f"The load matrix holds {min(low, 0) or high} tokens at source rank {rank}, expert {expert}. "
            f"Pass counts between 0 and {COUNT_LIMIT}."
        )
    return counts


def checked_counts(counts_RE: Tensor, redundant_experts: int) -> NDArray:
    """int64 [R, E] on the host; raises on anything but a matrix of counts for whole ranks and usable
    slots."""
    make_topology(*check_matrix(counts_RE), redundant_experts)
    return check_values(counts_RE)


def validate_plan(
    counts_RE: Tensor,
    plan: Plan,
    never_worse: bool = True,
    domain: int | None = None,
    experts_per_rank: Sequence[int] | None = None,
) -> None:
    """Raise AssertionError with every broken promise of a plan: a bug in a planner, never in its input.

    `never_worse=False` leaves out the last promise, which a planner made for comparison may not keep.
    """
    broken = broken_promises(counts_RE, plan, never_worse, domain, experts_per_rank)
    if broken:
        raise AssertionError("illegal plan: " + "; ".join(broken))


def broken_promises(
    counts_RE: Tensor,
    plan: Plan,
    never_worse: bool = True,
    domain: int | None = None,
    experts_per_rank: Sequence[int] | None = None,
) -> list[str]:
    """One sentence for each promise of a plan that does not hold."""
    (ranks, experts), slot_RS, shares_RP = counts_RE.shape, plan.slot_expert_RS, plan.shares_RP
    slots = slot_RS.shape[1]
    topology = make_topology(ranks, experts, 0, domain, experts_per_rank)
    width = topology.masters + slots
    if slot_RS.shape[0] != ranks or shares_RP.shape != (ranks, ranks * width):
        shapes = [list(t.shape) for t in (slot_RS, shares_RP, counts_RE)]
        return ["shapes {} and {} do not belong to counts {}".format(*shapes)]
    if slot_RS.dtype != torch.int32 or shares_RP.dtype != torch.int32:
        return [f"dtypes are {slot_RS.dtype} and {shares_RP.dtype}, not int32"]
    if bool(((slot_RS < -1) | (slot_RS >= experts)).any()):
        return [f"a slot holds an expert outside -1..{experts - 1}"]
    broken = []
    expert_P = logical_expert(plan, experts_per_rank)
    home_E = torch.from_numpy(topology.column_E // topology.masters).to(expert_P.device)
    host_P = torch.arange(expert_P.numel(), device=expert_P.device) // width
    held = expert_P >= 0
    copies_RE = torch.zeros(ranks, experts, dtype=torch.int64, device=expert_P.device)
    copies_RE.index_put_((host_P[held], expert_P[held]), torch.ones_like(host_P[held]), accumulate=True)
    if int(copies_RE.max()) > 1:
        rank, expert = divmod(int(copies_RE.argmax()), experts)
        home = " (its home)" if rank == home_E[expert] else ""
        broken.append(f"rank {rank}{home} holds {int(copies_RE.max())} copies of expert {expert}")
    if bool((host_P[held] // topology.domain != home_E[expert_P[held]] // topology.domain).any()):
        broken.append(f"a copy is outside of its expert's domain of {topology.domain} ranks")
    if bool((shares_RP < 0).any()):
        broken.append("a share is negative")
    if bool((shares_RP[:, ~held] != 0).any()):
        broken.append("tokens are sent to an empty slot")
    sent_RE = torch.zeros(ranks, experts, dtype=torch.int64, device=expert_P.device)
    sent_RE.index_add_(1, expert_P[held], shares_RP[:, held].long())
    if not torch.equal(sent_RE, counts_RE.long()):
        rank, expert = divmod(int((sent_RE != counts_RE).int().argmax()), experts)
        sent, have = int(sent_RE[rank, expert]), int(counts_RE[rank, expert])
        broken.append(f"source rank {rank} sends {sent} of its {have} tokens of expert {expert}")
    before_R = torch.zeros(ranks, dtype=torch.int64, device=home_E.device).index_add_(0, home_E, counts_RE.long().sum(0))
    before, after = int(before_R.max()), int(loads_after(plan).max())
    if never_worse and after > before:
        broken.append(f"the largest load rose from {before} to {after}")
    return broken
