"""Step time of a compiled MoE model with the ultraep backend over the same model compiled by the inner backend alone.

    python -m benchmarks.step_overhead [--inner inductor] [--ranks 8] [--device cpu] [--out FILE.json]

Both models train the same batches in turns within one process; the ratio of medians is what counts on a noisy machine.
Before anything is timed, loss and gradients of the two are compared. Prints a JSON record.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

from benchmarks.models import mixtral

FORMS = {"fp32+batched_mm": (torch.float32, "batched_mm"), "bf16+grouped_mm": (torch.bfloat16, "grouped_mm")}


def step(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def check(plain: torch.nn.Module, ours: torch.nn.Module, oracle: torch.nn.Module, inputs: dict) -> float:
    """Largest ratio of our gradient's error to the plain compile's, both against fp64; must stay within 2."""
    losses = [step(m, inputs) for m in (plain, ours, oracle)]
    floor = 1e-6 + torch.finfo(next(plain.parameters()).dtype).eps / 16  # a mean may come out right by luck
    assert relative(losses[1], losses[2]) <= 2 * relative(losses[0], losses[2]) + floor, losses
    worst = 0.0
    for a, b, exact in zip(ours.parameters(), plain.parameters(), oracle.parameters(), strict=True):
        if b.grad is not None:
            worst = max(worst, relative(a.grad, exact.grad) / max(relative(b.grad, exact.grad), 1e-7))
    assert worst <= 2, f"gradient error is {worst:.2f} times the plain compile's"
    return worst


def measure(form: str, inner: str, ranks: int, device: str, repetitions: int) -> dict:
    from ultraep_compile import ultraep

    dtype, experts = FORMS[form]
    plain, inputs = mixtral(dtype=dtype, experts=experts, device=device)
    ours, oracle = copy.deepcopy(plain), copy.deepcopy(plain).double()
    oracle.set_experts_implementation("batched_mm")  # the grouped product has no fp64
    for model in (plain, ours):
        model(**inputs)
    torch._dynamo.reset()
    plain.compile(backend=inner)
    options = {"ranks": ranks, "inner": inner}
    ours.compile(backend=lambda gm, ex: ultraep(gm, ex, options=options))
    worst = check(plain, ours, oracle, inputs)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repetitions):
        for name, model in (("plain", plain), ("ours", ours)):
            _wait(device)
            started = time.perf_counter()
            step(model, inputs)
            _wait(device)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(t) for name, t in times.items()}
    spread = {name: [min(t), max(t)] for name, t in times.items()}
    return {
        "form": form,
        "inner": inner,
        "ratio": medians["ours"] / medians["plain"],
        "median_s": medians,
        "range_s": spread,
        "worst_gradient_error_over_plain": worst,
        "repetitions": repetitions,
    }


def device_name(device: str) -> str:
    """GPU name, or the CPU's and whether it multiplies bf16 in hardware: that decides the bf16 figures."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, bf16 in hardware: {bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())}"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", default="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    record = {
        "command": "python -m benchmarks.step_overhead",
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ranks": arguments.ranks,
        "results": [
            measure(f, arguments.inner, arguments.ranks, arguments.device, arguments.repetitions)
            for f in arguments.forms
        ],
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
