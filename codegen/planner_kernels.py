"""The planner `quota` as three Triton launches, from all-gathered counts to placement, quotas and shares.

    prepare   column sums, the counts by expert, prefix sums over source ranks
    search    one program of one warp per candidate: every method at every threshold, side by side
    finish    the chosen candidate's slots, quotas and exact shares

Same integers, same ties, so the same plan bit for bit as `ultraep_compile.planner.quota` (the reference, in plain
Python). Nothing is read on the host, shapes are fixed, the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ultraep_compile.codegen.hottest_kernels import in_registers
from ultraep_compile.codegen.search_kernel import CANDIDATES, COARSE, METHODS, search
from ultraep_compile.codegen.share_kernels import finish, prepare
from ultraep_compile.planner.quota import TOLERANCE

BLOCK = 4  # experts of a program of `prepare`
INSTANCES, FINISH_WARPS = 8, 4  # physical experts of a program of `finish`


class DevicePlan(NamedTuple):
    """What the kernels compute, for R ranks with M masters and S slots each, P = R*(M+S)."""

    slot_expert_RS: Tensor  # int32 [R, S]: logical expert in each slot, -1 = empty
    quota_P: Tensor  # int64 [P]: tokens of each physical expert
    shares: Tensor  # int32 [P], what the given rank sends to each; or [R, P], what every rank sends


def plan_on_device(
    counts_RE: Tensor, slots_R: Sequence[int], rank: int | None, domain: int, tolerance: int = TOLERANCE,
    copy_tokens: int | None = None,
) -> DevicePlan:  # fmt: skip
    """The plan of `quota` for int32 counts on a CUDA device (or on the CPU in Triton's interpreter).

    Parameters:
        slots_R: slots of each rank.
        rank: whose shares to compute; None for those of all ranks.
        domain: D, ranks d*D..(d+1)*D-1 exchange copies among themselves only; divides R.
        tolerance: basis points of the mean that the largest load may exceed it by.
        copy_tokens: of `plan_quota`.

    Example: counts [[3, 1], [4, 0]], a slot each, tolerance 0: expert 0 is copied to rank 1, which computes three
    of its own four tokens: slots [[-1], [0]], quotas [4, 0, 1, 3], shares [[3, 0, 1, 0], [1, 0, 0, 3]].
    """
    made, stages = planning_stages(counts_RE, slots_R, rank, domain, tolerance, copy_tokens)
    for launch in stages.values():
        launch()
    return made


def planning_stages(
    counts_RE: Tensor, slots_R: Sequence[int], rank: int | None, domain: int, tolerance: int = TOLERANCE,
    copy_tokens: int | None = None,
) -> tuple[DevicePlan, dict[str, Callable[[], object]]]:  # fmt: skip
    """Where the plan will be, and the launches that make it, by name and in order."""
    timed = copy_tokens is not None
    (ranks, experts), slots, domains = counts_RE.shape, max(slots_R), counts_RE.shape[0] // domain
    masters, device = experts // ranks, counts_RE.device
    assert counts_RE.dtype == torch.int32 and counts_RE.is_contiguous() and slots > 0, "checked by make_plan"
    new, power = counts_RE.new_empty, triton.next_power_of_2
    physical = ranks * (masters + slots)
    everyone, row = rank is None, rank or 0
    made = DevicePlan(
        new(ranks, slots),
        new(physical, dtype=torch.int64),
        new((ranks, physical) if everyone else (physical,)),
    )
    load, own = new(experts, dtype=torch.int64), new(experts, dtype=torch.int64)
    before = new(ranks if everyone else 1, experts, dtype=torch.int64)
    key, flag = new(3 * domains, dtype=torch.int64), new(domains)
    table = new(CANDIDATES * ranks * slots, dtype=torch.int64)
    slots_on_device, methods = _on_device(tuple(slots_R), device), _on_device(METHODS, device)
    per_domain = triton.cdiv(domain * (masters + slots), INSTANCES)
    g_bits, m_bits, on_gpu = max(_bits(domain), 5), _bits(masters), counts_RE.is_cuda
    column = new(ranks << m_bits + g_bits)
    in_memory = not in_registers(masters, 1 << g_bits)
    heat = new(3 * ranks if in_memory else 0, dtype=torch.int64)
    keys = new((1 + CANDIDATES) * ranks << m_bits if in_memory else 0, dtype=torch.int64)
    block = 1 << m_bits if in_memory else BLOCK
    prepare_warps = min(max(power(ranks) * block // 1024, 1), 8)
    overlap = {"launch_pdl": True} if on_gpu else {}  # a kernel's launch overlaps the end of the one before

    return made, {
        "prepare": lambda: prepare[(ranks if in_memory else triton.cdiv(experts, BLOCK),)](
            counts_RE, load, own, column, before, key, heat, keys, row, ranks, experts, domain, masters, domains, g_bits,
            m_bits, power(ranks), block, everyone, in_memory, on_gpu, num_warps=prepare_warps, **overlap,
        ),
        "search": lambda: search[(domains, COARSE if timed else CANDIDATES)](
            own, load, counts_RE, column, slots_on_device, methods, key, flag, table, heat, keys, tolerance,
            copy_tokens or 0, ranks, domains, domain, masters, slots, g_bits, m_bits, power(slots),
            len(set(slots_R)) == 1, CANDIDATES, timed, on_gpu, num_warps=1, **overlap,
        ),
        "finish": lambda: finish[(domains * per_domain, ranks if everyone else 1)](
            counts_RE, load, before, key, flag, table, *made, row, experts, ranks, domains, domain, masters, slots,
            m_bits, power(domain * slots), INSTANCES, per_domain, CANDIDATES, everyone, on_gpu, num_warps=FINISH_WARPS, **overlap,
        ),
    }  # fmt: skip


def _bits(size: int) -> int:
    """Of the power of two that holds `size` entries."""
    return (size - 1).bit_length()


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant table, uploaded once: an upload while a CUDA graph is captured would fail."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)
