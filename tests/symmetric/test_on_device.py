"""The pool on CUDA, several processes on one GPU: barrier, handshake, waits that end."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.multirank import run_ranks
from ultraep_compile.errors import PeerTimeoutError, PoolError
from ultraep_compile.symmetric import Region, counters, open_pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _one_gpu_for_all(monkeypatch) -> None:
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")


def _exchange(rank: int) -> None:
    regions = {"rows": Region((4, 1000), torch.float32), "inbox": counters(4)}
    pool = open_pool(regions, dist.group.WORLD, "cuda", deadline_s=60)
    second = open_pool({"rows": Region((10,), torch.int64)}, dist.group.WORLD, "cuda")
    assert pool.addresses("rows")[rank].item() == pool.region("rows").data_ptr()
    for turn in range(200):
        for peer in range(4):
            pool.on_rank("rows", peer)[rank] = 1000.0 * rank + turn
        second.region("rows").fill_(turn)
        pool.barrier()
        got = pool.region("rows").clone()
        pool.barrier()
        assert torch.equal(got[:, 7], torch.arange(4, device="cuda") * 1000.0 + turn)
        assert (second.region("rows") == turn).all()
    pool.check(synchronize=True)
    pool.close()
    with pytest.raises(PoolError):
        pool.region("rows")
    assert (second.region("rows") == 199).all()


def test_four_processes() -> None:
    run_ranks(4, _exchange)


def _late(rank: int) -> str:
    pool = open_pool({}, dist.group.WORLD, "cuda", deadline_s=2)
    pool.barrier()
    pool.check(synchronize=True)
    if rank == 2:
        time.sleep(6)
        return ""
    start = time.monotonic()
    pool.barrier(pool.site("layers.9", 4))
    with pytest.raises(PeerTimeoutError) as error:
        pool.check(synchronize=True)
    assert 1.5 < time.monotonic() - start < 5
    return str(error.value)


def test_a_late_process() -> None:
    for rank, message in enumerate(run_ranks(3, _late)[:2]):
        assert message.startswith(f"layer layers.9, microbatch 4: rank {rank} waited 2 s for rank 2 (count 1)")
