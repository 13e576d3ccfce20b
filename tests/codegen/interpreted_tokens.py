"""What the tests of reroute, dispatch and combine run in Triton's interpreter, in processes of their own.

TRITON_INTERPRET=1 python -m tests.codegen.interpreted_tokens reroute padding
"""

from __future__ import annotations

import random
import sys

import torch
import torch.distributed as dist

from tests.codegen.token_cases import (
    TokenCase,
    check_dispatch,
    check_packed_trip,
    check_reroute,
    check_sum,
    check_wire,
    expected_buffers,
    expected_rounds,
    poison,
    random_rows,
    rerouted,
    small_token_cases,
)
from tests.multirank import run_ranks
from ultraep_compile.codegen.dispatch import pack_rows, pull_rows, push_rows, spread_rows
from ultraep_compile.codegen.handshake import arrive, await_all
from ultraep_compile.codegen.reroute import EVERYTHING
from ultraep_compile.symmetric import Region, counters, open_pool


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


def exchange_rows(rank: int, device: str, steps: int, largest: int = 11) -> None:
    """Several layers' rows through the same buffers: nobody reads a row too early or overwrites one too late."""
    width, rows = 6, 10 * largest + 100
    delay = random.Random(rank)
    regions = {
        "rows": Region((rows, width), torch.float32),
        "references": Region((rows,), torch.int32),
        "arrived": counters(dist.get_world_size()),
        "results": Region((rows, width), torch.float32),
        "complete": counters(dist.get_world_size()),
    }
    pool = open_pool(regions, dist.group.WORLD, device, deadline_s=200)
    for seed in range(steps):
        case = TokenCase.draw(pool.ranks, 2, 1, [largest // 2, largest], 2, 2.0, seed)
        routings = [rerouted(case, r, device, once_per_rank=True) for r in range(pool.ranks)]
        sources = [random_rows(len(i), width, torch.float32, 10 * seed + r) for r, i in enumerate(case.ids_RTK)]
        once = seed % 2 == 1
        if device == "cuda" and delay.random() < 0.3:
            torch.cuda._sleep(delay.randrange(2_000_000))
        push_rows(
            sources[rank].to(device), routings[rank], pool.addresses("rows"), rows, case.layout,
            references=pool.addresses("references") if once else None,
        )  # fmt: skip
        arrive(pool, "arrived")
        await_all(pool, "arrived", "dispatched rows have arrived")
        if once:
            spread_rows(pool.region("rows"), pool.region("references"), routings[rank].window)
        trips = expected_rounds(case, routings, EVERYTHING, 0, rows)
        used = int(routings[rank].window.offsets[-1])
        expected = expected_buffers(trips, sources, 2, rows, False)[rank]
        assert torch.equal(pool.region("rows")[:used].cpu(), expected[:used])
        pool.region("results")[:used] = 2 * pool.region("rows")[:used]
        arrive(pool, "complete")
        await_all(pool, "complete", "rows to combine have arrived")
        out = poison((2 * len(sources[rank]), width), torch.float32, device)
        pull_rows(out, routings[rank], pool.addresses("results"), rows, case.layout)
        assert torch.equal(out.cpu(), 2 * sources[rank].repeat_interleave(2, 0))
        pool.check()


def on_device() -> None:
    """Small shapes on a GPU, for compute-sanitizer (without TRITON_INTERPRET)."""
    for name in ("padding", "many copies", "repeated choices"):
        case = small_token_cases()[name]
        check_reroute(case, "cuda", [0], capacity=11)
        check_dispatch(case, "cuda", 9, torch.bfloat16)
        check_dispatch(case, "cuda", 264, torch.bfloat16, capacity=16, programs=3)
        check_packed_trip(case, "cuda", 130)
        check_sum(case, "cuda", 130, torch.bfloat16)
    check_wire("cuda", 5, 300, torch.float32, 0)
    torch.cuda.synchronize()


def processes() -> None:
    run_ranks(2, exchange_rows, "cpu", 3)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
