"""The data plane in Triton's interpreter: TRITON_INTERPRET=1 python -m tests.data_plane.interpreted routes"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from tests.data_plane import cases
from tests.multirank import run_ranks
from ultraep_compile.codegen.bundle import Bundle, Part, route_layout, sender_offset
from ultraep_compile.codegen.replicate import await_slots, free_slots, replicate_reference, replicate_to_slots
from ultraep_compile.codegen.routes import launch_routes, routes_reference
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
    for seed, (ranks, masters, slots) in enumerate(((2, 1, 1), (5, 3, 2), (9, 1, 1), (16, 2, 2), (21, 4, 2))):
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
        free_slots(pools, bundle)
        replicate_to_slots(pools, bundle, masters, now.to(device), mode=mode, **launch)
        await_slots(pools, bundle, now.to(device))
        replicate_reference(wanted, bundle, masters, now)
        for p, q in zip(pools, wanted, strict=True):
            p.check(synchronize=True)
            for i in range(len(bundle.parts)):
                assert cases.same_bytes(p.region(bundle.region_of(i)), q.region(bundle.region_of(i))), (mode, step, p.rank, i)


def virtual(mode: str) -> None:
    for seed, (ranks, masters, slots) in enumerate(((2, 2, 1), (5, 1, 2), (9, 1, 1))):
        bundle = Bundle("b", ranks, masters, slots, cases.WEIGHTS, chunk_bytes=1)
        plan = cases.random_plan(ranks, masters, slots, seed + 3, hot=0.7)
        check_virtual(bundle, plan, mode, seed, programs=3 * ranks)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
