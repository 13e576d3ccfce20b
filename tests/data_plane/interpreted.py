"""The data plane in Triton's interpreter: TRITON_INTERPRET=1 python -m tests.data_plane.interpreted routes"""

from __future__ import annotations

import os
import random
import sys
import time

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from tests.data_plane import cases
from tests.multirank import run_ranks
from ultraep_compile.codegen.bundle import Bundle, Part, route_layout, sender_offset
from ultraep_compile.codegen.reduce import announce_gradients, await_read, reduce_from_slots, reduce_reference
from ultraep_compile.codegen.replicate import await_slots, free_slots, replicate_reference, replicate_to_slots
from ultraep_compile.codegen.routes import launch_routes, routes_reference
from ultraep_compile.codegen.stream import copy_tiles
from ultraep_compile.symmetric import SymmetricPool, open_pool, open_virtual_pools


def check_routes(bundle: Bundle, plan, mode: str, device: str = "cpu") -> None:
    pools = open_virtual_pools(bundle.replicate_regions(), bundle.ranks, device)
    offsets = (pools[0].offset(f"{bundle.name}.route"), pools[0].offset(f"{bundle.name}.targets"))
    for p in pools:
        p.region(f"{bundle.name}.route")[1:] = -77
        p.region(f"{bundle.name}.targets").fill_(-77)
    launch_routes(bundle, plan.to(device), pools[0].bases, 0, bundle.ranks, offsets, mode)
    sender = cases.senders(bundle, plan, mode)
    bases = pools[0].bases.tolist()
    for pool in pools:
        route, targets = pool.region(f"{bundle.name}.route").tolist(), pool.region(f"{bundle.name}.targets").tolist()
        assert route[0] == 1
        if mode != "direct":
            at = sender_offset(bundle)
            assert route[at : at + len(sender)] == sender, (route[at : at + len(sender)], sender)
        for stage in (0, 1) if mode != "direct" else (0,):
            lists = route_layout(bundle, stage)
            expected = routes_reference(plan.tolist(), bundle.masters, pool.rank, sender, stage)
            found = []
            for i in range(route[1 + stage]):
                first, fan = route[lists.first + i], route[lists.fan + i]
                where = [
                    bases.index(targets[stage][first + d]) * bundle.slots + route[lists.slot + first + d]
                    for d in range(fan)
                ]
                found.append((route[lists.source + i], where))
            assert found == expected, (pool.rank, stage, found, expected)


def routes() -> None:
    check_routes(Bundle("b", 3, 2, 1, (Part((4,), torch.int32),)), torch.tensor([[4], [1], [1]], dtype=torch.int32), "direct")
    for seed, (ranks, masters, slots) in enumerate(((2, 1, 1), (5, 3, 2), (9, 1, 1), (16, 2, 2))):
        bundle = Bundle("b", ranks, masters, slots, (Part((4,), torch.int32),))
        for mode in ("direct", "relay", "adaptive"):
            check_routes(bundle, cases.random_plan(ranks, masters, slots, seed, hot=0.6), mode)


def poison(pools: list[SymmetricPool], bundle: Bundle) -> None:
    for pool in pools:
        for i in range(len(bundle.parts)):
            pool.region(bundle.region_of(i)).view(torch.uint8).fill_(0xFF)  # NaN in every float type


def check_virtual(bundle: Bundle, plan, mode: str, seed: int, device: str = "cpu", **launch: int) -> None:
    """Two exchanges over one pool, in this process; filled slots equal their experts, the others are untouched."""
    pools = open_virtual_pools(bundle.replicate_regions(), bundle.ranks, device, deadline_s=20)
    wanted = open_virtual_pools(bundle.replicate_regions(), bundle.ranks, device)
    for step in range(2):
        masters = cases.filled(bundle.parts, bundle.ranks * bundle.masters, seed + step, device)
        now = plan.roll(step, 0) if step == 0 else torch.full_like(plan, -1).copy_(plan)
        poison(pools, bundle)
        poison(wanted, bundle)
        replicate_to_slots(pools, bundle, masters, now.to(device), mode=mode, **launch)
        await_slots(pools, bundle, now.to(device))
        replicate_reference(wanted, bundle, masters, now)
        for p, q in zip(pools, wanted, strict=True):
            p.check(synchronize=True)
            for i in range(len(bundle.parts)):
                assert cases.same_bytes(p.region(bundle.region_of(i)), q.region(bundle.region_of(i))), (mode, step, p.rank, i)
        free_slots(pools, bundle)


def virtual(mode: str) -> None:
    for seed, (ranks, masters, slots) in enumerate(((2, 2, 1), (5, 1, 2), (9, 1, 1))):
        bundle = Bundle("b", ranks, masters, slots, cases.WEIGHTS, chunk_bytes=1)
        plan = cases.random_plan(ranks, masters, slots, seed + 3, hot=0.7)
        check_virtual(bundle, plan, mode, seed, programs=3 * ranks)


def check_reduce(bundle: Bundle, own: list[torch.dtype], plan, seed: int, device: str = "cpu", **launch: int) -> None:
    """Two reductions over one pool, all ranks in this process: the bits of the sequential sum; others untouched."""
    pools = open_virtual_pools(bundle.reduce_regions(), bundle.ranks, device, deadline_s=20)
    g = torch.Generator().manual_seed(seed)
    for _ in range(2):
        await_read(pools, bundle)
        for pool in pools:
            for i in range(len(bundle.parts)):
                region = pool.region(bundle.region_of(i))
                region.copy_(torch.randn(region.shape, generator=g))
                for slot, expert in enumerate(plan[pool.rank].tolist()):
                    if expert < 0:
                        region[slot] = float("nan")
        grads = [
            torch.randn(bundle.ranks * bundle.masters, *p.shape, generator=g).to(device=device, dtype=t)
            for p, t in zip(bundle.parts, own, strict=True)
        ]
        grads[0].view(-1)[:3] = -0.0
        expected = reduce_reference(pools, bundle, grads, plan)
        announce_gradients(pools, bundle)
        out = reduce_from_slots(pools, bundle, grads, plan.to(device), **launch)
        for p in pools:
            p.check(synchronize=True)
        for i, (a, b) in enumerate(zip(out, expected, strict=True)):
            assert cases.same_bytes(a, b), (i, (a != b).nonzero(), a[a != b], b[a != b])


def reduce() -> None:
    for seed, (ranks, masters, slots) in enumerate(((2, 2, 1), (5, 1, 2), (9, 1, 1))):
        bundle = Bundle("g", ranks, masters, slots, cases.GRADS)
        plan = cases.random_plan(ranks, masters, slots, seed + 3, hot=0.7)
        own = [torch.float32] * 6  # the interpreter truncates fp32 to bf16; rounding is tested on a GPU
        check_reduce(bundle, own, plan, seed, programs=3 * ranks)


def _step(pool: SymmetricPool, weights: Bundle, grads: Bundle, step: int, mode: str) -> None:
    """One exchange each way among processes, against what every rank can compute from the seed alone."""
    rank, experts = pool.rank, weights.ranks * weights.masters
    plan = cases.random_plan(weights.ranks, weights.masters, weights.slots, 1000 + step, hot=0.6)
    everything = cases.filled(weights.parts, experts, step, str(pool.device))
    mine = slice(rank * weights.masters, (rank + 1) * weights.masters)
    g = torch.Generator().manual_seed(step)
    slot_grads = [torch.randn(*plan.shape, *p.shape, generator=g).to(p.dtype) for p in grads.parts]
    own = [torch.randn(experts, *p.shape, generator=g) for p in grads.parts]
    delay = random.Random(step * 10 + rank)

    def pause() -> None:
        if delay.random() < 0.3:
            time.sleep(delay.random() * 0.02)

    table = plan.to(pool.device)
    pause()
    replicate_to_slots(pool, weights, [t[mine].clone() for t in everything], table, mode=mode, programs=4)
    pause()
    await_slots(pool, weights, table, pool.site("layers.3", step))
    got = [pool.region(weights.region_of(i)).clone() for i in range(len(weights.parts))]
    free_slots(pool, weights)
    await_read(pool, grads)
    for i, t in enumerate(slot_grads):
        pool.region(grads.region_of(i)).copy_(t[rank])
    pause()
    announce_gradients(pool, grads)
    pause()
    sums = reduce_from_slots(pool, grads, [t[mine].clone().to(pool.device) for t in own], table, programs=4)
    pool.check(synchronize=True)
    for slot, expert in enumerate(plan[rank].tolist()):
        if expert >= 0:
            assert all(cases.same_bytes(a[slot], b[expert]) for a, b in zip(got, everything, strict=True)), (rank, step)
    for i, (total, start, parts) in enumerate(zip(sums, own, slot_grads, strict=True)):
        expected = start.clone()
        for r, row in enumerate(plan.tolist()):
            for s, expert in enumerate(row):
                if expert >= 0:
                    expected[expert] += parts[r, s].float()
        assert cases.same_bytes(total.cpu(), expected[mine]), (rank, step, i, total.cpu() - expected[mine])


def steps_on(rank: int, device: str, steps: int) -> None:
    """Random plans, random delays; real processes."""
    ranks = dist.get_world_size()
    weights = Bundle("w", ranks, 2, 2, (Part((31, 300), torch.bfloat16), Part((7,), torch.uint8)), chunk_bytes=1)
    grads = Bundle("g", ranks, 2, 2, (Part((31, 300), torch.float32), Part((7,), torch.bfloat16)))
    pool = open_pool({**weights.replicate_regions(), **grads.reduce_regions()}, dist.group.WORLD, device, deadline_s=100)
    for step in range(steps):
        _step(pool, weights, grads, step, ("direct", "relay", "adaptive")[step % 3])
    pool.barrier()
    pool.check(synchronize=True)


def processes() -> None:
    run_ranks(3, steps_on, "cpu", 6)


def examples() -> None:
    """The examples of the docstrings."""
    part = (Part((3,), torch.float32),)
    plan = torch.tensor([[-1], [0], [0]], dtype=torch.int32)
    weights, grads = Bundle("w", 3, 1, 1, part), Bundle("g", 3, 1, 1, part)
    pools = open_virtual_pools({**weights.replicate_regions(), **grads.reduce_regions()}, 3, "cpu")
    masters = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    replicate_to_slots(pools, weights, [masters], plan)
    await_slots(pools, weights, plan)
    assert [p.region("w.0").tolist() for p in pools] == [[[0, 0, 0]], [[1, 2, 3]], [[1, 2, 3]]]
    own = torch.tensor([[0.1, 0.2, 0.3], [1, 1, 1], [2, 2, 2]])
    for pool, value in zip(pools, (float("nan"), 10, 20), strict=True):
        pool.region("g.0").fill_(value)
    announce_gradients(pools, grads)
    (total,) = reduce_from_slots(pools, grads, [own.clone()], plan)
    assert torch.equal(total[0], (own[0] + 10) + 20) and torch.equal(total[1:], own[1:])


@triton.jit
def _copy_far(source_p, bases_p, slots_p, target_offset, first, last, ELEMENTS: tl.constexpr, BYTES: tl.constexpr):
    """`copy_tiles` of the tiles first..last-1 alone."""
    copy_tiles(source_p.to(tl.int64), bases_p, slots_p, 1, first, last, BYTES, tl.int8, ELEMENTS, 4096, 1, 1)


def far() -> None:
    """Elements beyond 2^31, by an array of 2^31 + 5000 bytes that is reserved but touched at its end only."""
    size = 2**31 + 5000
    source, target = (torch.from_file(f"/dev/shm/ultraep-far-{i}-{os.getpid()}", True, size, dtype=torch.int8) for i in (0, 1))
    for i in (0, 1):
        os.unlink(f"/dev/shm/ultraep-far-{i}-{os.getpid()}")
    source[-8192:] = torch.randint(-128, 128, (8192,), dtype=torch.int8)
    tiles = -(-size // 4096)
    bases, slots = torch.tensor([target.data_ptr()]), torch.zeros(1, dtype=torch.int32)
    _copy_far[(1,)](source, bases, slots, 0, tiles - 2, tiles, size, 0)
    cut = (tiles - 2) * 4096
    assert torch.equal(source[cut:], target[cut:]) and cut > 2**31 - 8192 and not target[cut - 4096 : cut].any()


def check_edge(device: str) -> None:
    """An expert whose tensor has more than 2^31 elements, a rank whose slots do, and gradients alike."""
    parts = (Part((2**31 + 4097,), torch.int8), Part((1 << 29,), torch.bfloat16))
    bundle = Bundle("b", 2, 1, 3, parts)
    plan = torch.tensor([[1, -1, -1], [-1, -1, 0]], dtype=torch.int32)
    pools = open_virtual_pools(bundle.replicate_regions(), 2, device)
    masters = [torch.empty(2, *p.shape, dtype=p.dtype, device=device) for p in parts]
    for t in masters:
        t.view(2, -1).view(torch.int8).random_(-128, 128)
    replicate_to_slots(pools, bundle, masters, plan.to(device))
    await_slots(pools, bundle, plan.to(device))
    pools[0].check(synchronize=True)
    for i, t in enumerate(masters):
        assert torch.equal(pools[0].region(f"b.{i}")[0].view(torch.int8), t[1].view(torch.int8))
        assert torch.equal(pools[1].region(f"b.{i}")[2].view(torch.int8), t[0].view(torch.int8))
        assert not pools[1].region(f"b.{i}")[1].view(torch.int8).any() and not pools[0].region(f"b.{i}")[2].view(torch.int8).any()
    for p in pools:
        p.close()
    del masters
    torch.cuda.empty_cache()
    grads = Bundle("g", 2, 1, 2, (Part((2**31 + 2049,), torch.bfloat16),))
    pools = open_virtual_pools(grads.reduce_regions(), 2, device)
    pools[1].region("g.0")[1].normal_()
    pools[1].region("g.0")[0].fill_(float("nan"))
    own = torch.randn(2, 2**31 + 2049, device=device, dtype=torch.bfloat16)
    expected = [(own[0, a : a + 10**6].float() + pools[1].region("g.0")[1, a : a + 10**6]).bfloat16() for a in (0, 2**31 - 10**6 // 2)]
    plan = torch.tensor([[-1, -1], [-1, 0]], dtype=torch.int32, device=device)
    announce_gradients(pools, grads)
    reduce_from_slots(pools, grads, [own], plan)
    pools[0].check(synchronize=True)
    assert all(torch.equal(own[0, a : a + e.numel()], e) for a, e in zip((0, 2**31 - 10**6 // 2), expected, strict=True))
    assert torch.isfinite(own).all()


def check_graph() -> None:
    """A captured exchange follows the plan, the weights and the gradients of the moment, and the epochs go on."""
    bundle = Bundle("b", 9, 2, 1, cases.WEIGHTS, chunk_bytes=1)
    pools = open_virtual_pools(bundle.replicate_regions(), 9, "cuda", deadline_s=5)
    masters = cases.filled(bundle.parts, 18, 0, "cuda")
    plans = [cases.random_plan(9, 2, 1, seed, hot=0.8) for seed in range(4)]
    plan = plans[0].cuda()

    def exchange() -> None:
        replicate_to_slots(pools, bundle, masters, plan, mode="relay")
        await_slots(pools, bundle, plan)
        free_slots(pools, bundle)

    exchange()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange()
    for seed, table in enumerate(plans):
        for t, new in zip(masters, cases.filled(bundle.parts, 18, 50 + seed, "cuda"), strict=True):
            t.copy_(new)
        plan.copy_(table)
        poison(pools, bundle)
        graph.replay()
        for pool, row in zip(pools, table.tolist(), strict=True):
            pool.check(synchronize=True)
            for i, t in enumerate(masters):
                assert row[0] < 0 or cases.same_bytes(pool.region(bundle.region_of(i))[0], t[row[0]])


def device_steps(ranks: str, steps: str) -> None:
    """Randomised steps with random delays over processes that share a GPU."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    start = time.monotonic()
    run_ranks(int(ranks), steps_on, "cuda", int(steps))
    print(f"{steps} steps of {ranks} processes right in {time.monotonic() - start:.0f} s")


def device_small() -> None:
    """Small shapes on a GPU, for compute-sanitizer."""
    for mode in ("direct", "relay"):
        bundle = Bundle("b", 5, 2, 2, cases.WEIGHTS, chunk_bytes=1)
        check_virtual(bundle, cases.random_plan(5, 2, 2, 3, hot=0.7), mode, 0, "cuda", programs=20)
    grads = Bundle("g", 5, 2, 2, cases.GRADS)
    check_reduce(grads, [torch.float32] * len(cases.GRADS), cases.random_plan(5, 2, 2, 3, hot=0.7), 1, "cuda", programs=20)
    print("small shapes right")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
