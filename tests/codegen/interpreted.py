"""What the tests run in Triton's interpreter, in processes of their own: the interpreter is chosen at import.

    TRITON_INTERPRET=1 python -m tests.codegen.interpreted planner "one expert"
"""

from __future__ import annotations

import sys

import torch

from tests.codegen import grouped_cases
from tests.codegen.planning_cases import check_plan, small_cases
from ultraep_compile.codegen.count_kernels import expert_counts


def planner(*names: str) -> None:
    """The named problems of `planning_cases`."""
    for name in names:
        check_plan(small_cases()[name], "cpu", [None, 1] if name in ("the example", "an empty rank") else [None])


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


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
