"""Time that one look at what a lifted layer's recorded forward read from Python takes: what our guard adds to a call.

    python -m benchmarks.guard_time [--experts 8 32] [--repetitions 7] [--out FILE.json]

The layer calls its experts (four modules each) one by one. Before anything is timed, a change of every expert must be seen. Medians
of turns, microseconds; the minimum beside them, since other work on the machine only adds. Prints a JSON record.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import ultraep_compile
from ultraep_compile.ladder.standing import standing_of


class Layer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.temperature, self.gate = 1.0, nn.Linear(32, experts, bias=False)
        one = lambda: nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Dropout(0.0), nn.Linear(64, 32))  # noqa: E731
        self.experts = nn.ModuleList(one() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = (self.gate(x) / self.temperature).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, expert(x[t]) * w[t, k, None]) if t.numel() else y
        return y


def microseconds(run, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return 1e6 * (time.perf_counter() - started) / count


def measure(experts: int, repetitions: int) -> dict:
    x = torch.randn(64, 32)
    ours = Layer(experts)
    started = time.process_time()
    ultraep_compile.prepare(ours, (x,))
    prepared = time.process_time() - started
    standing = standing_of(ours)
    assert standing is not None, "the layer is not lifted"
    reads = next(s.reads for s in standing.states if s.reads.hold())
    for expert in ours.experts:
        expert[2].p = 0.5
        assert not reads.hold(), "a change is not seen"
        expert[2].p = 0.0
    assert reads.hold()
    hooks = ultraep_compile.ladder.guards.hooks_of(ours)
    count = max(20, 4000 // experts)
    turns = [microseconds(lambda: (reads.hold(), list(map(len, hooks))), count) for _ in range(repetitions)]
    times = {"median_us": statistics.median(turns), "min_us": min(turns), "max_us": max(turns)}
    return {"experts": experts, **times, "prepare_cpu_s": prepared, "facts": reads.size()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "benchmark": "guard_time",
        "device": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repetitions": args.repetitions,
        "results": [measure(experts, args.repetitions) for experts in args.experts],
    }
    text = json.dumps(record, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
