"""Training steps of a whole transformers MoE model with real expert parallelism: not balanced, balanced, force-balanced.

    torchrun --nproc-per-node 2 -m benchmarks.training_steps --json FILE.json            # one GPU a process, NCCL
    torchrun ... --trace DIR        # also one step of every mode as DIR/MODE.json.gz, to be opened in Perfetto
    torchrun --nproc-per-node 2 -m benchmarks.training_steps --device cpu --tiny         # gloo, to see it run

A Qwen3-MoE with random weights learns bytes of Python source: experts divided over all processes, dense layers under
DistributedDataParallel, fused AdamW, bf16. `none` and `ours` train the same weights on the same batches and differ in the
option `planner` alone, so their losses must stay together; `nudged` is `none` with one weight changed by its last bit, which
shows how far rounding alone drives two runs apart. `ideal` is the same model with a router that deals tokens to experts in
turn, which no plan can beat. Routers are tilted towards the first `--hot` experts, all of the first rank, before training,
so that the load is as uneven as that of trained models; the imbalance is measured, in eager mode, at the beginning and
the end.

Steps are timed in windows of `--window` without a pause, as in real training. Checked before the times are reported: the
first losses of `none` and `ours` are equal, and later ones differ by at most three times what `none` and `nudged` do
(by `--tolerance`, if that mode is left out). Results are written in any case.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ultraep_compile
from ultraep_compile.demo import source_bytes

PLANNERS = {"none": "none", "ours": "quota", "ideal": "none", "nudged": "none"}
SIZES = {
    "large": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "tiny": {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 2},
}


def build(size: str, layers: int, device: torch.device) -> nn.Module:
    """The same weights in every process and mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    shape = SIZES[size]
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        intermediate_size=shape["moe_intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=max(1, shape["hidden_size"] // 512),
        head_dim=64,
        norm_topk_prob=True,
        **shape,
    )
    torch.manual_seed(0)
    with device:
        model = transformers.Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm")
    return model.to(torch.bfloat16).train()


def routers(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]  # pyright: ignore


@torch.no_grad()
def tilt(model: nn.Module, ids: Tensor, strength: float, hot: int) -> None:
    """Turn the router's rows of the first `hot` experts towards the mean of what it reads: `strength` more logits."""
    for router in routers(model):
        read: list[Tensor] = []
        handle = router.register_forward_hook(lambda _, args, out, read=read: read.append(args[0]))
        model(input_ids=ids)  # layer by layer: a tilted layer changes what the next ones read
        handle.remove()
        mean = read[0].float().mean(0)
        rows = router.weight[:hot]
        rows += (strength * mean / mean.square().sum()).to(rows.dtype)


@torch.no_grad()
def nudge(weight: Tensor) -> None:
    """Change the last bit of the first number."""
    weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)[(0,) * weight.dim()] ^= 1


def deal_in_turn(model: nn.Module) -> None:
    """Replace the choice of every router: experts in turn, with the weights that the scores give them."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        scores = torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1)
        expert = torch.arange(self.num_experts, device=hidden.device)
        token = torch.arange(scores.shape[0], device=hidden.device)
        mine = (expert - token.unsqueeze(1) * self.top_k) % self.num_experts < self.top_k
        _, ids = torch.topk(scores + mine * 2.0, self.top_k, dim=-1)
        weight = scores.gather(1, ids)
        return logits, (weight / weight.sum(-1, keepdim=True)).to(logits.dtype), ids

    for router in routers(model):
        router.forward = types.MethodType(forward, router)


@torch.no_grad()
def imbalance(model: nn.Module, ids: Tensor, ranks: int) -> list[float]:
    """Busiest rank over mean of every layer, as routed, over the tokens of all ranks."""
    loads: list[Tensor] = []

    def count(router: Any, args: Any, out: Any) -> None:
        loads.append(torch.bincount(out[2].flatten(), minlength=router.num_experts))

    handles = [router.register_forward_hook(count) for router in routers(model)]
    with torch.compiler.set_stance("force_eager"):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    total = torch.stack(loads)
    dist.all_reduce(total)
    load = total.view(len(loads), ranks, -1).sum(-1).double()
    return (load.amax(1) / load.mean(1)).tolist()


def batches(arguments: argparse.Namespace, rank: int, device: torch.device) -> Iterator[Tensor]:
    """This rank's token ids [batch, length] of every step."""
    text = source_bytes()
    generator = torch.Generator().manual_seed(1000 + rank)
    for _ in range(arguments.steps):
        starts = torch.randint(0, len(text) - arguments.length, (arguments.batch,), generator=generator)
        yield torch.stack([text[s : s + arguments.length] for s in starts.tolist()]).long().to(device)


def groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Sharded parameters and others apart: a fused optimizer takes one kind at a time."""
    params = list(model.parameters())
    kinds = [[p for p in params if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [{"params": kind} for kind in kinds if kind]


def one_step(parallel: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """The loss."""
    optimizer.zero_grad()
    loss = parallel(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss


def trace_step(step: Callable[[], object], file: Path) -> None:
    """The kernels of one step on the first rank; all ranks take the step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    if dist.get_rank() > 0:
        step()
        return
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))


def run_mode(mode: str, arguments: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    slots = arguments.slots if mode == "ours" else 0
    model = build(arguments.size, arguments.layers, device)
    probe = next(batches(arguments, 0, device))
    tilt(model, probe[:1], arguments.tilt, arguments.hot)
    if mode == "ideal":
        deal_in_turn(model)
    if mode == "nudged":
        nudge(next(iter(routers(model))).weight)  # pyright: ignore
    began = time.perf_counter()
    ultraep_compile.prepare(model, {"input_ids": probe[:1, :64]})
    preparing = time.perf_counter() - began
    ultraep_compile.shard_experts(model, mesh)
    first = next(batches(arguments, rank, device))[:1]
    before = imbalance(model, first, ranks)
    options = {"redundant_experts": slots, "planner": PLANNERS[mode], "inner": arguments.inner}
    options |= {"transport": arguments.transport, "expect_moe_sites": arguments.layers}
    model.compile(backend=ultraep_compile.ultraep, options=options)
    torch._dynamo.config.optimize_ddp = False  # else the graph is cut at DDP's buckets, through MoE layers
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(groups(parallel), lr=arguments.lr, eps=1e-6, fused=True)
    losses, seconds, every = [], [], list(batches(arguments, rank, device))
    ids = every[0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for start in track(range(0, len(every), arguments.window), mode, disable=rank > 0):
        dist.barrier()
        _wait(device)
        began = time.perf_counter()
        for ids in every[start : start + arguments.window]:
            losses.append(one_step(parallel, optimizer, ids).detach())
        _wait(device)
        seconds.append((time.perf_counter() - began) / len(every[start : start + arguments.window]))
    total = torch.stack(losses).double()
    dist.all_reduce(total)
    if arguments.trace:
        trace_step(lambda: one_step(parallel, optimizer, ids), arguments.trace / f"{mode}.json.gz")
    after = imbalance(model, first, ranks)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    timed = seconds[len(seconds) // 5 :] if len(seconds) > 4 else seconds[-2:]  # the first ones compile
    tokens = arguments.batch * arguments.length * ranks
    return {
        "tokens_per_second": tokens / statistics.median(timed),
        "step_ms": {
            "median": 1e3 * statistics.median(timed),
            "smallest": 1e3 * min(timed),
            "largest": 1e3 * max(timed),
            "windows": len(timed),
        },
        "prepare_s": preparing,
        "first_window_s": seconds[0] * min(arguments.window, len(every)),
        "peak_gib": peak,
        "imbalance_before_training": before,
        "imbalance_after_training": after,
        "losses": (total / ranks).tolist(),
    }


def check(results: dict[str, dict], tolerance: float) -> dict[str, float | str]:
    """Balancing may not change what is learnt: largest differences of the losses, relative, and what is wrong with them."""
    if not {"none", "ours"} <= set(results):
        return {}

    def apart(mode: str) -> float:
        pairs = zip(results[mode]["losses"], results["none"]["losses"], strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    first = abs(results["ours"]["losses"][0] - results["none"]["losses"][0])
    found: dict[str, float | str] = {"first_loss_difference": first, "worst_loss_difference": apart("ours")}
    if "nudged" in results:
        found["worst_loss_difference_by_rounding"] = apart("nudged")
        tolerance = 3 * apart("nudged")
    if first > 0:
        found["wrong"] = "the first losses differ"
    elif apart("ours") > tolerance:
        found["wrong"] = f"the losses differ by more than {tolerance:.0e}"
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=10, help="steps that are timed together")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tilt", type=float, default=1.5, help="logits that the hot experts gain")
    parser.add_argument("--hot", type=int, default=8, help="number of hot experts")
    parser.add_argument("--slots", type=int, default=4, help="for `ours`, on every rank")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--transport", default="auto", help="auto takes symmetric memory where there is any")
    parser.add_argument("--modes", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--trace", type=Path, help="folder for one step of every mode, as Perfetto reads it")
    parser.add_argument("--tolerance", type=float, default=2e-2)
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="large")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=5))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    results, record = {}, {}
    for mode in arguments.modes:
        results[mode] = run_mode(mode, arguments, mesh, device)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record = {
            "command": f"torchrun --nproc-per-node {dist.get_world_size()} -m benchmarks.training_steps",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "ranks": dist.get_world_size(),
            "torch": torch.__version__,
            "arguments": {k: v for k, v in vars(arguments).items() if k not in ("json", "trace")},
            "check": check(results, arguments.tolerance),
            "results": results,
        }
        if arguments.json and dist.get_rank() == 0:  # now: a run that is stopped later keeps what it measured
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if dist.get_rank() == 0:
        _show(record)
    dist.destroy_process_group()
    if "wrong" in record["check"]:
        sys.exit(record["check"]["wrong"])


def _show(record: dict) -> None:
    ideal = record["results"].get("ideal", {}).get("tokens_per_second")
    for mode, result in record["results"].items():
        before, after = (statistics.median(result[f"imbalance_{x}_training"]) for x in ("before", "after"))
        share = f"  {result['tokens_per_second'] / ideal:.3f} of ideal" if ideal else ""
        print(
            f"{mode:6} {result['tokens_per_second']:12,.0f} tokens/s  step {result['step_ms']['median']:8.1f} ms{share}  "
            f"imbalance as routed {before:.2f} -> {after:.2f}  loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
        )
    print(record["check"])


if __name__ == "__main__":
    main()
