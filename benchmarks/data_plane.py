"""Replicate and gradient reduce: first exact, then timed against the device's own copies.

    python -m benchmarks.data_plane --json F [--quick] [--plot F.png]         # one GPU, virtual ranks
    torchrun --nproc-per-node N -m benchmarks.data_plane --json F             # N GPUs over torch symmetric memory

On one GPU, bandwidth counts bytes read plus bytes written: an expert with n copies is read once and written n times; a
gradient with n copies is read n + 1 times and written once. `stream` is the streaming kernel alone, `exchange` the whole
call with its waits, lists and signals. Times are medians over replays of a CUDA graph of several calls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.codegen.handshake import hosted_pools
from ultraep_compile.codegen.reduce import (
    announce_gradients,
    await_read,
    launch_pull,
    reduce_from_slots,
    reduce_reference,
)
from ultraep_compile.codegen.replicate import await_slots, free_slots, launch_push, replicate_to_slots
from ultraep_compile.codegen.routes import launch_routes
from ultraep_compile.symmetric import open_virtual_pools

BIG = (Part((4096, 3072), torch.bfloat16), Part((1536, 4096), torch.bfloat16))  # 37.7 MB
SMALL = (Part((512, 683), torch.bfloat16), Part((1024, 173), torch.bfloat16))  # 1.05 MB
REPEATS, CHAIN = 11, 3
CEILINGS = {"of_copy": "copy", "of_kernel": "copy by an elementwise kernel"}


def environment(ranks: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ranks": ranks,
        "repetitions": REPEATS,
        "chain": CHAIN if ranks == 1 else 1,
    }


def milliseconds(function: Callable[[], object], chain: int = CHAIN) -> tuple[float, float, float]:
    """Median, least and greatest time of one call among `chain` in a row, in a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph, samples = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(chain):
            function()
    for _ in range(REPEATS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / chain)
    samples = samples[2:]
    return statistics.median(samples), min(samples), max(samples)


def row(what: str, moved: int, times: tuple[float, float, float], **facts: Any) -> dict[str, Any]:
    median, least, most = times
    return {
        "what": what,
        **facts,
        "GB": moved / 1e9,
        "ms": median,
        "ms_min": least,
        "ms_max": most,
        "GB/s": moved / median / 1e6,
    }


def copy_ceilings() -> list[dict[str, Any]]:
    """The device's own copies, bytes read plus written: torch's copy (the driver's) and an elementwise kernel of torch."""
    rows = []
    for gigabytes in (0.5, 1.0, 2.0):
        source = torch.randint(0, 1 << 30, (int(gigabytes * 1e9 / 8),), dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        rows.append(row("copy", 8 * source.numel(), milliseconds(lambda a=source, b=target: b.copy_(a))))
        kernel = milliseconds(lambda a=source, b=target: torch.bitwise_not(a, out=b))
        rows.append(row("copy by an elementwise kernel", 8 * source.numel(), kernel))
    return rows


def ring_plan(ranks: int, hot: int, fan: int) -> Tensor:
    """int32 [R, hot * fan]: every rank's `hot` experts go to its next `fan` ranks; all ranks send and receive alike."""
    plan = torch.full((ranks, hot * fan), -1, dtype=torch.int32)
    for home in range(ranks):
        for local in range(hot):
            for step in range(fan):
                plan[(home + 1 + step) % ranks, local * fan + step] = home * hot + local
    return plan


def random_masters(parts: tuple[Part, ...], experts: int) -> list[Tensor]:
    return [
        torch.empty(experts, p.nbytes // 2, dtype=torch.int16, device="cuda")
        .random_()
        .view(p.dtype)
        .view(experts, *p.shape)
        for p in parts
    ]


def replicate_rows(
    parts: tuple[Part, ...], ranks: int, fan: int, least: float, sweep: list[tuple[int, int]]
) -> list[dict]:
    size = sum(p.nbytes for p in parts)
    hot = max(1, -(-int(least) // (ranks * (1 + fan) * size)))
    bundle = Bundle("w", ranks, hot, hot * fan, parts)
    plan = ring_plan(ranks, hot, fan)
    pools = open_virtual_pools(bundle.replicate_regions(), ranks, "cuda", deadline_s=20)
    masters, table = random_masters(parts, ranks * hot), plan.cuda()
    for i in range(len(parts)):
        for p in pools:
            p.region(bundle.region_of(i)).view(torch.uint8).fill_(0xFF)

    def exchange(programs: int, warps: int) -> None:
        replicate_to_slots(pools, bundle, masters, table, mode="direct", programs=programs, warps=warps)
        await_slots(pools, bundle, table)
        free_slots(pools, bundle)

    exchange(*sweep[0])
    pools[0].check(synchronize=True)
    for r, line in enumerate(plan.tolist()):
        index = torch.tensor(line, device="cuda")
        for i, t in enumerate(masters):  # as integers: random bits may be NaN
            assert torch.equal(pools[r].region(bundle.region_of(i)).view(torch.int16), t.view(torch.int16)[index])
    moved = ranks * hot * (1 + fan) * size
    facts = {"expert_MB": size / 1e6, "ranks": ranks, "fan_out": fan, "copies": plan.numel()}
    rows, hosted = [], hosted_pools(pools)
    for programs, warps in sweep:
        more = {**facts, "programs": programs, "warps": warps}
        stream = milliseconds(lambda p=programs, w=warps: launch_push(hosted, bundle, masters, p, w))
        rows.append(row("replicate stream", moved, stream, **more))
    for p in pools:
        p.region("w.arrived").zero_()  # the streams alone have counted chunks
    best = min(rows, key=lambda r: r["ms"])
    times = milliseconds(lambda: exchange(best["programs"], best["warps"]))
    rows.append(row("replicate exchange", moved, times, **facts, programs=best["programs"], warps=best["warps"]))
    for p in pools:
        p.check(synchronize=True)
        p.close()
    return rows


def reduce_rows(
    parts: tuple[Part, ...], ranks: int, fan: int, least: float, sweep: list[tuple[int, int]]
) -> list[dict]:
    wire = sum(p.nbytes for p in parts)
    own = sum(4 * p.nbytes // p.dtype.itemsize for p in parts)
    hot = max(1, -(-int(least) // (ranks * (2 * own + fan * wire))))
    bundle = Bundle("g", ranks, hot, hot * fan, parts)
    plan = ring_plan(ranks, hot, fan)
    pools = open_virtual_pools(bundle.reduce_regions(), ranks, "cuda", deadline_s=20)
    table, hosted = plan.cuda(), hosted_pools(pools)
    for p in pools:
        for i in range(len(parts)):
            p.region(bundle.region_of(i)).normal_()
    start = [torch.randn(ranks * hot, *p.shape, device="cuda") for p in parts]
    grads = [g.clone() for g in start]

    def exchange(programs: int, warps: int) -> None:
        await_read(pools, bundle)
        announce_gradients(pools, bundle)
        reduce_from_slots(pools, bundle, grads, table, programs=programs, warps=warps)

    expected = reduce_reference(pools, bundle, start, plan)
    for programs, warps in sweep:  # the same bits whatever the launch
        for g, s in zip(grads, start, strict=True):
            g.copy_(s)
        exchange(programs, warps)
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(grads, expected, strict=True))
    moved = ranks * hot * (2 * own + fan * wire)
    facts = {"wire": str(parts[0].dtype), "wire_MB": wire / 1e6, "ranks": ranks, "fan_out": fan, "copies": plan.numel()}
    rows = []
    for programs, warps in sweep:
        stream = milliseconds(lambda p=programs, w=warps: launch_pull(hosted, bundle, grads, p, w))
        rows.append(row("reduce stream", moved, stream, **facts, programs=programs, warps=warps))
    best = min(rows, key=lambda r: r["ms"])
    times = milliseconds(lambda: exchange(best["programs"], best["warps"]))
    rows.append(row("reduce exchange", moved, times, **facts, programs=best["programs"], warps=best["warps"]))
    for p in pools:
        p.check(synchronize=True)
        p.close()
    return rows


def routes_rows() -> list[dict[str, Any]]:
    """The lists alone, with and without the search for trees: 64 ranks, 256 experts, 2 slots, copies 9, 6, 5 and 18 single ones."""
    ranks, masters, slots = 64, 4, 2
    bundle = Bundle("w", ranks, masters, slots, SMALL)
    plan = torch.full((ranks, slots), -1, dtype=torch.int32)
    for copy in range(38):  # 9, 6, 5, then single copies
        expert = 0 if copy < 9 else 4 if copy < 15 else 8 if copy < 20 else 4 * (copy - 15)
        plan[63 - copy, 0] = expert
    pools = open_virtual_pools(bundle.replicate_regions(), ranks, "cuda")
    offsets = (pools[0].offset("w.route"), pools[0].offset("w.targets"))
    rows, table = [], plan.cuda()
    for mode in ("direct", "adaptive"):
        times = milliseconds(lambda m=mode: launch_routes(bundle, table, pools[0].bases, 0, 1, offsets, m), chain=20)
        rows.append(row("lists alone", 0, times, ranks=ranks, mode=mode))
    return rows


def beside_product(programs_list: list[int], warps: int = 4) -> list[dict[str, Any]]:
    """An 8192^3 bf16 product while experts stream on another stream: what either loses."""
    ranks, fan, size = 8, 3, sum(p.nbytes for p in BIG)
    bundle = Bundle("w", ranks, 1, fan, BIG)
    pools = open_virtual_pools(bundle.replicate_regions(), ranks, "cuda", deadline_s=20)
    masters, table = random_masters(BIG, ranks), ring_plan(ranks, 1, fan).cuda()
    replicate_to_slots(pools, bundle, masters, table, mode="direct")
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out, side, hosted = torch.empty_like(x), torch.cuda.Stream(), hosted_pools(pools)

    def both(programs: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launch_push(hosted, bundle, masters, programs, warps)
        torch.mm(x, x, out=out)
        torch.cuda.current_stream().wait_stream(side)

    alone = milliseconds(lambda: torch.mm(x, x, out=out))[0]
    rows = []
    for programs in programs_list:
        stream = milliseconds(lambda p=programs: launch_push(hosted, bundle, masters, p, warps))[0]
        together = milliseconds(lambda p=programs: both(p))
        hidden = (alone + stream - together[0]) / min(alone, stream)
        facts = {"programs": programs, "warps": warps, "product_ms": alone, "stream_ms": stream, "hidden_share": hidden}
        rows.append(row("beside product", ranks * (1 + fan) * size, together, **facts))
    return rows


def virtual_tables(quick: bool) -> list[dict[str, Any]]:
    rows = copy_ceilings()
    wide = [(p, w) for p in (132, 264, 528, 792) for w in (4, 8)]
    rows += replicate_rows(BIG, 8, 1, 2e9, wide)
    rows += replicate_rows(SMALL, 8, 4, 2e9, wide)
    gradients = tuple(Part(p.shape, torch.float32) for p in BIG)
    rows += reduce_rows(gradients, 8, 2, 2e9, wide)
    if not quick:
        few = [(8, 8), (16, 8), (32, 8), (66, 8), (132, 4), (264, 4)]
        rows += replicate_rows(BIG, 8, 3, 2e9, few)
        rows += reduce_rows(gradients, 8, 3, 2e9, few)
        launch = [(264, 4), (528, 4)]
        for parts in (BIG, SMALL):
            for ranks, fans in ((4, (1, 2, 3)), (16, (1, 2, 4, 8)), (64, (1, 2, 4, 8))):
                for fan in fans:
                    rows += replicate_rows(parts, ranks, fan, 1e9, launch)
        for ranks, fan in ((4, 1), (8, 4), (16, 8), (64, 2)):
            rows += reduce_rows(gradients, ranks, fan, 1e9, launch)
        rows += reduce_rows(tuple(Part(p.shape, torch.bfloat16) for p in BIG), 8, 4, 1e9, launch)
        rows += routes_rows()
        rows += beside_product([8, 16, 32, 66, 132, 264])
    rows += copy_ceilings()  # again, after all else
    return rows


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bandwidth as a share of the best copy by torch, and of the best elementwise kernel, of the same run."""
    best = {name: max(r["GB/s"] for r in rows if r["what"] == what) for name, what in CEILINGS.items()}
    return [{**r, **{name: r["GB/s"] / value for name, value in best.items()}} for r in rows]


def table(rows: list[dict[str, Any]]) -> str:
    columns = [
        "what",
        "expert_MB",
        "wire_MB",
        "ranks",
        "fan_out",
        "programs",
        "warps",
        "hidden_share",
        "GB",
        "ms",
        "GB/s",
        "of_copy",
        "of_kernel",
        "of_push",
        "of_pull",
    ]
    used = [c for c in columns if any(c in r for r in rows)]
    lines = ["| " + " | ".join(used) + " |", "| " + " | ".join("---" for _ in used) + " |"]
    for r in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (r.get(c, "") for c in used)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bandwidth against the number of programs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for what in ("replicate stream", "reduce stream"):
        mine = [r for r in rows if r["what"] == what and r["fan_out"] == 3 and r["ranks"] == 8]
        axes.plot([r["programs"] for r in mine], [r["GB/s"] for r in mine], marker="o", label=f"{what}, 3 copies")
    for what, style in zip(CEILINGS.values(), ("--", ":"), strict=True):
        axes.axhline(max(r["GB/s"] for r in rows if r["what"] == what), color="grey", ls=style, label=f"torch: {what}")
    axes.set(xscale="log", xlabel="programs", ylabel="GB/s read + written", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--from-json", type=Path, help="measure nothing: table and plot of a file written before")
    parser.add_argument("--plot", type=Path, help="file for a picture of bandwidth against programs")
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    arguments = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.from_json:
        rows = json.loads(arguments.from_json.read_text())["rows"]
    elif world > 1:
        from benchmarks.data_plane_ranks import rank_tables

        rows = rank_tables(BIG, SMALL)
    else:
        rows = virtual_tables(arguments.quick)
    if int(os.environ.get("RANK", "0")):
        return
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**environment(world), "rows": rows}, indent=1))
    if all(any(r["what"] == what for r in rows) for what in CEILINGS.values()):
        rows = with_shares(rows)
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
