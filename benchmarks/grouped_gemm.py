"""Grouped products of expert-sorted rows: first checked against fp64, then timed beside PyTorch's.

    python -m benchmarks.grouped_gemm [--rows 65536] [--repetitions 20] [--json FILE]

Every time is the median of `repetitions` between device events, after warm-up, all in one run on one device; the spread
is half the distance between the quartiles over the median. FLOP are those of the rows that exist. `_grouped_mm` gets
one weight tensor (it cannot take two), ours gets masters and slots.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from ultraep_compile.codegen import grouped_gemm_kernels as kernels

EXPERTS, SLOTS = 64, 2
SHAPES = {"4096 x 1536": (4096, 1536), "2880 x 5760": (2880, 5760), "2880 x 2880": (2880, 2880)}


def group_sizes(name: str, rows: int) -> Tensor:
    """int64 [EXPERTS + SLOTS]; the slots take as much as two even experts from the hottest ones."""
    groups = EXPERTS + SLOTS
    if name == "even":
        return torch.full((groups,), rows // groups)
    weight = 1 / torch.arange(1, groups + 1)
    return (rows * weight / weight.sum()).long()


def timed(function: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Milliseconds, and their relative spread."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # the host gets ahead: launching is not what is timed
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "spread": (high - low) / 2 / middle}


def check(x: Tensor, grad: Tensor, masters: Tensor, slots: Tensor, offsets: Tensor) -> None:
    """Products, input gradient and weight gradient of some groups against fp64; the tail must be zero."""
    bounds, eps = offsets.tolist(), torch.finfo(x.dtype).eps
    y = kernels.grouped_product(x, masters, slots, offsets)
    dx = kernels.grouped_product(grad, masters.transpose(1, 2), slots.transpose(1, 2), offsets)
    dw = kernels.grouped_weight_grad(x, grad, offsets)
    for g in (0, 1, EXPERTS - 1, EXPERTS, EXPERTS + SLOTS - 1):
        a, b = bounds[g], bounds[g + 1]
        w = (masters[g] if g < EXPERTS else slots[g - EXPERTS]).double()
        pairs = (
            (y[a:b], x[a:b].double() @ w),
            (dx[a:b], grad[a:b].double() @ w.T),
            (dw[g], x[a:b].double().T @ grad[a:b].double()),
        )
        for ours, exact in pairs:
            error = float((ours.double() - exact).norm() / exact.norm())
            assert error <= max(eps, 4e-6), (g, error)
    assert not y[bounds[-1] :].any() and not dx[bounds[-1] :].any()


def measure(shape: tuple[int, int], sizes: str, rows: int, repetitions: int, dtype: torch.dtype) -> dict:
    inner, outer = shape
    count = group_sizes(sizes, rows)
    used = int(count.sum())
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)]).to("cuda", torch.int32)
    x = torch.randn(rows, inner, device="cuda").to(dtype)
    grad = torch.randn(rows, outer, device="cuda").to(dtype)
    stored = (torch.randn(EXPERTS + SLOTS, outer, inner, device="cuda") * inner**-0.5).to(dtype)
    weight = stored.transpose(1, 2)  # as transformers stores it: [E, O, I], used transposed
    masters, slots_held = weight[:EXPERTS], stored[EXPERTS:].clone().transpose(1, 2)
    check(x, grad, masters, slots_held, offsets)
    back = (masters.transpose(1, 2), slots_held.transpose(1, 2))
    ours = {
        "forward": lambda: kernels.grouped_product(x, masters, slots_held, offsets),
        "input gradient": lambda: kernels.grouped_product(grad, *back, offsets),
        "weight gradient": lambda: kernels.grouped_weight_grad(x, grad, offsets),
    }
    theirs = {}
    if dtype == torch.bfloat16:
        ends, grouped_mm = offsets[1:], torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
        theirs = {
            "forward": lambda: grouped_mm(x[:used], weight, offs=ends),
            "input gradient": lambda: grouped_mm(grad[:used], stored, offs=ends),
            "weight gradient": lambda: grouped_mm(x[:used].t(), grad[:used], offs=ends),
        }
    table = {}
    for name, run in ours.items():
        flop = 2 * used * inner * outer
        table[name] = {"ours": _with_rate(timed(run, repetitions), flop)}
        if name in theirs:
            table[name]["_grouped_mm"] = _with_rate(timed(theirs[name], repetitions), flop)
    if theirs:
        same = torch.equal(ours["forward"]()[:used], theirs["forward"]())
        table["forward"]["bitwise equal to _grouped_mm"] = same
    return table


def _with_rate(result: dict[str, float], flop: float) -> dict[str, float]:
    return {**result, "tflops": flop / result["ms"] / 1e9}


def measure_mlp(hidden: int, width: int, sizes: str, rows: int, repetitions: int) -> dict:
    """gate_up, silu * mul, down; the activation by torch in both."""
    count = group_sizes(sizes, rows)
    used = int(count.sum())
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)]).to("cuda", torch.int32)
    x = torch.randn(used, hidden, device="cuda", dtype=torch.bfloat16)
    up = (torch.randn(EXPERTS + SLOTS, 2 * width, hidden, device="cuda") * hidden**-0.5).bfloat16().transpose(1, 2)
    down = (torch.randn(EXPERTS + SLOTS, hidden, width, device="cuda") * width**-0.5).bfloat16().transpose(1, 2)
    grouped_mm = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]

    def mlp(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        gate, value = product(x, up).chunk(2, -1)
        return product(torch.nn.functional.silu(gate) * value, down)

    def ours(rows: Tensor, weight: Tensor) -> Tensor:
        return kernels.grouped_product(rows, weight[:EXPERTS], weight[EXPERTS:], offsets)

    def theirs(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_mm(rows, weight, offs=offsets[1:])

    flop = 2 * used * 3 * hidden * width
    return {
        "ours": _with_rate(timed(lambda: mlp(ours), repetitions), flop),
        "_grouped_mm": _with_rate(timed(lambda: mlp(theirs), repetitions), flop),
        "bitwise equal": torch.equal(mlp(ours), mlp(theirs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    record: dict = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "rows": args.rows,
        "repetitions": args.repetitions,
    }
    print(record)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    record["dense 8192^3"] = _with_rate(timed(lambda: square @ square, args.repetitions), 2 * 8192**3)
    print(f"dense 8192^3: {record['dense 8192^3']['tflops']:.0f} TFLOP/s; ours / _grouped_mm, TFLOP/s:")
    for shape, dims in SHAPES.items():
        for sizes in ("even", "zipf"):
            table = record[f"{shape}, {sizes}"] = measure(dims, sizes, args.rows, args.repetitions, torch.bfloat16)
            row = ", ".join(
                f"{n} {t['ours']['tflops']:.0f} / {t['_grouped_mm']['tflops']:.0f}" for n, t in table.items()
            )
            print(f"{shape} {sizes:>4}: {row}, bitwise {table['forward']['bitwise equal to _grouped_mm']}", flush=True)
    for hidden, width in ((4096, 1536), (2880, 2880)):
        for sizes in ("even", "zipf"):
            mlp = record[f"MLP {hidden} x {width}, {sizes}"] = measure_mlp(
                hidden, width, sizes, args.rows, args.repetitions
            )
            print(
                f"MLP {hidden} x {width} {sizes}: {mlp['ours']['tflops']:.0f} / {mlp['_grouped_mm']['tflops']:.0f}, "
                f"bitwise {mlp['bitwise equal']}",
                flush=True,
            )
    fp32 = record["4096 x 1536, even, fp32"] = measure((4096, 1536), "even", args.rows // 8, 5, torch.float32)
    print("fp32 (ours):", ", ".join(f"{n} {t['ours']['tflops']:.0f}" for n, t in fp32.items()))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
