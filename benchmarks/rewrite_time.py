"""Time that our passes take per MoE layer, for models of growing depth.

    python -m benchmarks.rewrite_time [--layers 2 8 32] [--out FILE.json]

The model is compiled with the inner backend "eager", so that nothing but Dynamo and the passes runs; the passes time themselves.
The first compilation in a process also imports and warms up what tracing needs; it is reported apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from benchmarks.models import mixtral


def passes_seconds(layers: int) -> tuple[float, int, dict[str, float]]:
    """Seconds in all passes, number of rewritten layers, seconds by pass, for one compilation."""
    from ultraep_compile import ultraep
    from ultraep_compile.report import collect_reports

    model, inputs = mixtral(layers=layers, width=64, ffn=96)
    model(**inputs)
    torch._dynamo.reset()
    options = {"ranks": 4, "inner": "eager"}
    with collect_reports() as collected:
        torch.compile(model, backend=lambda gm, ex: ultraep(gm, ex, options=options))(**inputs)
    found = sum(len(g.prepared) for g in collected.graphs)
    by_pass: dict[str, float] = {}
    for graph in collected.graphs:
        for name, seconds in graph.seconds.items():
            by_pass[name] = by_pass.get(name, 0.0) + seconds
    assert found == layers, f"{found} of {layers} layers rewritten"
    return sum(by_pass.values()), found, by_pass


def main() -> None:
    from ultraep_compile.codegen import row_function
    from ultraep_compile.passes.lift import verify

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cold, _, _ = passes_seconds(2)
    results = []
    for layers in arguments.layers:
        times = []
        for _ in range(arguments.repetitions):
            row_function._programs.clear()  # every compilation traces and proves its row function anew
            verify._proven.clear()
            total, _, by_pass = passes_seconds(layers)
            times.append(1e3 * total / layers)
        results.append(
            {
                "layers": layers,
                "ms_per_layer_median": statistics.median(times),
                "ms_per_layer_range": [min(times), max(times)],
                "last_by_pass_ms": {k: 1e3 * v for k, v in by_pass.items()},
            }
        )
    record = {
        "command": "python -m benchmarks.rewrite_time",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "first_compilation_ms": 1e3 * cold,
        "repetitions": arguments.repetitions,
        "results": results,
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
