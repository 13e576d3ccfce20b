"""Signals and waits in Triton's interpreter, with real processes over shared files:

TRITON_INTERPRET=1 python -m tests.symmetric.interpreted exchange
"""

from __future__ import annotations

import sys
import time

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl

from tests.multirank import run_ranks
from ultraep_compile.codegen import waits
from ultraep_compile.codegen.handshake import arrive, await_all, meet
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.symmetric import Region, SymmetricPool, control, counters, open_pool, open_virtual_pools

RANKS = 3


def regions(ranks: int) -> dict[str, Region]:
    return {"rows": Region((ranks, 4), torch.int64), "flags": Region((ranks,), torch.int32), "ready": counters(ranks)}


@triton.jit
def put(rows_p, flags_p, values_p, rank, turn):
    """Program p: this rank's row to rank p, then the flag."""
    i = tl.arange(0, 4)
    theirs_p = tl.load(rows_p + tl.program_id(0)).to(tl.pointer_type(tl.int64))
    tl.store(theirs_p + rank * 4 + i, tl.load(values_p + tl.program_id(0) * 4 + i))
    waits.signal(tl.load(flags_p + tl.program_id(0)).to(tl.pointer_type(tl.int32)) + rank, turn)


@triton.jit
def take(rows_p, flags_p, control_p, out_p, rank, turn, site, CODE: tl.constexpr):
    """Program p: the row that rank p sent, once it has come."""
    i, peer = tl.arange(0, 4), tl.program_id(0)
    mine_p = tl.load(control_p + rank).to(tl.pointer_type(tl.int64))
    flag_p = tl.load(flags_p + rank).to(tl.pointer_type(tl.int32)) + peer
    if waits.wait(flag_p, turn, mine_p, CODE, peer, site, peer):
        rows = tl.load(rows_p + rank).to(tl.pointer_type(tl.int64))
        tl.store(out_p + peer * 4 + i, tl.load(rows + peer * 4 + i))


def run_take(pool: SymmetricPool, out: torch.Tensor, turn: int, site: int = 0) -> None:
    tables = [pool.addresses(n) for n in ("rows", "flags", control.CONTROL)]
    code = control.phase_code("dispatched rows have arrived")
    take[(pool.ranks,)](*tables, out, pool.rank, turn, site, code)


def _exchange(rank: int) -> None:
    pool = open_pool(regions(RANKS), dist.group.WORLD, "cpu", deadline_s=100)
    for turn in range(1, 6):
        values, out = torch.randint(0, 1 << 40, (RANKS, 4)), torch.full((RANKS, 4), -1)
        put[(RANKS,)](pool.addresses("rows"), pool.addresses("flags"), values, rank, turn)
        run_take(pool, out, turn)
        expected = torch.empty_like(values)
        dist.all_to_all_single(expected, values)
        assert torch.equal(out, expected)
        meet(pool, "ready", "receive buffers are free")  # nobody overwrites a row that is still to be read
    pool.check()


def exchange() -> None:
    run_ranks(RANKS, _exchange)


def _too_late(rank: int) -> list[str]:
    pool = open_pool(regions(2), dist.group.WORLD, "cpu", deadline_s=2)
    if rank == 1:
        time.sleep(6)
        return []
    out = torch.full((2, 4), -1)
    pool.region("flags")[0] = 1
    start = time.monotonic()
    run_take(pool, out, 1, pool.site("model.layers.5", 2))
    assert time.monotonic() - start < 5
    assert (out[0] == 0).all() and (out[1] == -1).all()  # what had come was taken, what had not was not
    with pytest.raises(PeerTimeoutError) as first:
        pool.check()
    out.fill_(-1)
    start = time.monotonic()
    run_take(pool, out, 2)  # no second deadline after a failure
    arrive(pool, "ready")
    await_all(pool, "ready", "receive buffers are free")
    assert time.monotonic() - start < 1 and (out == -1).all()
    assert pool.on_rank("ready", 1)[0] == 0  # and nothing is signalled
    with pytest.raises(PeerTimeoutError):
        pool.barrier()
    return [str(first.value)]


def too_late() -> None:
    (message,) = run_ranks(2, _too_late)[0]
    assert message.startswith(
        "layer model.layers.5, microbatch 2: rank 0 waited 2 s for rank 1 (count 0, position 1) to reach count 1 of "
        "'dispatched rows have arrived'."
    ), message


def handshake() -> None:
    """Virtual ranks: counts wrap, and the missing are named."""
    pools = open_virtual_pools(regions(3), 3, "cpu", deadline_s=0.3)
    for p in pools:
        p.region("ready").fill_(2**31 - 2)
    for _ in range(4):
        arrive(pools, "ready")
        await_all(pools, "ready", "slots are free")
    assert pools[1].region("ready").tolist() == [-(2**31) + 2] * 5
    for p in pools:
        p.check()
    arrive(pools[1:2], "ready")
    await_all(pools[1:], "ready", "slots are free")
    with pytest.raises(PeerTimeoutError, match=r"rank 2 waited 0.3 s for ranks 0 \(count -\d+\), 2 \(count"):
        pools[2].check()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
