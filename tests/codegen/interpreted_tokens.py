"""What the tests of reroute, dispatch and combine run in Triton's interpreter, in processes of their own.

TRITON_INTERPRET=1 python -m tests.codegen.interpreted_tokens reroute padding
"""

from __future__ import annotations

import sys

import torch

from tests.codegen.token_cases import (
    check_dispatch,
    check_packed_trip,
    check_reroute,
    check_sum,
    check_wire,
    small_token_cases,
)
from ultraep_compile.codegen.dispatch import pack_rows


def reroute(*names: str) -> None:
    for name in names:
        case = small_token_cases()[name]
        check_reroute(case, "cpu", [0, case.layout.ranks - 1])
        check_reroute(case, "cpu", [case.layout.ranks // 2], capacity=11)


def dispatch(*names: str) -> None:
    for name in names:
        case = small_token_cases()[name]
        check_dispatch(case, "cpu", 9, torch.bfloat16, programs=2)
        check_dispatch(case, "cpu", 3, torch.float32, capacity=16)


def wire() -> None:
    """Packed rows, and the sum in top-k order."""
    for rows, width, dtype in (
        (3, 200, torch.bfloat16),
        (5, 16, torch.float32),
        (1, 1, torch.bfloat16),
        (21, 128, torch.float16),
    ):
        check_wire("cpu", rows, width, dtype, width, programs=2)
    assert pack_rows(torch.tensor([[3.0]]))[0, [0, 16, 17, 18, 19]].tolist() == [0x7C, 0, 0, 0, 0x3C]
    for name in ("padding", "the example"):
        check_packed_trip(small_token_cases()[name], "cpu", 130)
        check_sum(small_token_cases()[name], "cpu", 37, torch.float32)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
