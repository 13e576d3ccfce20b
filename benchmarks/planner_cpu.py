"""Time and quality of the planner on recorded load matrices, on one CPU core.

    python benchmarks/planner_cpu.py LOADS.npz [--public FIGURES.json] [--repetitions 20] [--planner quota] [--predict]

LOADS.npz holds int matrices [ranks, experts]. FIGURES.json, if given, holds under "rows" what another planner
makes of them (name, redundant, after, replicas, remote_local); rows that repeat a (name, redundant) are
ignored. --predict: the cost model's time of a training step of one layer (experts of 4096 x 1536 in bf16, top-8, H100
rates) under other planners over that under quota:N, with the N of these rates. Every plan is validated before anything is timed. One warm-up call per matrix, then the repetitions;
the process should have a core to itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import ultraep_compile.planner as planning
from ultraep_compile.cost_model import Layer, Loads, Rates, copy_tokens, evaluate, occurrences

BALANCED = 1.0105  # max/mean that reads as 1.01
ROUNDING = 5e-5  # published figures have four decimals


def milliseconds(counts_RE: torch.Tensor, slots: int, planner: str, repetitions: int) -> list[float]:
    """Wall time of `make_plan`, one entry per repetition."""
    planning.make_plan(counts_RE, slots, planner)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        planning.make_plan(counts_RE, slots, planner)
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def quality(counts_RE: torch.Tensor, slots: int, planner: str) -> dict[str, float]:
    """Figures of one validated plan, under the names of FIGURES.json."""
    plan = planning.make_plan(counts_RE, slots, planner)
    planning.validate_plan(counts_RE, plan)
    return {
        "after": planning.imbalance(planning.loads_after(plan)),
        "bound": planning.lower_bound(counts_RE, slots),
        "replicas": planning.replica_count(plan),
        "ingress": planning.max_ingress(plan),
        "remote": int(planning.remote_tokens(plan).sum()) / max(int(counts_RE.sum()), 1),
    }


def compare(ours: list[dict], theirs: list[dict]) -> None:
    """Print how our plans stand against another planner's; the lists belong together row by row."""
    pairs = list(zip(ours, theirs, strict=True))
    balanced = [pair for pair in pairs if pair[1]["after"] <= BALANCED]
    above = sum(o["after"] > t["after"] + ROUNDING for o, t in pairs)
    ingress = sum(o["ingress"] > t["redundant"] for o, t in pairs)
    local = sum(o["remote"] <= t["remote_local"] + ROUNDING for o, t in pairs)
    means = [statistics.mean(row["after"] for row in side) for side in (ours, theirs)]
    copies = [[sum(pair[i]["replicas"] for pair in rows) for i in (0, 1)] for rows in (pairs, balanced)]
    print(f"\nagainst the figures given, {len(pairs)} rows (ours / theirs)")
    print(f"  max/mean <= {BALANCED}: {sum(o['after'] <= BALANCED for o in ours)} / {len(balanced)} rows")
    print(f"  mean of max/mean: {means[0]:.4f} / {means[1]:.4f}; above theirs in {above} rows")
    print(f"  copies: {copies[0][0]} / {copies[0][1]}; where theirs balances: {copies[1][0]} / {copies[1][1]}")
    print(f"  more copies into one rank than it has slots: {ingress} rows")
    print(f"  share of tokens leaving their rank not above theirs: {local} of {len(pairs)} rows")


def predict(loads: dict[str, torch.Tensor], slots: int) -> None:
    """Print predicted times over those of `quota:N`, with copies in full view and with relays and overlap."""
    layer = Layer.gated(4096, 1536, 8)
    for title, rates in (("nothing hidden", Rates()), ("relays, 60% hidden", Rates(relay_from=4, exposed=0.4))):
        ours = f"quota:{copy_tokens(layer, rates)}"
        times = {
            planner: np.array([_predicted(c, slots, planner, layer, rates) for c in loads.values()])
            for planner in ("none", "greedy", "quota", ours)
        }
        print(f"\npredicted time over {ours}, {slots} slots, {len(loads)} loads, {title}: mean, least, most")
        for planner in ("none", "greedy", "quota"):
            ratio = times[planner] / times[ours]
            print(f"  {planner:7} {ratio.mean():.3f} {ratio.min():.3f} {ratio.max():.3f}")


def _predicted(counts_RE: torch.Tensor, slots: int, planner: str, layer: Layer, rates: Rates) -> float:
    plan = planning.make_plan(counts_RE, slots, planner)
    return evaluate(Loads.of(plan, rates), layer, rates, occurrences("train", planner != "none")).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", type=Path)
    parser.add_argument("--public", type=Path)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--planner", default="quota")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--predict", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)

    with np.load(args.loads, allow_pickle=False) as archive:
        loads = {name: torch.from_numpy(archive[name]) for name in archive.files}
    figures = {(name, s): quality(loads[name], s, args.planner) for name in loads for s in args.slots}
    print(f"{len(figures)} plans validated, planner {args.planner!r}")
    print(f"max/mean over its lower bound: worst {max(f['after'] / f['bound'] for f in figures.values()):.4f}")
    if args.public:
        rows = {(r["name"], r["redundant"]): r for r in reversed(json.loads(args.public.read_text())["rows"])}
        rows = {key: row for key, row in rows.items() if key in figures and row["remote_local"] is not None}
        compare([figures[key] for key in rows], list(rows.values()))
    if args.predict:
        predict(loads, max(args.slots))

    print(
        f"\n{platform.processor() or platform.machine()}, 1 thread; Python {platform.python_version()}, ",
        end="",
    )
    print(f"torch {torch.__version__}, numpy {np.__version__}; {args.repetitions} repetitions per matrix")
    times = defaultdict(list)
    for name, slots in figures:
        times[tuple(loads[name].shape)] += milliseconds(loads[name], slots, args.planner, args.repetitions)
    for (ranks, experts), values in sorted(times.items()):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {ranks:3} x {experts:4}: median {middle:.2f} ms, quartiles {low:.2f} {high:.2f}, ", end="")
        print(f"worst {max(values):.2f}, {len(values)} plans")


if __name__ == "__main__":
    main()
