"""Whole steps of a pipeline on processes: measured against the simulator, method against method, memory against M.

    torchrun --nproc-per-node 2 -m benchmarks.pipeline_steps --json F                 # CPU, one thread a process
    torchrun --nproc-per-node 4 -m benchmarks.pipeline_steps --device cuda --json F   # one GPU a process, NCCL

The model is a vision-language transformer made of plain torch: an image encoder that every rank holds, and decoder layers
cut into stages. First each method's loss and gradients are compared with one process that runs the same microbatches; then
steps are timed, each operation by itself (host clock, or device events); then activation bytes are counted as autograd saves
them. The prediction is the simulator's, fed with the mean time of each kind of operation in profiled steps, which take turns
with the timed ones."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultraep_compile.executor.costs import make_problem, measured_rates
from ultraep_compile.executor.holdings import names_of
from ultraep_compile.executor.memory import Meter
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings
from ultraep_compile.executor.timeline import work_of
from ultraep_compile.executor.units import EncoderUnit
from ultraep_compile.multimodal.parts import Encoder, Microbatch, Parts, Stage
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.simulate import simulate

METHODS = ("nested", "colocated", "encoder-first", "flush", "recompute")
PATCH, WORDS, IMAGE = 48, 512, 1


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = max(1, width // 64), causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Vision(nn.Module):
    """Patches [n, PATCH] to features [n, width of the LLM]."""

    def __init__(self, width: int, layers: int, out: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH, width)
        self.blocks = nn.Sequential(*(Block(width, False) for _ in range(layers)))
        self.projector = nn.Linear(width, out)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.projector(self.blocks(self.patch(pixels[None])))[0],)


class Decoder(nn.Module):
    """One stage: some layers, with the embedding before or the head and the loss behind."""

    def __init__(self, width: int, layers: int, first: bool, last: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width) if first else None
        self.blocks = nn.Sequential(*(Block(width, True) for _ in range(layers)))
        self.head = nn.Linear(width, WORDS) if last else None

    def forward(
        self, hidden: tuple[Any, ...], inputs: dict[str, Any], features: dict[str, tuple[Tensor, ...]]
    ) -> tuple:
        if self.embedding is None:
            (x,) = hidden
        else:
            x = self.embedding(inputs["ids"])
            if "vision" in features:
                x = x.masked_scatter((inputs["ids"] == IMAGE)[..., None], features["vision"][0].to(x.dtype))
        x = self.blocks(x)
        if self.head is None:
            return (x,)
        logits = self.head(x).float()
        return (nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100),)


class Made(Parts):
    """Parts that are cut already."""

    def __init__(self, encoders: list[Encoder], stages: list[Stage]) -> None:
        self.encoders, self.stages, self.generators, self.states = encoders, stages, [], 0

    def microbatches(self, batch: Mapping[str, Any], count: int) -> list[Microbatch]:
        return list(batch["microbatches"][:count])


def make_parts(args: argparse.Namespace, ranks: int, device: torch.device) -> Made:
    """The same weights on every rank."""
    torch.manual_seed(0)
    with device:
        vision = Vision(args.encoder_width, args.encoder_layers, args.width)
        stages = [Decoder(args.width, args.layers // ranks, s == 0, s == ranks - 1) for s in range(ranks)]
    encoders = [Encoder("vision", vision.to(args.dtype), (0,))]
    return Made(encoders, [Stage(i, stage.to(args.dtype)) for i, stage in enumerate(stages)])


def make_batch(args: argparse.Namespace, count: int, ragged: bool) -> list[Microbatch]:
    """One sample a microbatch. Ragged: images of 1/4 to 7/4 of the mean number of patches, in one to four pieces."""
    g = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count):
        patches = [args.patches]
        if ragged:
            total = max(4, int(args.patches * (0.25 + 1.5 * float(torch.rand((), generator=g)))))
            pieces = int(torch.randint(1, 5, (), generator=g))
            patches = [total // pieces] * pieces
        ids = torch.randint(2, WORDS, (1, args.tokens), generator=g)
        ids[0, : min(sum(patches), args.tokens - 8)] = IMAGE
        patches[-1] -= max(0, sum(patches) - (args.tokens - 8))
        labels = torch.where(ids == IMAGE, -100, ids)
        items = {"vision": [{"pixels": torch.randn(n, PATCH, generator=g).to(args.dtype)} for n in patches]}
        made.append(Microbatch({"ids": ids, "labels": labels}, items, 0.0))
    tokens = [int((mb.inputs["labels"] >= 0).sum()) for mb in made]
    return [replace(mb, weight=n / sum(tokens)) for mb, n in zip(made, tokens, strict=True)]


def one_process(parts: Made, batch: list[Microbatch], device: torch.device) -> float:
    """Loss of the batch without a pipeline; gradients stay in the parts."""
    total = 0.0
    for mb in batch:
        features = {}
        if mb.items["vision"]:
            features["vision"] = (
                torch.cat([parts.encoders[0].module(i["pixels"].to(device))[0] for i in mb.items["vision"]]),
            )
        hidden: tuple[Any, ...] = ()
        for stage in parts.stages:
            hidden = stage.module(hidden, {k: v.to(device) for k, v in mb.inputs.items()}, features)
        (hidden[0] * mb.weight).backward()
        total += float(hidden[0].detach()) * mb.weight
    return total


def difference(pipe: Pipeline, single: Made, batch: list[Microbatch]) -> float:
    """Largest relative difference of loss and gradients, over all ranks."""
    pipe.zero_grad()
    result = float(pipe.step({"microbatches": batch}))
    expected = one_process(single, batch, pipe.device)
    worst = abs(result - expected) / abs(expected)
    grads = names_of(None, single)
    for name, p in pipe.named_parameters():
        grad = grads[name].grad
        assert grad is not None and p.grad is not None
        worst = max(worst, float((p.grad.float() - grad.float()).norm() / grad.float().norm()))
    for part in (*single.encoders, *single.stages):
        part.module.zero_grad()
    pipe.zero_grad()
    return most(worst, pipe)


def most(value: float, pipe: Pipeline) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, pipe.control)
    return float(tensor)


def in_order(pipe: Pipeline) -> bool:
    """Whether every operation ran in its turn of the plan and after the operations whose output it needs. Clocks of GPUs are
    compared to a millisecond."""
    timeline = pipe.timeline
    assert timeline is not None
    graph = Graph(timeline.schedule.problem, timeline.schedule.ranks)
    start = [x for row in timeline.start for x in row]
    end = [x for row in timeline.end for x in row]
    slack = 1e-3 if pipe.device.type == "cuda" else 1e-4
    turns = all(a <= b for row in timeline.start for a, b in pairwise(row))
    mine = [op for op, _, _ in pipe.clock.marks] == list(timeline.schedule.ranks[pipe.rank])
    return turns and mine and all(end[p] <= start[i] + slack for i, need in enumerate(graph.preds) for p in need)


def timed(pipe: Pipeline, batch: list[Microbatch], repetitions: int) -> dict[str, Any]:
    """Times of steps: the operations' (makespan) and all (with the sums of gradients), measured and predicted."""
    makespans, walls, order = [], [], True
    tables = []
    for turn in range(1 + 2 * repetitions):  # profiled and timed in turns: a machine's speed drifts
        pipe.zero_grad()
        dist.barrier(pipe.control)
        began = time.perf_counter()
        pipe.step({"microbatches": batch})
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        wall = most(time.perf_counter() - began, pipe)
        assert pipe.timeline is not None
        order = order and in_order(pipe)
        if turn % 2:
            tables.append(work_of(pipe.timeline, pipe.parts, batch))
        elif turn:
            makespans.append(pipe.timeline.makespan)
            walls.append(wall)
    assert pipe.timeline is not None
    rates = measured_rates(pipe.rates, [sum(column) for column in zip(*tables, strict=True)])
    schedule = pipe.timeline.schedule
    fresh = make_problem(pipe.parts, batch, rates, pipe.stage_rank, False)
    encoders = tuple(
        replace(e, recompute=was.recompute) for e, was in zip(fresh.encoders, schedule.problem.encoders, strict=True)
    )
    predicted = simulate(replace(schedule, problem=replace(fresh, encoders=encoders)))
    median = statistics.median(makespans)
    return {
        "makespan": median,
        "spread": [min(makespans), max(makespans)],
        "step": statistics.median(walls),
        "predicted": predicted.makespan,
        "measured_over_predicted": median / predicted.makespan,
        "bubble_predicted": predicted.bubble,
        "order_as_planned": order,
        "note": schedule.note,
    }


def memory(parts: Made, mesh: DeviceMesh, method: str, batch: list[Microbatch]) -> dict[str, Any]:
    """Most activation bytes that a rank holds: of encoder and LLM, each over the ranks."""
    pipe = Pipeline(None, parts, mesh, Settings(len(batch), method, measure_memory=True))
    peak = pipe.step({"microbatches": batch}).peak_bytes
    pipe.zero_grad()
    table = torch.tensor([[peak["encoder"], peak["llm"]]])
    rows = [torch.empty_like(table) for _ in range(pipe.ranks)]
    dist.all_gather(rows, table, group=pipe.control)
    every = torch.cat(rows).tolist()
    return {"encoder": [row[0] for row in every], "llm": [row[1] for row in every]}


def one_microbatch(parts: Made, batch: list[Microbatch], device: torch.device) -> int:
    """Activation bytes of one microbatch in the encoder."""
    meter = Meter(True, {p.untyped_storage().data_ptr() for p in parts.encoders[0].module.parameters()})
    unit = EncoderUnit("vision", parts.encoders[0].module, device, meter)
    unit.forward({(0, i): item for i, item in enumerate(batch[0].items["vision"])}, False)
    return meter.peak["encoder"]


def run(args: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> dict[str, Any]:
    ranks = mesh.size()
    m = args.microbatches or 4 * ranks
    rows = []
    for ragged in (False, True):
        batch = make_batch(args, m, ragged)
        for method in METHODS:
            parts = make_parts(args, ranks, device)
            single = copy.deepcopy(parts)
            pipe = Pipeline(None, parts, mesh, Settings(m, method, costs="measured", trace=True))
            worst = difference(pipe, single, batch)
            del single
            assert worst < args.tolerance, f"{method}: {worst}"
            row = {"method": method, "ragged": ragged, "microbatches": m, "difference": worst}
            row |= timed(pipe, batch, args.repetitions)
            row["bytes"] = memory(parts, mesh, method, batch)
            rows.append(row)
            if dist.get_rank() == 0:
                show(row)
    parts = make_parts(args, ranks, device)
    flat = []
    for method in ("nested", "colocated", "encoder-first"):
        for count in (ranks, 2 * ranks, 4 * ranks, 8 * ranks):
            entry = {
                "method": method,
                "microbatches": count,
                **memory(parts, mesh, method, make_batch(args, count, False)),
            }
            flat.append(entry)
            if dist.get_rank() == 0:
                print(
                    f"{method:14} M={count:3}  encoder {max(entry['encoder']):>12,} B  LLM {max(entry['llm']):>12,} B",
                    flush=True,
                )
    single_bytes = one_microbatch(parts, make_batch(args, 1, False), device)
    return {"steps": rows, "memory": flat, "encoder_bytes_of_one_microbatch": single_bytes}


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['method']:14} {'ragged' if row['ragged'] else 'even':7} step {row['step'] * 1e3:8.1f} ms  operations"
        f" {row['makespan'] * 1e3:8.1f} ms ({row['spread'][0] * 1e3:.1f} to {row['spread'][1] * 1e3:.1f})  predicted"
        f" {row['predicted'] * 1e3:8.1f} ms, ratio {row['measured_over_predicted']:.3f}  encoder"
        f" {max(row['bytes']['encoder']):>12,} B  LLM {max(row['bytes']['llm']):>12,} B  difference {row['difference']:.1e}"
        f"  order {'as planned' if row['order_as_planned'] else 'WRONG'}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--microbatches", type=int, default=0, help="4 for each rank, if not given")
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int, help="of the LLM, all stages together")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--encoder-width", type=int)
    parser.add_argument("--encoder-layers", type=int)
    parser.add_argument("--patches", type=int)
    args = parser.parse_args()
    small = {"width": 256, "layers": 4, "tokens": 256, "encoder_width": 192, "encoder_layers": 3, "patches": 192}
    large = {"width": 2048, "layers": 16, "tokens": 4096, "encoder_width": 1280, "encoder_layers": 12, "patches": 3072}
    for name, value in (small if args.device == "cpu" else large).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    args.tolerance = 1e-5 if args.device == "cpu" else 3e-2
    return args


def main() -> None:
    args = parse()
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("pp",))
        result = run(args, mesh, device)
        if dist.get_rank() == 0 and args.json:
            name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
            settings = {k: str(v) for k, v in vars(args).items() if k != "json"}
            head = {"processes": mesh.size(), "device": name, "torch": torch.__version__, "settings": settings}
            args.json.write_text(json.dumps(head | result, indent=1) + "\n")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
