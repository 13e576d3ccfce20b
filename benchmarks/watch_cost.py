"""What the option `watch` costs: a step with and without it, and a look, amortised over the steps between two looks.

Run: python -m benchmarks.watch_cost [--device cuda] [--layers 8] [--tokens 2048]. Prints JSON; also on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import nn

import ultraep_compile
from ultraep_compile import spot_check


class Layer(nn.Module):
    """Top-2 of 16 experts in a loop, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 16, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weight[token, choice, None])
        return x + y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(given.width) for _ in range(given.layers))).to(given.device)
    x = torch.randn(given.tokens, given.width, device=given.device)
    expected = model(x)
    ultraep_compile.prepare(model, (x,))
    model.compile(backend="ultraep", options={"ranks": 4, "inner": "aot_eager", "watch": True})

    def step() -> float:
        if given.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        y = model(x)
        y.square().mean().backward()
        if given.device == "cuda":
            torch.cuda.synchronize()
        assert torch.allclose(y, expected, atol=1e-3), "correct before it is timed"
        return time.perf_counter() - started

    looked: list[float] = []
    plain: list[float] = []
    real = spot_check.Clock.tick
    for kind, due in ((plain, None), (looked, 1)):
        spot_check.Clock.tick = lambda self, due=due: due  # type: ignore[method-assign]
        for turn in range(given.repetitions + 2):
            seconds = step()
            if turn > 1:
                kind.append(seconds)
    spot_check.Clock.tick = real  # type: ignore[method-assign]
    clock = spot_check.Clock(next=1 << 60)
    started = time.perf_counter()
    for _ in range(100_000):
        clock.tick()
    tick = (time.perf_counter() - started) / 100_000
    step_s, look_s = statistics.median(plain), statistics.median(looked) - statistics.median(plain)
    found = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{n: getattr(given, n) for n in ("layers", "tokens", "width", "repetitions")},
        "step_ms": {"median": 1e3 * step_s, "min": 1e3 * min(plain), "max": 1e3 * max(plain)},
        "step_with_look_ms": {"median": 1e3 * statistics.median(looked), "min": 1e3 * min(looked), "max": 1e3 * max(looked)},
        "look_in_steps": look_s / step_s,
        "tick_us": 1e6 * tick,
        "amortised_percent": 100 * (look_s / spot_check._PERIOD + tick) / step_s,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
