"""The planner's kernels on a GPU: first exact against the planner in plain Python, then timed. Each part compiles what it
needs, several shapes at a time; what it found is printed, and written to RESULTS.json at its end.

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
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from ultraep_compile.codegen.count_kernels import expert_counts
from ultraep_compile.codegen.planner_kernels import plan_on_device, planning_stages
from ultraep_compile.planner import imbalance, loads_after, make_plan, quotas, replica_count
from ultraep_compile.planner.make import kernels_fit
from ultraep_compile.planner.topology import make_topology

CHAIN, REPLAYS = 16, 25
PARTS = ["exact", "rows", "counts", "frontier", "scaling"]
COMPILE_LIMIT = 60  # seconds for one shape
SHAPES = [(8, 64), (8, 128), (16, 128), (32, 256), (64, 256), (64, 512), (64, 1024), (128, 256), (128, 512), (128, 1024)]
MANY_EXPERTS = [(2, 128), (4, 128), (2, 256), (8, 256), (8, 512), (8, 1024), (32, 1024)]  # of a rank


class Job(NamedTuple):
    """Kernels to be compiled."""

    ranks: int
    experts: int
    slots: int
    timed: bool = False


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


def compiled(wanted: Iterable[Job]) -> dict[Job, float | None]:
    """Compile into Triton's cache, several processes at a time: seconds, None if too many."""
    jobs = list(dict.fromkeys(wanted))

    def run(job: Job) -> float | None:
        command = [sys.executable, "-m", "benchmarks.planner_gpu", "--compile", *map(str, map(int, job))]
        try:
            done = subprocess.run(command, check=True, timeout=COMPILE_LIMIT, stdout=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            return None
        return float(done.stdout)

    seconds: dict[Job, float | None] = {}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        for job, taken in zip(jobs, pool.map(run, jobs), strict=True):
            seconds[job] = taken
            what = f"in {taken:.1f} s" if taken is not None else f"not in {COMPILE_LIMIT} s"
            price = ", with a price" if job.timed else ""
            print(f"  compiled {job.ranks} x {job.experts}, {job.slots} slots{price}: {what}", flush=True)
    return seconds


def compile_here(job: Job) -> float:
    """Seconds until the kernels have run once, for the shares of one rank and of all."""
    counts_RE = torch.from_numpy(loads(job.ranks, job.experts, 1.0)).cuda()
    start = time.perf_counter()
    for rank in (None, job.ranks // 3):
        plan_on_device(counts_RE, [job.slots] * job.ranks, rank, job.ranks, copy_tokens=1000 if job.timed else None)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def on_host(counts_RE: torch.Tensor, slots: int) -> float:
    """Median microseconds of a plan that the kernels do not make, counts and plan on the device."""
    samples = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        make_plan(counts_RE, slots, check=False)
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


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


def scaling(seconds: dict[Job, float | None]) -> dict[str, dict]:
    """By shape, at most a minute each for the compiler: who plans, and microseconds for three heats of the experts."""
    table: dict[str, dict] = {}
    for ranks, experts in SHAPES + MANY_EXPERTS:
        heats = [loads(ranks, experts, sigma) for sigma in (0.5, 1.0, 1.5)]
        compiled_in = seconds.get(Job(ranks, experts, 2))
        row: dict = {"planned": "on the GPU", "compile_s": compiled_in}
        if not kernels_fit(make_topology(ranks, experts, 2)):
            row |= {"planned": "on the host", "us": [on_host(torch.from_numpy(counts).cuda(), 2) for counts in heats]}
        elif compiled_in is None:
            row |= {"planned": f"not at all: kernels not compiled in {COMPILE_LIMIT} s", "us": []}
        else:
            for counts in heats:
                check_exact(counts, 2)
            row["us"] = [plan_times(counts, 2, False)["plan"] for counts in heats]
        table[f"{ranks} x {experts}"] = row
        times = ", ".join(f"{t:.1f}" for t in row["us"]) + " us" * bool(row["us"])
        print(f"  {ranks:3} x {experts:4}, log-normal loads, planned {row['planned']}: {times}", flush=True)
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
        place = {"xytext": (6, 6), "ha": "left"} if priced else {"xytext": (-6, -11), "ha": "right"}
        style: dict = {"textcoords": "offset points", "fontsize": 8, "color": colour, **place}
        for name, at, point in zip(names, x, points, strict=True):
            copies.annotate(name, (at, point["copies"]), **style)
        for i in (0, -1):  # what lies between is crowded
            times.annotate(names[i], (x[i], points[i]["median_us"]), **style)
    copies.set_ylabel("copies, mean")
    times.set_ylabel("microseconds from counts to plan")
    for axis in (copies, times):
        axis.set_xlabel("largest load over the mean, mean of the plans")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0.94)
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
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--draw", type=Path, metavar="RESULTS.json")
    parser.add_argument("--compile", nargs=4, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        return print(compile_here(Job(*args.compile)))
    if args.draw:
        return draw(args.draw)
    if args.loads:
        with np.load(args.loads, allow_pickle=False) as archive:
            matrices = {name: archive[name].astype(np.int32) for name in archive.files}
    else:
        matrices = {f"lognormal{sigma}_{r}x{e}": loads(r, e, sigma) for r, e in SHAPES[:6] for sigma in (0.5, 1.0, 1.5)}

    record: dict = {
        "command": f"python -m benchmarks.planner_gpu {args.loads.name if args.loads else ''}".strip(),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "method": f"{CHAIN} plans chained in a CUDA graph, median of {REPLAYS} replays, microseconds a plan",
    }
    print(record["device"], record["versions"])
    shapes = [Job(counts.shape[0], counts.shape[1], slots) for counts in matrices.values() for slots in (1, 2)]
    priced = [Job(64, 256, slots, timed) for slots in (1, 2) for timed in (False, True)]
    scaled = [Job(*shape, 2) for shape in SHAPES + MANY_EXPERTS if kernels_fit(make_topology(*shape, 2))]
    known: dict[Job, float | None] = {}
    parts: dict[str, tuple[list[Job], Callable[[], Any]]] = {
        "exact": (shapes, lambda: exact(matrices)),
        "rows": (shapes, lambda: by_row(matrices)),
        "counts": ([], counting),
        "frontier": (priced, lambda: frontier(matrices)),
        "scaling": (scaled, lambda: scaling(known)),
    }
    for name in args.only:
        jobs, part = parts[name]
        known |= compiled(job for job in jobs if job not in known)
        record[name] = part()
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
