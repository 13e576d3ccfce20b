"""What the tests run in Triton's interpreter, in processes of their own: the interpreter is chosen at import.

    TRITON_INTERPRET=1 python -m tests.codegen.interpreted planner "one expert"
"""

from __future__ import annotations

import sys

import torch
from hypothesis import assume, given, settings

from tests.codegen import grouped_cases
from tests.codegen.planning_cases import Case, any_case, check_plan, check_uneven, small_cases
from ultraep_compile.codegen.count_kernels import expert_counts, post_counts, read_counts
from ultraep_compile.codegen.guard_kernels import NOTHING, note_bad, refuse
from ultraep_compile.symmetric import Region, control, open_virtual_pools


def planner(*names: str) -> None:
    """The named problems of `planning_cases`."""
    for name in names:
        check_plan(small_cases()[name], "cpu", [None, 1] if name in ("the example", "an empty rank") else [None])


def planner_uneven() -> None:
    """Few and many experts a rank, one rank with none."""
    check_uneven([3, 1, 4], [1, 2, 1], "cpu", seed=1)
    check_uneven([12, 0, 3], 2, "cpu", seed=2)


def planner_at_random(examples: str) -> None:
    """Drawn problems, whose slots are not all 0."""

    @settings(max_examples=int(examples), deadline=None, database=None)
    @given(any_case())
    def check(case: Case) -> None:
        assume(max(case.slots))
        check_plan(case, "cpu", [None])

    check()


def counts() -> None:
    """Histograms of odd sizes, with ids that are to be left out."""
    for tokens, experts in ((0, 3), (1, 1), (513, 40), (4097, 200)):
        ids = torch.randint(0, experts, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(expert_counts(ids, experts).long(), torch.bincount(ids.flatten(), minlength=experts))
    assert expert_counts(torch.tensor([[0, 2], [2, 1]]), 4).tolist() == [1, 1, 2, 0]
    assert expert_counts(torch.tensor([-1, 4, 0]), 4).tolist() == [1, 0, 0, 0]


def grouped() -> None:
    """Grouped products of odd sizes in both layouts, their gradients, and that a row's bits are its own."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in grouped_cases.SIZES:
            grouped_cases.check_product(name, dtype, "cpu")
            grouped_cases.check_weight_grad(name, dtype, "cpu")
    grouped_cases.check_independence(torch.bfloat16, "cpu", 40, 24)
    grouped_cases.check_row_sum(torch.float32, "cpu")


def guards() -> None:
    """Late checks of ids and scores, poison, and the exchange of counts with and without a failed wait."""
    note = torch.full((2,), NOTHING)
    scores = torch.randn(9000, 7)
    note_bad(torch.tensor([[0, 2], [3, 1]]), scores, 4, note)
    assert note.tolist() == [NOTHING, NOTHING]
    scores[8123, 3], scores[700, 6], scores[700, 5] = torch.nan, torch.inf, -torch.inf
    note_bad(torch.tensor([[0, 2], [5, -1]]), scores, 4, note)
    assert note.tolist() == [2, 700 * 7 + 5]
    pools = open_virtual_pools({"counts": Region((2, 2, 5), torch.int32), "page": Region((1,), torch.int64)}, 2, "cpu")
    for turn in range(3):
        counts = [torch.arange(5, dtype=torch.int32) + 10 * rank + 100 * turn for rank in range(2)]
        for rank, pool in enumerate(pools):
            post_counts(counts[rank], pool.addresses("counts"), pool.region("page"), rank, 2)
        for pool in pools:
            got = read_counts(pool.region("counts"), pool.region("page"), pool.region(control.CONTROL))
            assert torch.equal(got, torch.stack(counts))
    rows = torch.randn(40, 300)
    kept = rows.clone()
    physical = torch.zeros(20, 2, dtype=torch.int32)
    refuse(rows, pools[0], physical)
    assert torch.equal(rows, kept)
    physical[9, 1] = -1
    refuse(rows, pools[0], physical)
    assert rows[19].isnan().all() and torch.equal(rows[:19], kept[:19]) and torch.equal(rows[20:], kept[20:])
    pools[1].region(control.CONTROL)[control.FAILED] = 1
    assert refuse(kept, pools[1]).isnan().all()
    assert not read_counts(pools[1].region("counts"), pools[1].region("page"), pools[1].region(control.CONTROL)).any()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
