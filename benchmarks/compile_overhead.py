"""CPU time of compiling a MoE model with the ultraep backend, over the inner backend alone.

    python -m benchmarks.compile_overhead [--inner aot_eager inductor] [--layers 2 8 32] [--repetitions 5] [--out FILE.json]

What is measured is the CPU time, of the process and of the compilers it starts, of a model's first training step less a later
step: Dynamo, our passes and the inner backend, forward and backward. Waiting for a busy machine does not count in it. Every
figure comes from a fresh process with compiler caches off; the two backends take turns. A dense layer is compiled by the inner
backend before the clock starts, so that its own imports count for neither, while ours count for us. `prepare` is a call of its
own and is reported apart. Loss and gradients are compared with eager's before a figure counts. Prints a JSON record.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

SIDES = ("plain", "ours")


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def one(side: str, inner: str, layers: int, ranks: int) -> dict[str, float]:
    """Seconds of one compilation in this process, and what it was of."""
    import torch

    import ultraep_compile
    from benchmarks.models import mixtral
    from benchmarks.step_overhead import relative, step
    from ultraep_compile.report import collect_reports

    torch.set_num_threads(1)
    torch.compile(torch.nn.Linear(8, 8), backend=inner)(torch.randn(8, 8)).sum().backward()
    torch._dynamo.reset()
    model, inputs = mixtral(layers=layers, width=64, ffn=96, batch=4, length=32)
    started = cpu_seconds()
    if side == "ours":
        ultraep_compile.prepare(model, inputs)
    prepared = cpu_seconds() - started
    loss = step(model, inputs)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    options = {"ranks": ranks, "inner": inner}
    model.compile(**({"backend": "ultraep", "options": options} if side == "ours" else {"backend": inner}))
    with collect_reports() as collected:
        started = cpu_seconds()
        found = step(model, inputs)
        first = cpu_seconds() - started
    rewritten = sum(len(g.prepared) for g in collected.graphs)
    assert rewritten == (layers if side == "ours" else 0), f"{rewritten} of {layers} layers rewritten"
    assert relative(found, loss) < 1e-5
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(relative(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-3
    later = []
    for _ in range(3):
        started = cpu_seconds()
        step(model, inputs)
        later.append(cpu_seconds() - started)
    passes = sum(sum(g.seconds.values()) for g in collected.graphs)
    return {"compile": first - statistics.median(later), "passes_wall": passes, "prepare": prepared, "step": min(later)}


def in_a_process(side: str, inner: str, layers: int, ranks: int) -> dict[str, float]:
    # one compiling thread: the compilers it starts are this process's children, whose time it can read
    environment = {
        **os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compile_overhead", "--one", side, inner, str(layers)]
    done = subprocess.run([*command, "--ranks", str(ranks)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(inner: str, layers: int, ranks: int, repetitions: int) -> dict:
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(repetitions):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            runs[side].append(in_a_process(side, inner, layers, ranks))
    plain, ours = ([r["compile"] for r in runs[side]] for side in SIDES)
    return {
        "inner": inner,
        "layers": layers,
        "ratio": statistics.median(ours) / statistics.median(plain),
        "ratios_of_turns": summary([a / b for a, b in zip(ours, plain, strict=True)]),
        "plain_s": summary(plain),
        "ours_s": summary(ours),
        "passes_wall_s": summary([r["passes_wall"] for r in runs["ours"]]),
        "prepare_s": summary([r["prepare"] for r in runs["ours"]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", nargs="*", default=["aot_eager", "inductor"], choices=["aot_eager", "inductor"])
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "INNER", "LAYERS"), help="a single compilation, in this process")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        side, inner, layers = arguments.one
        print(json.dumps(one(side, inner, int(layers), arguments.ranks)))
        return
    import torch

    record = {
        "command": "python -m benchmarks.compile_overhead",
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ranks": arguments.ranks,
        "repetitions": arguments.repetitions,
        "results": [],
    }
    for inner, layers in itertools.product(arguments.inner, arguments.layers):
        record["results"].append(measure(inner, layers, arguments.ranks, arguments.repetitions))
        if arguments.out:  # a run that is stopped keeps what it has
            arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
