"""Symmetric memory on the CPU: regions, rendezvous, barrier, failures, and what a wrong use says."""

from __future__ import annotations

import glob
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.multirank import run_ranks
from ultraep_compile.errors import PeerTimeoutError, PoolError
from ultraep_compile.symmetric import Region, counters, open_pool, open_virtual_pools

REGIONS = {
    "slots": Region((3, 5), torch.bfloat16),
    "flags": Region((7,), torch.int32),
    "nothing": Region((0, 4), torch.float32),
    "inbox": counters(3),
}


def _exchange(rank: int) -> None:
    group = dist.group.WORLD
    pool = open_pool(REGIONS, group, "cpu", deadline_s=60)
    second = open_pool({"slots": Region((2,), torch.int64)}, group, "cpu")  # several pools side by side
    assert not any(torch.count_nonzero(pool.region(name)) for name in REGIONS)
    for turn in range(20):
        pool.region("slots").fill_(10 * rank + turn)
        second.region("slots").fill_(-rank - turn)
        pool.barrier()
        for peer in range(pool.ranks):
            assert torch.equal(pool.on_rank("slots", peer), torch.full((3, 5), 10.0 * peer + turn).bfloat16())
            assert second.on_rank("slots", peer).tolist() == [-peer - turn] * 2
        pool.barrier()
    pool.on_rank("flags", (rank + 1) % 3)[rank] = 7  # a write to a peer arrives there and nowhere else
    pool.barrier()
    assert pool.region("flags").tolist() == [7 if p == (rank + 2) % 3 else 0 for p in range(7)]
    pool.close()
    assert second.region("slots").tolist() == [-rank - 19] * 2
    second.close()


def test_three_processes() -> None:
    before = set(glob.glob("/dev/shm/ultraep-pool-*"))
    run_ranks(3, _exchange)
    assert set(glob.glob("/dev/shm/ultraep-pool-*")) <= before


def test_virtual_ranks_and_addresses() -> None:
    pools = open_virtual_pools(REGIONS, 3, "cpu")
    pools[1].region("flags")[2] = 5
    assert pools[0].on_rank("flags", 1).tolist() == [0, 0, 5, 0, 0, 0, 0]
    for name in ("slots", "flags", "inbox"):
        table = pools[0].addresses(name)
        assert table.dtype == torch.int64 and table.tolist() == [p.region(name).data_ptr() for p in pools]
        assert all(address % 256 == 0 for address in table.tolist())
        assert (table - pools[2].bases == pools[2].offset(name)).all()
    assert pools[0].region("nothing").shape == (0, 4)
    for p in pools:
        p.barrier()


def _different(rank: int) -> str:
    regions = {"slots": Region((4 + (rank == 1), 8), torch.float32), "flags": Region((2,), torch.int32)}
    if rank == 2:
        regions["more"] = regions.pop("flags")
    with pytest.raises(PoolError) as error:
        open_pool(regions, dist.group.WORLD, "cpu")
    return str(error.value)


def test_ranks_that_disagree() -> None:
    for message in run_ranks(3, _different):
        assert "shape of region 'slots' is (5, 8) on rank 1, (4, 8) on rank 0" in message
        assert "region 'more' is on rank 2, not on rank 0" in message
        assert "region 'flags' is on rank 0, not on rank 2" in message


@pytest.mark.parametrize(
    "use, says",
    [
        (lambda p: p.region("slot"), "Did you mean 'slots'"),
        (lambda p: p.addresses("slot"), "no region 'slot'"),
        (lambda p: p.on_rank("slots", 3), "Rank 3 is outside the pool's ranks 0..2"),
        (lambda p: p.on_rank("slots", -1), "Rank -1 is outside"),
        (lambda p: (p.close(), p.close(), p.region("slots")), "closed pool"),
        (lambda p: (p.close(), p.barrier()), "closed"),
        (lambda p: open_virtual_pools({"x": Region((2, -1), torch.int8)}, 2, "cpu"), "non-negative"),
        (lambda p: open_virtual_pools({"pool.x": Region((2,), torch.int8)}, 2, "cpu"), "rename"),
        (lambda p: open_virtual_pools({}, 0, "cpu"), "at least one rank"),
    ],
)
def test_wrong_use(use, says: str) -> None:
    with pytest.raises(PoolError, match=says):
        use(open_virtual_pools(REGIONS, 3, "cpu")[0])


def _one_is_missing(rank: int, how: str) -> str:
    pool = open_pool(REGIONS, dist.group.WORLD, "cpu", deadline_s=3)
    pool.barrier()
    if rank == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(9)
        return ""
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError) as error:
        pool.barrier(pool.site("model.layers.3.mlp", 7))
    assert time.monotonic() - start < 6
    with pytest.raises(PeerTimeoutError):  # a failed pool stays failed
        pool.barrier()
    return str(error.value)


def test_a_stalled_process() -> None:
    for rank, message in enumerate(run_ranks(3, _one_is_missing, "stalled")[:2]):
        assert f"layer model.layers.3.mlp, microbatch 7: rank {rank} waited 3 s for rank 2 (count 1)" in message
        assert "'barrier'" in message


def test_a_killed_process() -> None:
    with pytest.raises(AssertionError) as error:
        run_ranks(3, _one_is_missing, "killed")
    assert str(error.value) == "rank 2:\ndied"  # the checks of the others held
