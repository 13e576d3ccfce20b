"""The planner's kernels on a GPU: first exact against the planner in plain Python, then timed.

    python -m benchmarks.planner_gpu [LOADS.npz] [--out RESULTS.json] [--only exact|rows|scaling|counts|frontier]
    python -m benchmarks.planner_gpu --draw RESULTS.json            # its frontier as a picture beside it; needs no GPU

LOADS.npz holds int matrices [ranks, experts] (default: the seeded ones of `loads()`). Times are of 16 plans
chained in one CUDA graph, so that launching the graph does not count; median of 25 replays, over 16, with the
counts in the L2 cache as they are after their exchange. `single` is one plan in a graph of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import triton

from ultraep_compile.codegen.count_kernels import expert_counts
from ultraep_compile.codegen.planner_kernels import plan_on_device, planning_stages
from ultraep_compile.planner import imbalance, loads_after, make_plan, quotas, replica_count

CHAIN, REPLAYS = 16, 25
SHAPES = [(8, 64), (8, 128), (16, 128), (32, 256), (64, 256), (64, 512), (64, 1024), (128, 256), (128, 512), (128, 1024)]


def loads(ranks: int, experts: int, sigma: float, seed: int = 0, tokens: int = 65536) -> np.ndarray:
    """int32 [R, E]: log-normal heat of experts, as many routed tokens on every rank."""
    rng = np.random.default_rng([seed, ranks, experts])
    heat_E = rng.lognormal(0, sigma, experts)
    return np.stack([rng.multinomial(tokens, heat_E / heat_E.sum()) for _ in range(ranks)]).astype(np.int32)


def captured(function: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            function()
    return graph


def microseconds(function: Callable[[], object], chain: int = CHAIN) -> float:
    """Median time of one call among `chain` in a row."""
    graph, samples = captured(function, chain), []
    for _ in range(REPLAYS + 4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / chain)
    return statistics.median(samples[4:])


def check_exact(
    counts: np.ndarray, slots: int, tolerance: float = 0.01, copy_tokens: int | None = None
) -> dict[str, float]:
    """Raises unless the kernels' plan is the plan in plain Python; its figures."""
    counts_RE = torch.from_numpy(counts)
    planner = "quota" if copy_tokens is None else f"quota:{copy_tokens}"
    right = make_plan(counts_RE, slots, planner, tolerance=tolerance)
    ranks = counts.shape[0]
    for rank in (None, ranks // 3):
        made = plan_on_device(counts_RE.cuda(), [slots] * ranks, rank, ranks, round(tolerance * 10000), copy_tokens)
        assert torch.equal(made.slot_expert_RS.cpu(), right.slot_expert_RS)
        assert torch.equal(made.quota_P.cpu(), quotas(right))
        assert torch.equal(made.shares.cpu(), right.shares_RP if rank is None else right.shares_RP[rank])
    return {"after": imbalance(loads_after(right)), "copies": replica_count(right)}


def plan_times(
    counts: np.ndarray, slots: int, stages: bool, tolerance: float = 0.01, copy_tokens: int | None = None
) -> dict[str, float]:
    """Microseconds of a plan with one rank's shares, and of its stages by themselves."""
    ranks = counts.shape[0]
    points = round(tolerance * 10000)
    arguments = (torch.from_numpy(counts).cuda(), [slots] * ranks, ranks // 3, ranks, points, copy_tokens)
    out = {"plan": microseconds(lambda: plan_on_device(*arguments))}
    if stages:
        _, launches = planning_stages(*arguments)
        for launch in launches.values():
            launch()
        out["single"] = microseconds(lambda: plan_on_device(*arguments), 1)
        out |= {name: microseconds(launch) for name, launch in launches.items()}
    return out


def warm_up(wanted: Iterable[tuple[tuple[int, int], int]]) -> None:
    """Compile all that will be needed into Triton's cache, several processes at a time; the slowest ones first."""
    jobs = sorted((f"{ranks},{experts},{s}" for (ranks, experts), s in wanted), key=_masters, reverse=True)

    def job(at: str) -> None:
        subprocess.run([sys.executable, "-m", "benchmarks.planner_gpu", "--compile", at], check=True)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        list(pool.map(job, jobs))


def _masters(job: str) -> float:
    ranks, experts, _ = map(int, job.split(","))
    return experts / ranks


def compile_for(ranks: int, experts: int, slots: int) -> None:
    counts_RE = torch.from_numpy(loads(ranks, experts, 1.0)).cuda()
    for rank in (None, ranks // 3):
        plan_on_device(counts_RE, [slots] * ranks, rank, ranks)
    if (ranks, experts) == (64, 256):
        plan_on_device(counts_RE, [slots] * ranks, 1, ranks, copy_tokens=1000)
    torch.cuda.synchronize()


def exact(matrices: dict[str, np.ndarray]) -> dict:
    rows = {f"{name}/{slots}": check_exact(counts, slots) for name, counts in matrices.items() for slots in (1, 2)}
    print(f"{len(rows)} plans equal the plans in plain Python, shares of one rank and of all")
    return rows


def by_row(matrices: dict[str, np.ndarray]) -> dict:
    rows: dict[str, dict] = {}
    for name, counts in matrices.items():
        for slots in (1, 2):
            shape = f"{counts.shape[0]} x {counts.shape[1]}"
            first = not any(row["shape"] == shape and row["slots"] == slots for row in rows.values())
            rows[f"{name}/{slots}"] = {"shape": shape, "slots": slots, **plan_times(counts, slots, first)}
            if first:
                print(f"  {shape}, {name}/{slots}:", {k: round(v, 2) for k, v in rows[f"{name}/{slots}"].items() if k not in ("shape", "slots")})
    for shape in dict.fromkeys(row["shape"] for row in rows.values()):
        times = sorted(row["plan"] for row in rows.values() if row["shape"] == shape)
        print(f"  {shape:>9}: median {statistics.median(times):5.1f} us, worst {times[-1]:5.1f}, {len(times)} plans")
    return rows


def scaling() -> dict:
    table = {}
    for ranks, experts in SHAPES:
        times = []
        for sigma in (0.5, 1.0, 1.5):
            counts = loads(ranks, experts, sigma)
            check_exact(counts, 2)
            times.append(plan_times(counts, 2, False)["plan"])
        table[f"{ranks} x {experts}"] = times
        print(f"  {ranks:3} x {experts:4}, log-normal loads: " + ", ".join(f"{t:.1f}" for t in times) + " us")
    return table


def counting() -> dict:
    out = {}
    for experts in (128, 256):
        ids = torch.stack([torch.randperm(experts, device="cuda")[:8] for _ in range(8192)])
        assert torch.equal(expert_counts(ids, experts).long(), torch.bincount(ids.flatten(), minlength=experts))
        out[f"{experts} experts"] = microseconds(lambda ids=ids, experts=experts: expert_counts(ids, experts))
        out[f"{experts} experts, torch.bincount"] = microseconds(
            lambda ids=ids, experts=experts: torch.zeros(experts, dtype=torch.int32, device="cuda").index_add_(
                0, ids.flatten(), torch.ones(1, dtype=torch.int32, device="cuda").expand(ids.numel())
            )
        )
    print("  counts of 8192 x 8 ids:", {k: round(v, 2) for k, v in out.items()})
    return out


def frontier(matrices: dict[str, np.ndarray]) -> list[dict]:
    """Balance, copies and time against the tolerance and against the price of a copy, over the matrices of 64 x 256."""
    chosen = {n: c for n, c in matrices.items() if c.shape == (64, 256)}
    points = []
    settings = [(t, None) for t in (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)]
    for tolerance, price in [*settings, *((0.01, n) for n in (0, 250, 500, 1000, 2000, 4000, 8000))]:
        rows = [
            (check_exact(c, s, tolerance, price), plan_times(c, s, False, tolerance, price)["plan"])
            for c in chosen.values()
            for s in (1, 2)
        ]
        points.append(
            {
                "tolerance": tolerance,
                "copy_tokens": price,
                "after": statistics.mean(q["after"] for q, _ in rows),
                "copies": statistics.mean(q["copies"] for q, _ in rows),
                "median_us": statistics.median(t for _, t in rows),
                "worst_us": max(t for _, t in rows),
            }
        )
        print("  " + ", ".join(f"{k} {v:.4g}" for k, v in points[-1].items() if v is not None))
    return points


def draw(record: Path) -> None:
    """Copies against balance, with the time of a plan at every point."""
    import matplotlib.pyplot as plt

    found = json.loads(record.read_text())
    figure, (copies, times) = plt.subplots(1, 2, figsize=(12, 4.6))
    for priced, colour, label in ((False, "#1f77b4", "tolerance"), (True, "#d62728", "tokens that a copy costs")):
        points = [p for p in found["frontier"] if (p["copy_tokens"] is not None) == priced]
        x = [p["after"] for p in points]
        names = [f"{p['copy_tokens']}" if priced else f"{p['tolerance']:.2%}".rstrip("0%").rstrip(".") + "%" for p in points]
        copies.plot(x, [p["copies"] for p in points], "o-", color=colour, label=f"by {label}")
        times.plot(x, [p["median_us"] for p in points], "o-", color=colour, label="median")
        times.plot(x, [p["worst_us"] for p in points], "^:", color=colour, label="worst")
        for axis, key in ((copies, "copies"), (times, "median_us")):
            for name, at, point in zip(names, x, points, strict=True):
                axis.annotate(name, (at, point[key]), (4, 5), textcoords="offset points", fontsize=8, color=colour)
    copies.set_ylabel("copies, mean")
    times.set_ylabel("microseconds from counts to plan")
    for axis in (copies, times):
        axis.set_xlabel("largest load over the mean, mean of the plans")
        axis.set_ylim(bottom=0)
        axis.grid(color="#dcdcd8", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(f"64 ranks, 256 experts, 1 and 2 slots, real loads: {found['device']}", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(record.with_name("frontier.png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=["exact", "rows", "counts", "frontier", "scaling"])
    parser.add_argument("--draw", type=Path, metavar="RESULTS.json")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        return compile_for(*map(int, args.compile.split(",")))
    if args.draw:
        return draw(args.draw)
    if args.loads:
        with np.load(args.loads, allow_pickle=False) as archive:
            matrices = {name: archive[name].astype(np.int32) for name in archive.files}
    else:
        matrices = {f"lognormal{sigma}_{r}x{e}": loads(r, e, sigma) for r, e in SHAPES[:6] for sigma in (0.5, 1.0, 1.5)}

    shapes = list(dict.fromkeys(c.shape for c in matrices.values()))
    jobs = [(shape, s) for shape in shapes for s in (1, 2)]
    jobs += [(shape, 2) for shape in SHAPES if "scaling" in args.only]
    warm_up(dict.fromkeys(jobs))
    record: dict = {
        "command": f"python -m benchmarks.planner_gpu {args.loads.name if args.loads else ''}".strip(),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "method": f"{CHAIN} plans chained in a CUDA graph, median of {REPLAYS} replays, microseconds a plan",
    }
    print(record["device"], record["versions"])
    if "exact" in args.only:
        record["exact"] = exact(matrices)
    if "rows" in args.only:
        record["rows"] = by_row(matrices)
    if "counts" in args.only:
        record["counts"] = counting()
    if "frontier" in args.only:
        record["frontier"] = frontier(matrices)
    if "scaling" in args.only:
        record["scaling"] = scaling()
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
