"""Measures this machine's rates for the cost model and writes them for `ultraep-compile replay --rates`.

    python -m benchmarks.measure_rates --out rates.json                                # one device: products, memory, planning
    torchrun --nproc-per-node 8 -m benchmarks.measure_rates --out rates.json           # and links between the ranks

The product is a whole expert MLP as the cost model counts it, in bf16 with torch's grouped product on CUDA (fp32 and
one product after the other on a CPU), checked against plain products first. Links are measured as the collective
transport uses them: rows by all-to-all among all ranks, weights by all-to-all from one owner to all. Medians; the
spread is printed. Ranks on several hosts measure the slower of the two links: run one host for `dispatch_gbs`,
two for `network_gbs`, and say which with --far.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ultraep_compile.planner import make_plan


def seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median over the repetitions after two warm-up calls; prints the quartiles of rank 0."""
    times = []
    for n in range(repetitions + 2):
        if dist.is_initialized():
            dist.barrier()
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if n >= 2:
            times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times, n=4)
    _say(f"{middle * 1e6:10.1f} us, quartiles {low * 1e6:.1f} {high * 1e6:.1f}", end="  ")
    return middle


def expert_mlp(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """gate and up, activation, down of experts [G]; `ends` int32 [G]: where each one's rows end."""
    if rows.is_cuda:
        gate, up = torch._grouped_mm(rows, gate_up, offs=ends).chunk(2, -1)
        return torch._grouped_mm(F.silu(gate) * up, down, offs=ends)
    return plain_mlp(rows, gate_up, down, ends)


def plain_mlp(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """The same, expert after expert."""
    out, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        gate, up = (rows[start:end] @ gate_up[expert]).chunk(2, -1)
        out.append((F.silu(gate) * up) @ down[expert])
        start = end
    return torch.cat(out)


def products(device: torch.device, args: argparse.Namespace) -> float:
    """TFLOP/s of the experts of one rank."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = {"device": device, "dtype": dtype}
    each = args.rows // args.experts
    rows = torch.randn(each * args.experts, args.width, **make)
    gate_up = torch.randn(args.experts, args.width, 2 * args.ffn, **make) / args.width**0.5
    down = torch.randn(args.experts, args.ffn, args.width, **make) / args.ffn**0.5
    ends = torch.arange(1, args.experts + 1, dtype=torch.int32, device=device) * each
    found, expected = (f(rows, gate_up, down, ends).float() for f in (expert_mlp, plain_mlp))
    assert (found - expected).norm() <= 0.02 * expected.norm(), "the grouped product is wrong on this machine"
    took = seconds(lambda: expert_mlp(rows, gate_up, down, ends), device, args.repetitions)
    return rows.shape[0] * 6 * args.width * args.ffn / took / 1e12


def memory(device: torch.device, args: argparse.Namespace) -> float:
    """GB/s read plus written by a copy."""
    source = torch.empty(args.megabytes << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, args.repetitions) / 1e9


def links(device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """GB/s each way: rows among all ranks, and weights from one owner to all others."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = (args.megabytes << 20) // ranks
    sent = torch.ones(size * ranks, dtype=torch.uint8, device=device)
    got = torch.empty_like(sent)
    rows = seconds(lambda: dist.all_to_all_single(got, sent), device, args.repetitions)
    name = "network_gbs" if args.far else "dispatch_gbs"
    out = {name: size * (ranks - 1) / rows / 1e9}
    _say(f"{name} {out[name]:.1f}")

    weights = 2 * 3 * args.width * args.ffn
    send = [0 if rank or peer == 0 else weights for peer in range(ranks)]
    receive = [weights if rank and peer == 0 else 0 for peer in range(ranks)]
    sent = torch.ones(sum(send), dtype=torch.uint8, device=device)
    got = torch.empty(sum(receive), dtype=torch.uint8, device=device)
    copies = seconds(lambda: dist.all_to_all_single(got, sent, receive, send), device, args.repetitions)
    out["copy_gbs"] = weights * (ranks - 1) / copies / 1e9
    _say(f"copy_gbs {out['copy_gbs']:.1f}")
    return {**out, "reduce_gbs": out["copy_gbs"]}  # gradients go the same way back


def planning(device: torch.device, args: argparse.Namespace) -> float:
    """Microseconds from counts on the device to a plan on the device, for 64 ranks and 256 experts."""
    counts_RE = torch.randint(0, 200, (64, 256), device=device, dtype=torch.int32)
    counts_RE[:, :8] *= 20
    return 1e6 * seconds(lambda: make_plan(counts_RE, 2), device, args.repetitions)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(text: str, end: str = "\n") -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, end=end, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=6, help="masters and slots of a rank")
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--far", action="store_true", help="the ranks are in different domains")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", "0"))) if args.device == "cuda" else torch.device("cpu")
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    _say(f"{name}, torch {torch.__version__}, {args.repetitions} repetitions")

    rates: dict[str, float] = {}
    for rate, measure in (("gemm_tflops", products), ("memory_gbs", memory), ("plan_us", planning)):
        rates[rate] = measure(device, args)
        _say(f"{rate} {rates[rate]:.4g}")
    if dist.is_initialized():
        rates |= links(device, args)
    if int(os.environ.get("RANK", "0")) == 0:
        args.out.write_text(json.dumps({key: float(f"{value:.4g}") for key, value in rates.items()}, indent=2) + "\n")
        print(f"wrote {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
