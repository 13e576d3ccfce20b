"""Time that Dynamo's guards take a call for a lifted layer, beside the same without ours, and beside a traced layer's own.

    python -m benchmarks.guard_time [--experts 8 64 128] [--repetitions 7] [--out FILE.json]

The layer calls its experts (four modules each) one by one. `ours` are all guards of its compiled call, `without` the same less
what the recorded forward read; `traced` are the guards that torch.compile sets for a layer of the same modules which a compiler
sees whole (all experts on all tokens). Before anything is timed, a change of every expert must fail the guard. Medians of turns,
microseconds; the minimum beside them, since other work on the machine only adds. Prints a JSON record.
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
    def __init__(self, experts: int, dense: bool) -> None:
        super().__init__()
        self.temperature, self.dense, self.gate = 1.0, dense, nn.Linear(32, experts, bias=False)
        one = lambda: nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Dropout(0.0), nn.Linear(64, 32))  # noqa: E731
        self.experts = nn.ModuleList(one() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = (self.gate(x) / self.temperature).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        if self.dense:
            for e, expert in enumerate(self.experts):
                y = y + expert(x) * ((ids == e) * w).sum(-1, keepdim=True)
            return y
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, expert(x[t]) * w[t, k, None]) if t.numel() else y
        return y


def guards(model: nn.Module, x: Tensor, backend: str, options: dict | None) -> object:
    """The guards of one compiled call, to be asked about `{"x": ...}`."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    def call(x: Tensor) -> Tensor:
        return model(x)

    torch._dynamo.reset()
    call.__code__ = call.__code__.replace()
    torch.compile(call, backend=backend, options=options)(x)
    (entry,) = _debug_get_cache_entry_list(call.__code__)
    return entry.guard_manager.root


def microseconds(run, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return 1e6 * (time.perf_counter() - started) / count


def measure(experts: int, repetitions: int) -> dict:
    from torch._C._dynamo.guards import profile_guard_manager

    x = torch.randn(64, 32)
    ours, traced = Layer(experts, False), Layer(experts, True)
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
    root = guards(ours, x, "ultraep", {"ranks": 4, "redundant_experts": 2, "inner": "eager"})
    theirs = guards(traced, x, "eager", None)
    hooks = ultraep_compile.ladder.guards.hooks_of(ours)
    count = max(20, 4000 // experts)
    turns: dict[str, list[float]] = {"ours": [], "added": [], "traced": []}
    for _ in range(repetitions):
        turns["ours"].append(profile_guard_manager(root, {"x": x, "model": ours}, count))
        turns["traced"].append(profile_guard_manager(theirs, {"x": x, "model": traced}, count))
        turns["added"].append(microseconds(lambda: (reads.hold(), list(map(len, hooks))), count))
    found = {name: {"median_us": statistics.median(t), "min_us": min(t), "max_us": max(t)} for name, t in turns.items()}
    without = found["ours"]["min_us"] - found["added"]["min_us"]
    return {"experts": experts, **found, "without_min_us": without, "prepare_cpu_s": prepared, "facts": reads.size()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64, 128])
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
