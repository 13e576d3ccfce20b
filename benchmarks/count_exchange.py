"""From the router's choice to a plan on every rank, over processes: counting, exchanging counts, planning.

    torchrun --nproc-per-node 8 -m benchmarks.count_exchange [--experts 256] [--json RESULT.json]     # NCCL, CUDA graphs
    torchrun --nproc-per-node 2 -m benchmarks.count_exchange --device cpu                           # gloo, for the logic

Every rank counts its own ids (8192 tokens, top-8, fresh for every rank), all gather the counts, and every rank plans
with its own shares. First checked: the gathered counts are those of all ids, and the plan is the one of the planner in
plain Python on every rank. Then timed on rank 0: each part and the whole, chained in one CUDA graph, so that
launching does not count; the median of the replays over the length of the chain, and the quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.planner import make_plan

CHAIN, REPLAYS = 16, 25


def microseconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Time of one call among CHAIN in a row, once for every replay; all ranks take part."""

    def chained() -> None:
        for _ in range(CHAIN):
            work()

    work()
    replay: Callable[[], object] = chained
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chained()
        replay = graph.replay
    samples = []
    for _ in range(REPLAYS + 4):
        dist.barrier()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / CHAIN)
        else:
            begin = time.perf_counter()
            replay()
            samples.append((time.perf_counter() - begin) * 1e6 / CHAIN)
    return samples[4:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks, experts = dist.get_rank(), dist.get_world_size(), args.experts
    device = torch.device("cuda", rank % max(torch.cuda.device_count(), 1)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    heat_E = torch.rand(experts, generator=torch.Generator().manual_seed(0)).pow(4) + 1e-3
    ids = torch.multinomial(heat_E.expand(args.tokens, -1), 8, generator=torch.Generator().manual_seed(rank + 1))
    ids = ids.to(device)
    counts_RE = torch.full((ranks, experts), -1, dtype=torch.int32, device=device)

    def count() -> Tensor:
        if not on_gpu:
            return torch.bincount(ids.flatten(), minlength=experts).int()
        from ultraep_compile.codegen.count_kernels import expert_counts

        return expert_counts(ids, experts)

    def plan() -> Any:
        if not on_gpu:
            return make_plan(counts_RE, args.slots, check=False)
        from ultraep_compile.codegen.planner_kernels import plan_on_device

        return plan_on_device(counts_RE, [args.slots] * ranks, rank, ranks)

    mine = count()

    def exchange() -> None:
        dist.all_gather_into_tensor(counts_RE.view(-1), mine)

    def whole() -> None:
        dist.all_gather_into_tensor(counts_RE.view(-1), count())
        plan()

    whole()
    gathered: list = [None] * ranks
    dist.all_gather_object(gathered, ids.cpu())
    right = torch.stack([torch.bincount(one.flatten(), minlength=experts) for one in gathered])
    assert torch.equal(counts_RE.cpu().long(), right), "gathered counts are not those of all ids"
    expected = make_plan(right, args.slots)
    made = plan()
    shares = made.shares.cpu() if on_gpu else made.shares_RP[rank]
    assert torch.equal(made.slot_expert_RS.cpu(), expected.slot_expert_RS), "another placement than in plain Python"
    assert torch.equal(shares, expected.shares_RP[rank]), "other shares than in plain Python"

    parts = {"count": count, "exchange": exchange, "plan": plan, "whole": whole}
    times = {name: statistics.quantiles(microseconds(work, device), n=4) for name, work in parts.items()}
    if rank == 0:
        name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
        print(f"{ranks} ranks x {experts} experts, {args.tokens} x 8 ids a rank, {name}, torch {torch.__version__}")
        for part, (low, middle, high) in times.items():
            print(f"  {part:9} {middle:8.1f} us, quartiles {low:.1f} {high:.1f}")
        if args.json:
            setting = {"ranks": ranks, "experts": experts, "tokens": args.tokens, "slots": args.slots, "device": name}
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            record = {"setting": setting, "versions": versions, "chain": CHAIN, "replays": REPLAYS, "quartiles_us": times}
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
