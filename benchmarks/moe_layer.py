"""One MoE layer with real expert parallelism over symmetric memory, any number of GPUs.

    torchrun --nproc-per-node 2 -m benchmarks.moe_layer [--case imbalance llep] [--json FILE]
    TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 torchrun ... --share-gpu     (all ranks on one GPU: correctness, not speed)

`imbalance`: forward and forward + backward at imbalance 1 to R, for `ideal` (as many tokens for every expert, nothing to
balance), `none` (the skewed routing as it is) and `ours`. `llep`: forward of 32768 tokens a rank, hidden and expert width
2880, 128 experts, top-4, with 30 / 50 / 80 / 95% of the routed tokens on 4 experts of one rank, the case for which
LLEP (arXiv 2601.17111) was measured on 2 H100: 33.1 / 41.1 / 41.5 / 37.4 ms.

Before anything is timed: all ranks have made the same plan, outputs and token gradients of `ours` have the bits of
`none`, weight gradients differ by rounding only, and some rows are compared with the experts in fp32. A time is the
median over the repetitions, which run without a pause, of the slowest rank; the spread is half the distance between the
quartiles over the median.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import operator
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import triton
from torch import Tensor, fx, nn

from ultraep_compile.codegen.row_function import RowSignature, TensorSpec, compile_row_function
from ultraep_compile.ops import plane
from ultraep_compile.ops.experts import ExpertSite, register_site
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.transport import choose_transport
from ultraep_compile.planner import imbalance as max_over_mean
from ultraep_compile.planner import loads_before


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer: T tokens a rank, D hidden, F expert width, E experts, K choices, S slots a rank."""

    tokens: int
    hidden: int
    width: int
    experts: int
    choices: int
    slots: int


QWEN = Shape(tokens=16384, hidden=4096, width=1536, experts=128, choices=8, slots=4)
LLEP = Shape(tokens=32768, hidden=2880, width=2880, experts=128, choices=4, slots=2)
LLEP_MS = {0.30: 33.1, 0.50: 41.1, 0.80: 41.5, 0.95: 37.4}


def everyone() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def product(x: Tensor, w: Tensor, expert_id: Tensor) -> Tensor:
    raise AssertionError("a marker, never run")


def gated_experts() -> fx.GraphModule:
    """Rows through silu(gate) * up and down, weights stored [E, out, in] as in transformers."""
    g = fx.Graph()
    rows, eid, up, down = (g.placeholder(n) for n in ("rows", "expert_id", "up", "down"))
    x = g.call_function(product, (rows, g.call_method("transpose", (up, -2, -1)), eid))
    halves = g.call_method("chunk", (x, 2, -1))
    gate, value = (g.call_function(operator.getitem, (halves, i)) for i in (0, 1))
    x = g.call_function(operator.mul, (g.call_function(nn.functional.silu, (gate,)), value))
    g.output(g.call_function(product, (x, g.call_method("transpose", (down, -2, -1)), eid)))
    return fx.GraphModule(nn.Module(), g)


def weights_of(expert: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same on every rank that asks."""
    g = torch.Generator("cuda").manual_seed(1000 + expert)
    up = torch.randn(2 * shape.width, shape.hidden, device="cuda", generator=g) * shape.hidden**-0.5
    down = torch.randn(shape.hidden, shape.width, device="cuda", generator=g) * shape.width**-0.5
    return up.to(dtype), down.to(dtype)


class Layer:
    """This rank's part of the layer."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.group = shape, everyone().group_name
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.layout = ExpertLayout(shape.experts, ranks, shape.slots)
        spec = TensorSpec
        parts = (spec((2 * shape.width, shape.hidden), dtype), spec((shape.hidden, shape.width), dtype))
        signature = RowSignature(
            self.layout.masters, shape.slots, spec((shape.hidden,), dtype), None, parts, consts=()
        )
        program = compile_row_function(
            gated_experts(), signature, is_product=lambda t: t is product, is_take=lambda t: False, fuse=True
        )
        self.key = f"layer@{shape}"
        register_site(self.key, ExpertSite("layer", self.layout, self.group, True, program))
        mine = range(rank * self.layout.masters, (rank + 1) * self.layout.masters)
        self.params = [torch.empty(self.layout.masters, *p.shape, device="cuda", dtype=dtype) for p in parts]
        for i, expert in enumerate(mine):
            for param, value in zip(self.params, weights_of(expert, shape, dtype), strict=True):
                param[i] = value
        for param in self.params:
            param.requires_grad_()

    def plan(self, ids: Tensor, planner: str) -> tuple[Tensor, Tensor, Tensor]:
        """counts_RE, slot_expert_RS, shares_RP"""
        ops, layout = torch.ops.ultraep, self.layout
        counts = ops.expert_load(ids, None, layout.experts, layout.ranks, self.group, self.key)
        return counts, *ops.plan(counts, layout.slots, planner, self.key)

    def __call__(self, hidden: Tensor, weight: Tensor, ids: Tensor, planner: str) -> Tensor:
        """[T, D]: the weighted sum over the choices."""
        ops, layout = torch.ops.ultraep, self.layout
        _, slot_expert, shares = self.plan(ids, planner)
        physical = ops.reroute(ids, slot_expert, shares, layout.experts, self.group, self.key)
        y = ops.experts(hidden, None, physical, slot_expert, shares, self.params, [], self.key)[0]
        return weighted_sum(y.view(*ids.shape, -1), weight)


@torch.compile
def weighted_sum(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """What the model does after its experts, as Inductor compiles it."""
    return (y_TKD * weight_TK.unsqueeze(-1)).sum(1)


def skewed_ids(shape: Shape, hot_share: float, hot: int, seed: int) -> Tensor:
    """int64 [T, K]: `hot_share` of all choices fall on experts 0..hot-1 (each token takes an expert once at most), the
    rest evenly on all others."""
    g = torch.Generator("cuda").manual_seed(seed)
    tokens, choices = shape.tokens, shape.choices
    t = torch.arange(tokens, device="cuda")
    wanted = hot_share * choices
    number = (torch.floor((t + 1) * wanted) - torch.floor(t * wanted)).long()  # hot choices of every token
    k = torch.arange(choices, device="cuda")
    start = torch.randint(0, hot, (tokens, 1), device="cuda", generator=g)
    hot_ids = (start + k) % hot
    others = shape.experts - hot
    first = torch.randint(0, others, (tokens, 1), device="cuda", generator=g)
    step = torch.randint(0, others // choices, (tokens, 1), device="cuda", generator=g) + 1
    cold_ids = hot + (first + k * step) % others
    return torch.where(k < number.unsqueeze(1), hot_ids, cold_ids)


def even_ids(shape: Shape) -> Tensor:
    """int64 [T, K]: every expert gets as many tokens as any other."""
    pair = torch.arange(shape.tokens * shape.choices, device="cuda")
    stride = shape.experts // shape.choices
    return (pair % shape.choices * stride + pair // shape.choices % stride).view(shape.tokens, -1)


def everywhere_equal(*tensors: Tensor) -> bool:
    """Does every rank hold the same bytes?"""
    mine = hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    all_of: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_of, mine)
    return len(set(all_of)) == 1


def agree(values: list[float]) -> list[float]:
    """The slowest rank's time of every repetition."""
    all_of: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_of, values)
    return [max(column) for column in zip(*all_of, strict=True)]


def check(layer: Layer, hidden: Tensor, weight: Tensor, ids: Tensor, with_backward: bool) -> float:
    """Raises unless the promises hold; imbalance before."""
    counts, slot_expert, shares = layer.plan(ids, "quota")
    assert everywhere_equal(counts, slot_expert, shares), "ranks made different plans"
    out = {}
    for planner in ("quota", "none"):
        leaf = hidden.detach().clone().requires_grad_(with_backward)
        y = layer(leaf, weight, ids, planner)
        grads = torch.autograd.grad(y, [leaf, *layer.params], torch.ones_like(y)) if with_backward else []
        out[planner] = (y.detach(), *grads)
        del y, grads
    assert torch.equal(out["quota"][0], out["none"][0]), "balancing changed the output"
    if with_backward:
        assert torch.equal(out["quota"][1], out["none"][1]), "balancing changed the gradient of the tokens"
        for a, b in zip(out["quota"][2:], out["none"][2:], strict=True):
            assert float((a.float() - b.float()).norm()) <= 4e-3 * float(b.float().norm()), "weight gradients differ"
    for t in range(0, hidden.shape[0], max(1, hidden.shape[0] // 8)):
        exact = torch.zeros(layer.shape.hidden, device="cuda")
        for k, expert in enumerate(ids[t].tolist()):
            up, down = (w.float() for w in weights_of(expert, layer.shape, hidden.dtype))
            gate, value = (up @ hidden[t].float()).chunk(2)
            exact += weight[t, k].float() * (down @ (nn.functional.silu(gate) * value))
        error = float((out["quota"][0][t].float() - exact).norm() / exact.norm())
        assert error < 2e-2, f"token {t}: error {error}"
    return max_over_mean(loads_before(counts))


def timed(layer: Layer, hidden: Tensor, weight: Tensor, ids: Tensor, planner: str, backward: bool, repetitions: int) -> dict:
    leaf = hidden.detach().clone().requires_grad_(backward)
    grad = torch.ones_like(hidden)

    def run() -> None:
        if not backward:
            with torch.no_grad():
                layer(leaf, weight, ids, planner)
            return
        y = layer(leaf, weight, ids, planner)
        torch.autograd.grad(y, [leaf, *layer.params], grad)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = agree([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
    low, middle, high = statistics.quantiles(times, n=4)
    pools = plane.reserved_bytes()
    return {
        "ms": middle,
        "spread": (high - low) / 2 / middle,
        "peak_bytes": torch.cuda.max_memory_allocated() + pools,
    }


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(dist.get_rank())
    hidden = torch.randn(shape.tokens, shape.hidden, device="cuda", generator=g).bfloat16()
    weight = torch.rand(shape.tokens, shape.choices, device="cuda", generator=g).softmax(-1).bfloat16()
    return hidden, weight


def imbalance_case(shape: Shape, levels: list[float], repetitions: int) -> dict:
    """ideal, none and ours, forward and forward + backward, at several imbalances."""
    layer, (hidden, weight) = Layer(shape, torch.bfloat16), inputs(shape)
    ranks = dist.get_world_size()
    even = even_ids(shape)
    check(layer, hidden, weight, even, True)
    table: dict = {"shape": str(shape)}
    for backward in (False, True):
        kind = "forward + backward" if backward else "forward"
        ideal = table[f"ideal, {kind}"] = timed(layer, hidden, weight, even, "none", backward, repetitions)
        say(f"  ideal, {kind}: {ideal['ms']:.2f} ms (spread {ideal['spread']:.1%}), peak {ideal['peak_bytes'] / 2**30:.1f} GiB")
    for level in (x for x in levels if x <= ranks):
        hot = shape.choices if level > 1 else shape.experts
        share = (level - 1) / (ranks - 1) if ranks > 1 else 0.0
        ids = skewed_ids(shape, share, hot, 7 + dist.get_rank()) if level > 1 else even
        before = check(layer, hidden, weight, ids, True)
        for backward in (False, True):
            kind = "forward + backward" if backward else "forward"
            ideal = table[f"ideal, {kind}"]["ms"]
            row = {p: timed(layer, hidden, weight, ids, p, backward, repetitions) for p in ("none", "quota")}
            ours = row["quota"]["ms"]
            table[f"imbalance {level}, {kind}"] = {
                **row,
                "imbalance": before,
                "share_of_ideal": ideal / ours,
                "exposed_ms": ours - ideal,
            }
            say(
                f"  imbalance {before:.2f}, {kind}: none {row['none']['ms']:.2f} ms, ours {ours:.2f} ms "
                f"(spread {row['quota']['spread']:.1%}), {ideal / ours:.1%} of ideal, exposed {ours - ideal:.2f} ms"
            )
    return table


def llep_case(shape: Shape, repetitions: int) -> dict:
    layer, (hidden, weight) = Layer(shape, torch.bfloat16), inputs(shape)
    table: dict = {"shape": str(shape)}
    even = even_ids(shape)
    check(layer, hidden, weight, even, False)
    table["ideal"] = timed(layer, hidden, weight, even, "none", False, repetitions)
    say(f"  ideal: {table['ideal']['ms']:.2f} ms")
    for share, theirs in LLEP_MS.items():
        ids = skewed_ids(shape, share, 4, 7 + dist.get_rank())
        before = check(layer, hidden, weight, ids, False)
        row = {p: timed(layer, hidden, weight, ids, p, False, repetitions) for p in ("none", "quota")}
        table[f"{share:.0%} on 4 experts"] = {**row, "imbalance": before, "llep_ms": theirs}
        ours = row["quota"]
        say(
            f"  {share:.0%} on 4 experts (imbalance {before:.2f}): none {row['none']['ms']:.2f} ms, ours {ours['ms']:.2f} ms "
            f"(spread {ours['spread']:.1%}), LLEP's published {theirs} ms; peak {ours['peak_bytes'] / 2**30:.1f} GiB"
        )
    return table


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=["imbalance", "llep"], default=["imbalance", "llep"])
    parser.add_argument("--levels", nargs="+", type=float, default=[1, 1.5, 2, 4])
    parser.add_argument("--tokens", type=int, help="tokens a rank, instead of the case's own")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on GPU 0, over gloo")
    parser.add_argument("--transport", default="symmetric", choices=["symmetric", "collective"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.cuda.set_device(0 if args.share_gpu else int(os.environ["LOCAL_RANK"]))
    if args.share_gpu:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group("gloo" if args.share_gpu else "cpu:gloo,cuda:nccl")
    choose_transport(everyone().group_name, args.transport)
    record: dict = {
        "device": torch.cuda.get_device_name(),
        "ranks": dist.get_world_size(),
        "transport": args.transport,
        "one_gpu_shared": args.share_gpu,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "repetitions": args.repetitions,
    }
    say(str(record))
    for case in args.case:
        shape = QWEN if case == "imbalance" else LLEP
        if args.tokens:
            shape = Shape(args.tokens, shape.hidden, shape.width, shape.experts, shape.choices, shape.slots)
        say(f"{case}: {shape}")
        if case == "imbalance":
            record[case] = imbalance_case(shape, args.levels, args.repetitions)
        else:
            record[case] = llep_case(shape, args.repetitions)
        plane.close_planes()
        torch.cuda.empty_cache()
    if args.json and dist.get_rank() == 0:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
