"""What other homes of experts bring where copies stay in small domains.

    python -m benchmarks.planner_homes [--domain 8]

64 ranks, 256 experts, top-8, 8192 tokens a rank; popularity falls from rank to rank and, steeply, from expert to expert of
a rank, so that ranks are sorted hottest first and the fullest rank has the given multiple of the mean. Prints the lower
bound on any plan with experts in order, in a random order and rehomed, and the plans of `quota` with 2 slots.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from ultraep_compile.planner import imbalance, loads_after, loads_before, lower_bound, make_plan, validate_plan
from ultraep_compile.planner.homes import in_order, spread_homes

RANKS, MASTERS, TOP_K, TOKENS = 64, 4, 8, 8192


def chances(falling: float) -> np.ndarray:
    """[R, M]: share of the tokens that choose each expert; weights (r+1)^-falling * (m+1)^-4, top-k without repetition."""
    weight = (np.arange(RANKS)[:, None] + 1.0) ** -falling * (np.arange(MASTERS) + 1.0) ** -4.0
    low, high = 0.0, 1.0
    while (1 - np.exp(-high * weight)).sum() < TOP_K:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-middle * weight)).sum() < TOP_K else (low, middle)
    return 1 - np.exp(-high * weight)


def loads(ratio: float, seed: int = 0) -> torch.Tensor:
    """int64 [R, E] whose fullest rank has `ratio` times the mean."""
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        of_rank = chances(middle).sum(1)
        low, high = (middle, high) if of_rank.max() / of_rank.mean() < ratio else (low, middle)
    share = chances(low).ravel()
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.multinomial(TOKENS * TOP_K, share / share.sum()) for _ in range(RANKS)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", type=int, default=8)
    args = parser.parse_args()
    print("imbalance   bound: in order  random  rehomed    plan: in order  rehomed    ms to rehome")
    for ratio in (1.5, 2.0, 3.0, 4.0):
        counts_RE = loads(ratio)
        start = time.perf_counter()
        order_E = spread_homes(counts_RE, args.domain)
        took = (time.perf_counter() - start) * 1e3
        shuffled = torch.from_numpy(np.random.default_rng(1).permutation(order_E.numel()))
        ways = [counts_RE, in_order(counts_RE, shuffled), in_order(counts_RE, order_E)]
        bounds = [lower_bound(c, 2, args.domain) for c in ways]
        plans = []
        for counts in (ways[0], ways[2]):
            plan = make_plan(counts, 2, domain=args.domain)
            validate_plan(counts, plan, domain=args.domain)
            plans.append(imbalance(loads_after(plan)))
        cells = "   ".join(f"{value:.3f}" for value in (*bounds, *plans))
        print(f"{imbalance(loads_before(counts_RE)):.2f}   {cells}   {took:.1f}")


if __name__ == "__main__":
    main()
