"""A rank that dies or hangs during an exchange: the others raise within the deadline, and use nothing that is missing.

    python -m tests.data_plane.faults killed cuda 30     # or stalled, and the seconds of the stall
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from tests.data_plane import cases
from tests.multirank import run_ranks
from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.codegen.reduce import announce_gradients, await_read, reduce_from_slots
from ultraep_compile.codegen.replicate import await_slots, free_slots, replicate_to_slots
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.symmetric import open_pool

DEADLINE_S = 4.0
PLAN = [[4], [4], [0]]  # ranks 0 and 1 hold a copy of rank 2's expert, rank 2 one of rank 0's


def _rank(rank: int, how: str, device: str, stall_s: float) -> tuple[float, str, bool]:
    """Seconds until the error, its text, and whether the gradients that depended on the missing rank are all NaN."""
    weights = Bundle("w", 3, 2, 1, (Part((400, 100), torch.bfloat16),))
    grads = Bundle("g", 3, 2, 1, (Part((400, 100), torch.float32),))
    regions = {**weights.replicate_regions(), **grads.reduce_regions()}
    pool = open_pool(regions, dist.group.WORLD, device, DEADLINE_S)
    plan = torch.tensor(PLAN, dtype=torch.int32, device=device)
    masters = [t[2 * rank : 2 * rank + 2].clone() for t in cases.filled(weights.parts, 6, 0, device)]
    for step in range(3):
        replicate_to_slots(pool, weights, masters, plan, site=pool.site("layers.1", step), programs=8)
        await_slots(pool, weights, plan, pool.site("layers.1", step))
        free_slots(pool, weights)
    pool.check(synchronize=True)
    if rank == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(stall_s)
        return 0.0, "", True
    sums = [torch.ones(2, 400, 100, device=device)]
    start = time.monotonic()
    try:
        replicate_to_slots(pool, weights, masters, plan, site=pool.site("layers.1", 3), programs=8)
        await_slots(pool, weights, plan, pool.site("layers.1", 3))
        await_read(pool, grads)
        announce_gradients(pool, grads)
        reduce_from_slots(pool, grads, sums, plan, programs=8)
        pool.check(synchronize=True)
    except PeerTimeoutError as error:
        depends, free = sums[0][0], sums[0][1]  # the sum was refused, or is NaN where it needed the missing rank
        clean = bool(free.eq(1).all()) and bool(depends.eq(1).all() or depends.isnan().all())
        return time.monotonic() - start, str(error), clean
    raise AssertionError(f"rank {rank} did not notice that rank 2 is {how}")


def check_missing(how: str, device: str, stall_s: float) -> list[str]:
    """The messages of the ranks that remained."""
    if how == "killed":
        try:
            run_ranks(3, _rank, how, device, stall_s)
        except AssertionError as error:
            assert str(error) == "rank 2:\ndied", error
            return []
        raise AssertionError("the killed rank came back")
    messages = []
    for seconds, message, clean in run_ranks(3, _rank, how, device, stall_s)[:2]:
        assert seconds < DEADLINE_S + 3 and clean, (seconds, clean)
        assert "layer layers.1, microbatch 3" in message and "for rank 2 (count" in message, message
        messages.append(message)
    return messages


if __name__ == "__main__":
    for text in check_missing(sys.argv[1], sys.argv[2], float(sys.argv[3])):
        print(text)
