"""The data plane over real ranks, one process each: `torchrun --nproc-per-node N -m benchmarks.data_plane --json F`.

Bandwidth here is bytes that leave (replicate) or enter (reduce) a rank over the time of the slowest rank. All ranks send
and receive alike, but for the rows `one way`, where rank 0 alone sends, to rank 1. The ceilings are peer copies by the copy
engine, to and from the next rank, all ranks at once or one way. A time is that of a CUDA graph of CALLS calls over CALLS,
so that launching does not count.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.data_plane import REPEATS, random_masters, ring_plan
from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.codegen.handshake import hosted_pools
from ultraep_compile.codegen.reduce import announce_gradients, await_read, launch_pull, reduce_from_slots
from ultraep_compile.codegen.replicate import await_slots, free_slots, launch_push, replicate_to_slots
from ultraep_compile.symmetric import Region, SymmetricPool, open_pool

CALLS = 5


def slowest(function: Callable[[], object]) -> tuple[float, float, float]:
    """Median, least and greatest over repetitions of the slowest rank's milliseconds."""
    function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    samples = []
    for _ in range(REPEATS + 3):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        worst = torch.tensor([start.elapsed_time(end) / CALLS], device="cuda")
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        samples.append(worst.item())
    samples = samples[3:]
    return statistics.median(samples), min(samples), max(samples)


def row(what: str, moved: int, times: tuple[float, float, float], ceilings: dict[str, float], **facts: Any) -> dict:
    speed = moved / times[0] / 1e6
    shares = {f"of_{name}": speed / value for name, value in ceilings.items()}
    found = {"GB": moved / 1e9, "ms": times[0], "ms_min": times[1], "ms_max": times[2], "GB/s": speed}
    return {"what": what, "ranks": dist.get_world_size(), **facts, **found, **shares}


def ceiling_rows(size: int = 256 << 20) -> list[dict[str, Any]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pool = open_pool({"x": Region((size,), torch.uint8)}, dist.group.WORLD, "cuda")  # pyright: ignore
    mine, theirs = torch.empty(size, dtype=torch.uint8, device="cuda").random_(), pool.on_rank("x", (rank + 1) % ranks)
    rows = [
        row("copy engine push", size, slowest(lambda: theirs.copy_(mine)), {}),
        row("copy engine pull", size, slowest(lambda: mine.copy_(theirs)), {}),
    ]
    if dist.get_backend() == "nccl":
        a, b = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8, device="cuda")
        sent = size * (ranks - 1) // ranks
        rows.append(row("nccl all_to_all_single", sent, slowest(lambda: dist.all_to_all_single(b, a)), {}))
    pool.close()
    return rows


def one_way_rows(parts: tuple[Part, ...], sweep: list[tuple[int, int]], size: int = 256 << 20) -> list[dict[str, Any]]:
    """Two experts from rank 0 to rank 1, nothing else: the case for which UltraEP's weight_sync was measured."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pool = open_pool({"x": Region((size,), torch.uint8)}, dist.group.WORLD, "cuda")  # pyright: ignore
    mine, theirs = torch.empty(size, dtype=torch.uint8, device="cuda").random_(), pool.on_rank("x", (rank + 1) % ranks)
    rows = [row("copy engine push, one way", size, slowest(lambda: rank == 0 and theirs.copy_(mine)), {})]
    pool.close()
    bundle = Bundle("w", ranks, 2, 2, parts)
    plan = torch.full((ranks, 2), -1, dtype=torch.int32)
    plan[1] = torch.arange(2)
    pool = open_pool(bundle.replicate_regions(), dist.group.WORLD, "cuda", deadline_s=30)  # pyright: ignore
    masters, table, hosted = _weights(bundle, rank), plan.cuda(), hosted_pools(pool)

    def exchange(programs: int, warps: int) -> None:
        replicate_to_slots(pool, bundle, masters, table, programs=programs, warps=warps)
        await_slots(pool, bundle, table)
        free_slots(pool, bundle)

    exchange(*sweep[0])
    pool.check(synchronize=True)
    if rank == 1:
        _check_slots(pool, bundle, 2, [0, 1])
    moved, ceilings = 2 * sum(p.nbytes for p in parts), {"push": rows[0]["GB/s"]}
    facts = {"expert_MB": moved / 2e6, "fan_out": 1, "mode": "direct"}
    for programs, warps in sweep:
        times = slowest(lambda p=programs, w=warps: exchange(p, w))
        rows.append(row("replicate exchange, one way", moved, times, ceilings, **facts, programs=programs, warps=warps))
    for programs, warps in sweep:
        times = slowest(lambda p=programs, w=warps: launch_push(hosted, bundle, masters, p, w))
        rows.append(row("replicate stream, one way", moved, times, ceilings, **facts, programs=programs, warps=warps))
    pool.barrier()
    pool.close()
    return rows


def _check_slots(pool: SymmetricPool, bundle: Bundle, hot: int, line: list[int]) -> None:
    """Every rank can make every rank's weights from a seed."""
    for home in sorted({e // hot for e in line}):
        masters = _weights(bundle, home)
        for slot, expert in enumerate(line):
            if expert // hot == home:
                for i, t in enumerate(masters):
                    got = pool.region(bundle.region_of(i))[slot]
                    assert torch.equal(got.view(torch.int16), t[expert % hot].view(torch.int16)), (slot, expert)


def _weights(bundle: Bundle, rank: int) -> list[torch.Tensor]:
    torch.cuda.manual_seed(rank)
    return random_masters(bundle.parts, bundle.masters)


def replicate_rows(
    parts: tuple[Part, ...], fan: int, sweep: list[tuple[int, int]], ceilings: dict[str, float]
) -> list[dict]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = sum(p.nbytes for p in parts)
    hot = max(1, -(-(1 << 29) // (fan * size)))
    bundle = Bundle("w", ranks, hot, hot * fan, parts)
    plan = ring_plan(ranks, hot, fan)
    pool = open_pool(bundle.replicate_regions(), dist.group.WORLD, "cuda", deadline_s=30)  # pyright: ignore
    masters, table = _weights(bundle, rank), plan.cuda()
    rows, hosted = [], hosted_pools(pool)
    for mode in ("direct", "relay") if fan > 1 and plan.numel() <= 512 else ("direct",):
        for part in range(len(parts)):
            pool.region(bundle.region_of(part)).view(torch.uint8).fill_(0xFF)
        pool.barrier()

        def exchange(programs: int, warps: int, mode: str = mode) -> None:
            replicate_to_slots(pool, bundle, masters, table, mode=mode, programs=programs, warps=warps)
            await_slots(pool, bundle, table)
            free_slots(pool, bundle)

        exchange(*sweep[0])
        pool.check(synchronize=True)
        _check_slots(pool, bundle, hot, plan[rank].tolist())
        facts = {"expert_MB": size / 1e6, "fan_out": fan, "mode": mode}
        for programs, warps in sweep:
            times = slowest(lambda p=programs, w=warps: exchange(p, w))
            rows.append(
                row("replicate exchange", hot * fan * size, times, ceilings, **facts, programs=programs, warps=warps)
            )
        if mode == "direct":
            for programs, warps in sweep:
                times = slowest(lambda p=programs, w=warps: launch_push(hosted, bundle, masters, p, w))
                rows.append(
                    row("replicate stream", hot * fan * size, times, ceilings, **facts, programs=programs, warps=warps)
                )
            pool.barrier()
            pool.region("w.arrived").zero_()
            pool.barrier()
    pool.check(synchronize=True)
    pool.close()
    return rows


def reduce_rows(
    parts: tuple[Part, ...], fan: int, sweep: list[tuple[int, int]], ceilings: dict[str, float]
) -> list[dict]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = sum(p.nbytes for p in parts)
    hot = max(1, -(-(1 << 29) // (fan * size)))
    bundle = Bundle("g", ranks, hot, hot * fan, parts)
    plan = ring_plan(ranks, hot, fan)
    pool = open_pool(bundle.reduce_regions(), dist.group.WORLD, "cuda", deadline_s=30)  # pyright: ignore
    torch.cuda.manual_seed(rank)
    for i in range(len(parts)):
        pool.region(bundle.region_of(i)).normal_()
    start = [torch.randn(hot, *p.shape, device="cuda") for p in parts]
    grads, table, hosted = [g.clone() for g in start], plan.cuda(), hosted_pools(pool)

    def exchange(programs: int, warps: int) -> None:
        await_read(pool, bundle)
        announce_gradients(pool, bundle)
        reduce_from_slots(pool, bundle, grads, table, programs=programs, warps=warps)

    rows, facts = [], {"wire": str(parts[0].dtype), "wire_MB": size / 1e6, "fan_out": fan}
    pool.barrier()
    for programs, warps in sweep:
        for g, s in zip(grads, start, strict=True):
            g.copy_(s)
        exchange(programs, warps)
        pool.check(synchronize=True)
        for i, s in enumerate(start):  # the bits of the sequential sum, whatever the launch
            expected = s.clone()
            for r, line in enumerate(plan.tolist()):
                for slot, expert in enumerate(line):
                    if expert // hot == rank:
                        expected[expert % hot] += pool.on_rank(bundle.region_of(i), r)[slot].float()
            assert torch.equal(grads[i].view(torch.int32), expected.view(torch.int32))
        more = {**facts, "programs": programs, "warps": warps}
        rows.append(
            row(
                "reduce exchange",
                hot * fan * size,
                slowest(lambda p=programs, w=warps: exchange(p, w)),
                ceilings,
                **more,
            )
        )
        stream = slowest(lambda p=programs, w=warps: launch_pull(hosted, bundle, grads, p, w))
        rows.append(row("reduce stream", hot * fan * size, stream, ceilings, **more))
    pool.check(synchronize=True)
    pool.close()
    return rows


def rank_tables(big: tuple[Part, ...], small: tuple[Part, ...]) -> list[dict[str, Any]]:
    local = int(os.environ["LOCAL_RANK"])
    shared = torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if shared:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("cuda:gloo,cpu:gloo" if shared else "nccl")
    rows = ceiling_rows()
    ceilings = {"push": rows[0]["GB/s"], "pull": rows[1]["GB/s"]}
    sweep = [(16, 4), (32, 4), (32, 8), (64, 8), (132, 4), (264, 4), (264, 8)]
    rows += one_way_rows(big, sweep)
    fans = sorted({1, dist.get_world_size() - 1})
    for fan in fans:
        rows += replicate_rows(big, fan, sweep, {"push": ceilings["push"]})
    rows += replicate_rows(small, fans[-1], sweep, {"push": ceilings["push"]})
    for dtype in (torch.float32, torch.bfloat16):
        rows += reduce_rows(tuple(Part(p.shape, dtype) for p in big), fans[-1], sweep, {"pull": ceilings["pull"]})
    dist.destroy_process_group()
    return rows
