"""Problems for the planner's kernels, and the comparison with the planner in plain Python."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.planner.problems import skewed, spread
from ultraep_compile.codegen.planner_kernels import plan_on_device
from ultraep_compile.planner import make, make_plan, quotas
from ultraep_compile.planner.topology import make_topology


class Case(NamedTuple):
    """What is to be planned."""

    counts_RE: Tensor
    slots: int | list[int]
    domain: int | None = None
    tolerance: float = 0.01
    copy_tokens: int | None = None


def hot_rank(counts_RE: Tensor, heat: int, home: int) -> Tensor:
    """Rank 0's experts get more tokens, and all experts more of those at home: ranks export often, tokens leave home."""
    ranks, experts = counts_RE.shape
    owner_E = torch.arange(experts) // (experts // ranks)
    out_RE = torch.where(owner_E == torch.arange(ranks)[:, None], home * counts_RE, counts_RE)
    return torch.where(owner_E == 0, heat * out_RE, out_RE)


def small_cases() -> dict[str, Case]:
    """Each takes another way through the kernels; few and small, for the interpreter is slow."""
    hot = torch.zeros(4, 8, dtype=torch.int64)
    hot[:, 3] = torch.tensor([1000, 1, 0, 70])
    huge = torch.zeros(4, 4, dtype=torch.int64)
    huge[:, 0] = 2**29 - 1  # 2^31 - 4 tokens: keys of 64 bits
    huge[:, 2] = 2**28
    return {
        "the example": Case(torch.tensor([[3, 1], [4, 0]]), 1, tolerance=0.0),
        "no tokens": Case(torch.zeros(4, 8, dtype=torch.int64), 1),
        "balanced": Case(torch.full((4, 8), 9), 2),
        "one expert": Case(hot, 1),
        "huge": Case(huge, 1),
        "sizes that are no powers of two": Case(skewed(5, 3, 900, 6.0, seed=1), 2),
        "scarce slots": Case(skewed(3, 8, 60, 2.0, seed=2), 1, tolerance=0.0),  # climbs the ladder and refines
        "domains": Case(skewed(6, 2, 500, 6.0, seed=3), 1, domain=3),
        "domains of one": Case(skewed(3, 2, 500, 6.0, seed=3), 1, domain=1),
        "ranks without slots": Case(skewed(4, 3, 700, 6.0, seed=4), [2, 0, 1, 0]),
        "fast, not even": Case(skewed(4, 4, 900, 8.0, seed=6), 2, copy_tokens=200),
        "no copy pays": Case(skewed(4, 2, 900, 6.0, seed=3), 1, copy_tokens=10**6),
        "fast with huge loads": Case(huge, 1, copy_tokens=2**20),
        "many experts": Case(hot_rank(skewed(3, 11, 100, 1.0, seed=5), 3, 4), 3),
        "many experts, refined": Case(skewed(2, 20, 60, 2.0, seed=2), 1, tolerance=0.0),
        "many experts, huge": Case(huge.repeat(1, 5)[:2], 2),
        "many experts in domains": Case(skewed(4, 9, 500, 8.0, seed=3), [1, 2, 0, 2], domain=2, copy_tokens=50),
        "more experts than are read at once": Case(skewed(2, 600, 40, 9.0, seed=6), 2),
        "an empty rank": Case(spread([50, 40, 3, 2, 0, 0, 1, 1], 4), 2, tolerance=0.0),
    }


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Experts in registers or in memory, domains, ranks with fewer slots than others, all totals and prices of a copy."""
    masters = draw(st.integers(1, 5) | st.sampled_from([8, 9, 17, 33]))
    domain = draw(st.integers(1, 5 if masters < 9 else 3))
    ranks = domain * draw(st.sampled_from([1, 1, 2]))
    most = min((ranks - 1) * masters, 3)
    scale = draw(st.sampled_from([1, 3, 40, 5000, 2**31 / (ranks * ranks * masters)]))
    power, quiet = draw(st.sampled_from([0.0, 0.5, 2.0, 12.0, 60.0])), draw(st.sampled_from([0.0, 0.5]))
    counts_RE = skewed(ranks, masters, scale, power, draw(st.integers(0, 2**31)), quiet)
    return Case(
        hot_rank(counts_RE, draw(st.integers(1, 4)), draw(st.integers(1, 4))) if scale <= 5000 else counts_RE,
        draw(st.lists(st.integers(0, most), min_size=ranks, max_size=ranks)),
        domain,
        draw(st.sampled_from([0.0, 0.01, 0.1])),
        draw(st.none() | st.sampled_from([0, 1, 30, 1000])),
    )


def check_uneven(experts_per_rank: list[int], slots: int | list[int], device: str, seed: int) -> None:
    """Ranks with unequal numbers of experts: `make_plan` on a device gives the plan that it gives on the host."""
    ranks, experts = len(experts_per_rank), sum(experts_per_rank)
    counts_RE = skewed(1, experts, 700, 8.0, seed).repeat(ranks, 1) // (1 + torch.arange(ranks))[:, None]
    right = make_plan(counts_RE, slots, experts_per_rank=experts_per_rank)
    topology = make_topology(ranks, experts, slots, None, experts_per_rank)
    made = make._plan_on_device(counts_RE.to(device), topology, 100, None)
    assert torch.equal(made.slot_expert_RS.cpu(), right.slot_expert_RS) and right.slot_expert_RS.max() >= 0
    assert torch.equal(made.shares_RP.cpu(), right.shares_RP)


_empty = Tensor.new_empty


def _poisoned(like: Tensor, *size: Any, **options: Any) -> Tensor:
    return _empty(like, *size, **options).random_(-(2**31), 2**31 - 1)


def check_plan(case: Case, device: str, ranks: list[int | None]) -> None:
    """Placement, quotas and shares (of all ranks, or of one) equal the plan in plain Python bit for bit.

    Whatever is in the memory that the kernels are given: it is filled with numbers of either sign.
    """
    counts_RE, number = case.counts_RE, case.counts_RE.shape[0]
    planner = "quota" if case.copy_tokens is None else f"quota:{case.copy_tokens}"
    right = make_plan(counts_RE, case.slots, planner, case.domain, tolerance=case.tolerance)
    slots_R = [case.slots] * number if isinstance(case.slots, int) else case.slots
    on_device = counts_RE.int().contiguous().to(device)
    for rank in ranks:
        domain, points = case.domain or number, round(case.tolerance * 10000)
        with mock.patch.object(Tensor, "new_empty", _poisoned):
            made = plan_on_device(on_device, slots_R, rank, domain, points, case.copy_tokens)
        shares = right.shares_RP if rank is None else right.shares_RP[rank]
        assert torch.equal(made.slot_expert_RS.cpu(), right.slot_expert_RS)
        assert torch.equal(made.quota_P.cpu(), quotas(right))
        assert torch.equal(made.shares.cpu(), shares)
