"""How far plans are from the exact optimum, on random small problems: mean and worst gap, and both bounds.

    python -m benchmarks.planner_optimum [--instances 500] [--planners quota,greedy,lplb] [--out results.json]

The optimum is a mixed-integer program (scipy's HiGHS). A gap is measured against what the planner aims for: the
optimum, or 1% above the mean where that is more; the gap to the optimum itself is printed too. Every plan is validated
first, and an optimum below the fast lower bound ends the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from ultraep_compile.planner import PLANNERS, loads_after, make_plan, validate_plan
from ultraep_compile.planner.bounds import smallest_max_load
from ultraep_compile.planner.optimum import optimal_max_load
from ultraep_compile.planner.registry import uses_history

RESULTS = Path(__file__).parent / "results" / "planner" / "optimum.json"


def instance(rng: np.random.Generator) -> tuple[torch.Tensor, int]:
    """Counts of 2 to 6 ranks with 1 to 6 experts each, from nearly even to one hot rank; 1 or 2 slots."""
    while True:
        ranks, masters, slots = int(rng.integers(2, 7)), int(rng.integers(1, 7)), int(rng.integers(1, 3))
        if slots > (ranks - 1) * masters:
            continue
        heat_RM = np.exp(rng.normal(size=(ranks, masters)) * rng.choice([0.3, 1.0, 2.0]))
        heat_RM *= np.exp(rng.normal(size=(ranks, 1)) * 0.7) * rng.choice([5, 50, 2000])
        counts_RE = rng.poisson(heat_RM.ravel() / ranks, (ranks, ranks * masters))
        if counts_RE.sum():
            return torch.from_numpy(counts_RE), slots


def judge(counts_RE: torch.Tensor, slots: int, planners: list[str], limit_s: float) -> dict[str, Any] | None:
    """One row of figures; None when the solver does not finish."""
    ranks, loads_E = counts_RE.shape[0], counts_RE.sum(0).numpy()
    optimum = optimal_max_load(loads_E, ranks, slots, limit_s)
    if optimum is None:
        return None
    bound, mean = smallest_max_load(loads_E.reshape(ranks, -1), slots), int(loads_E.sum()) / ranks
    assert bound <= optimum, (counts_RE.tolist(), slots, bound, optimum)
    row: dict[str, Any] = {"optimum": optimum / mean, "bound": bound / mean, "aim": max(optimum / mean, 1.01)}
    for planner in planners:
        plan = make_plan(counts_RE, slots, planner)
        validate_plan(counts_RE, plan, never_worse=not uses_history(planner))
        worst = int(loads_after(plan).max())
        assert worst >= optimum, (counts_RE.tolist(), slots, planner, worst, optimum)
        row[planner] = worst / mean
    return row


def summary(rows: list[dict[str, Any]], planner: str) -> dict[str, float]:
    """Gaps of one planner, in percent, against its aim and against the optimum itself."""
    aimed = [100 * max(row[planner] / row["aim"] - 1, 0) for row in rows]
    raw = [100 * (row[planner] / row["optimum"] - 1) for row in rows]
    return {
        "mean_gap_percent": statistics.mean(aimed),
        "worst_gap_percent": max(aimed),
        "mean_gap_to_optimum_percent": statistics.mean(raw),
        "worst_gap_to_optimum_percent": max(raw),
        "mean_imbalance": statistics.mean(row[planner] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=500)
    parser.add_argument("--planners", default=",".join(name for name in PLANNERS if name != "none"))
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one optimum")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rng, rows, unsolved = np.random.default_rng(args.seed), [], 0
    planners = args.planners.split(",")
    while len(rows) < args.instances:
        row = judge(*instance(rng), planners, args.limit)
        unsolved += row is None
        rows += [] if row is None else [row]
    tight = sum(row["bound"] >= row["optimum"] - 1e-12 for row in rows)
    found = {
        "instances": len(rows),
        "unsolved": unsolved,
        "seed": args.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "mean_optimum": statistics.mean(row["optimum"] for row in rows),
        "mean_lower_bound": statistics.mean(row["bound"] for row in rows),
        "lower_bound_is_the_optimum": tight,
        "worst_lower_bound_gap_percent": max(100 * (1 - row["bound"] / row["optimum"]) for row in rows),
        "planners": {planner: summary(rows, planner) for planner in planners},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{len(rows)} instances solved ({unsolved} not in {args.limit:g} s), max/mean on average:")
    print(f"  optimum {found['mean_optimum']:.4f}, lower bound {found['mean_lower_bound']:.4f}", end="")
    print(f" (the optimum itself in {tight}, at worst {found['worst_lower_bound_gap_percent']:.2f}% below)")
    print(f"  {'':8} {'max/mean':>9} {'gap to max(optimum, 1.01)':>27} {'gap to the optimum':>22}")
    for planner, one in found["planners"].items():
        print(f"  {planner:8} {one['mean_imbalance']:9.4f}", end="")
        print(f" mean {one['mean_gap_percent']:7.3f}% worst {one['worst_gap_percent']:6.2f}%", end="")
        print(f" mean {one['mean_gap_to_optimum_percent']:6.3f}% worst {one['worst_gap_to_optimum_percent']:5.2f}%")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
