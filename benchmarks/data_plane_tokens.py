"""Reroute, dispatch and combine: first exact, then timed.

    python -m benchmarks.data_plane_tokens [--json RESULTS.json]            one GPU, virtual ranks
    torchrun --nproc-per-node 4 -m benchmarks.data_plane_tokens [...]       real ranks, NCCL beside
    python -m benchmarks.data_plane_tokens --read RESULTS.json --plot F.png  bandwidth against programs, of a record

On one GPU rank 0 of R virtual ranks sends and receives, and all buffers lie in the same memory: what one rank of R would
move through its links moves through the device's memory. Bandwidth counts minimal traffic (every row read once and
written once; a token's row is read once for all its choices), as a share of a plain copy's in the same run. Beside it
stands what a collective needs: index_select, the exchange (here a copy), index_select, for dispatch and for combine.
Under torchrun each rank sends to all over symmetric memory and waits for all, and `all_to_all_single` of NCCL takes the
exchange's place; `links` counts the bytes that leave a rank.
Times of reroute are of 16 chained in one CUDA graph, so that launching the graph does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from benchmarks.planner_gpu import microseconds
from ultraep_compile.codegen import dispatch_reference as reference
from ultraep_compile.codegen.dispatch import (
    addresses,
    pack_rows,
    pull_rows,
    pull_sum,
    push_rows,
    spread_rows,
    unpack_rows,
)
from ultraep_compile.codegen.handshake import arrive, await_all
from ultraep_compile.codegen.reroute import reroute_and_place, reroute_and_place_reference, rerouting_stages
from ultraep_compile.codegen.wire import packed_bytes
from ultraep_compile.ops.dispatch import buffer_rows
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.planner import make_plan
from ultraep_compile.symmetric import Region, counters, open_pool

TOKENS, CHOICES, WIDTH, REPEATS = 8192, 8, 4096, 7
PROGRAMS = [8, 16, 32, 64, 132, 264, 528]


def milliseconds(function: Callable[[], object], calls: int = 5) -> tuple[float, float]:
    """Median over repetitions of one call among several in a row, and the spread (largest - smallest)."""
    for _ in range(2):
        function()
    samples = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / calls)
    return statistics.median(samples), max(samples) - min(samples)


def choose(experts: int, seed: int) -> Tensor:
    """int64 [T, K] top-k of noise over experts of log-normal heat."""
    heat = torch.randn(experts, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(TOKENS, experts, generator=torch.Generator().manual_seed(seed)).log().neg().log().neg()
    return (noise + heat).topk(CHOICES)[1]


def planned(ranks: int, experts: int, slots: int) -> tuple[list[Tensor], Tensor, Tensor, ExpertLayout]:
    ids = [choose(experts, 1 + r) for r in range(ranks)]
    counts = torch.stack([torch.bincount(i.flatten(), minlength=experts) for i in ids]).int()
    slots = slots if ranks > 1 else 0
    plan = make_plan(counts, slots)
    return ids, plan.slot_expert_RS.cuda(), plan.shares_RP.cuda(), ExpertLayout(experts, ranks, slots)


def check_exact(routing, right) -> None:
    for a, b in zip((*routing[:3], *routing.window), (*right[:3], *right.window), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def reroute_times() -> dict:
    table = {}
    for experts in (128, 256):
        ids, slot_expert, shares, layout = planned(64, experts, 2)
        on_device = ids[0].cuda()
        for once in (False, True):
            arguments = (on_device, slot_expert, shares, layout, 0)
            routing, stages = rerouting_stages(*arguments, distinct=True, once_per_rank=once)
            for launch in stages.values():
                launch()
            check_exact(routing, reroute_and_place_reference(*arguments, distinct=True, once_per_rank=once))
            name = f"{experts} experts{', once per destination' if once else ''}"
            call = lambda stages=stages: [launch() for launch in stages.values()]  # noqa: E731
            table[name] = {"reroute": microseconds(call), "copies": int((slot_expert >= 0).sum())}
            table[name] |= {stage: microseconds(launch) for stage, launch in stages.items()}
            print(f"reroute, {name}:", {k: round(v, 2) for k, v in table[name].items()})
    return table


class Exchange:
    """Buffers of all ranks, the routing of this one, and the calls to be timed."""

    def __init__(self, ranks: int, rank: int, group: dist.ProcessGroup | None) -> None:
        ids, slot_expert, shares, self.layout = planned(ranks, 64, 2)
        self.rank, device = rank, torch.device("cuda")
        if group is None:  # rank 0 alone sends, and the buffers are as large as if all did
            self.rows = buffer_rows(int(shares.sum(0).view(ranks, -1).sum(1).max()), self.layout, 1)
            shares = torch.cat([shares[:1], 0 * shares[1:]])
        self.shares = shares
        self.rows = buffer_rows(int(shares.sum(0).view(ranks, -1).sum(1).max()), self.layout, 1)
        self.routing = reroute_and_place(
            ids[rank].cuda(), slot_expert, shares, self.layout, rank, distinct=True, once_per_rank=True
        )
        self.x = torch.randn(TOKENS, WIDTH, device=device).bfloat16()
        self.out = self.x.new_empty(TOKENS * CHOICES, WIDTH)
        self.sum = torch.empty_like(self.x)
        self.weights = torch.rand(TOKENS, CHOICES, device=device)
        regions = {
            "rows": Region((self.rows, WIDTH), torch.bfloat16),
            "packed": Region((self.rows, packed_bytes(WIDTH)), torch.uint8),
            "references": Region((self.rows,), torch.int32),
            "arrived": counters(ranks),
        }
        if group is None:
            self.pool = None
            make = lambda r: [torch.zeros(r.shape, dtype=r.dtype, device=device) for _ in range(ranks)]  # noqa: E731
            self.buffers = {name: make(r) for name, r in regions.items() if name != "arrived"}
            self.tables = {name: addresses(b, device) for name, b in self.buffers.items()}
            self.own = {name: b[0] for name, b in self.buffers.items()}
        else:
            self.pool = open_pool(regions, group, device)
            self.tables = {name: self.pool.addresses(name) for name in regions}
            self.own = {name: self.pool.region(name) for name in regions}
        self.where = (self.rows, self.layout)

    def handshake(self) -> None:
        if self.pool is not None:
            arrive(self.pool, "arrived")
            await_all(self.pool, "arrived", "dispatched rows have arrived")

    def push(self, programs: int | None = None) -> None:
        push_rows(self.x, self.routing, self.tables["rows"], *self.where, programs=programs)
        self.handshake()

    def push_once(self) -> None:
        push_rows(self.x, self.routing, self.tables["rows"], *self.where, references=self.tables["references"])
        self.handshake()

    def pull(self, programs: int | None = None) -> None:
        pull_rows(self.out, self.routing, self.tables["rows"], *self.where, programs=programs)
        self.handshake()

    def pull_sum(self) -> None:
        pull_sum(self.sum, self.routing, self.tables["rows"], *self.where, self.weights)
        self.handshake()

    def push_packed(self) -> None:
        push_rows(pack_rows(self.x), self.routing, self.tables["packed"], *self.where)
        self.handshake()

    def pull_packed(self) -> None:
        pull_rows(self.out, self.routing, self.tables["packed"], *self.where, packed=True)
        self.handshake()

    def check(self) -> dict[str, float]:
        """Rows at their places, the way back, sums, both wire formats; the fp8 error."""
        self.own["rows"].fill_(float("nan"))
        self.handshake()
        self.push()
        pairs = self.x.repeat_interleave(CHOICES, 0)
        if self.pool is None:
            _, rank, row = reference.places(self.routing, self.routing.window, self.layout)
            for r, buffer in enumerate(self.buffers["rows"]):
                assert torch.equal(buffer[row[rank == r]], pairs[rank == r])
        used = int(self.routing.window.offsets[-1])
        assert bool(self.own["rows"][:used].isfinite().all())
        self.pull()
        assert torch.equal(self.out, pairs)
        self.pull_sum()
        right = torch.zeros_like(self.x, dtype=torch.float32)
        for k in range(CHOICES):
            right += self.x.float() * self.weights[:, k : k + 1]
        assert torch.equal(self.sum, right.bfloat16())
        before = self.own["rows"].clone()
        self.own["rows"].fill_(float("nan"))
        self.handshake()
        self.push_once()
        spread_rows(self.own["rows"], self.own["references"], self.routing.window)
        assert torch.equal(self.own["rows"][:used], before[:used])
        self.handshake()
        self.push_packed()
        self.pull_packed()
        error = (self.out.float() - pairs.float()).norm() / pairs.float().norm()
        assert float(error) < 0.04
        return {"fp8 relative error (rms)": float(error)}


def selections(exchange: Exchange, exchange_rows: Callable[[Tensor, bool], Tensor]) -> Callable[[], Tensor]:
    """Dispatch and combine with index_select before and after an exchange of contiguous rows; indices are ready."""
    physical = exchange.routing.physical_TK.flatten()
    order = torch.argsort(physical, stable=True)  # by destination, then expert
    back = torch.argsort(order)
    token = order // CHOICES
    arrived = int(
        exchange.shares.view(-1, exchange.layout.ranks, exchange.layout.physical_per_rank)[:, exchange.rank].sum()
    )
    if exchange.pool is None:
        arrived = TOKENS * CHOICES
    sort = torch.randperm(arrived, device=physical.device)
    unsort = torch.argsort(sort)

    def run() -> Tensor:
        there = exchange_rows(exchange.x.index_select(0, token), False).index_select(0, sort)
        return exchange_rows(there.index_select(0, unsort), True).index_select(0, back)

    assert torch.equal(run(), exchange.x.repeat_interleave(CHOICES, 0))
    return run


def beside_a_product(move: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of an 8192^3 bf16 product alone, of the moves alone, and of both at once on two streams."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    c, side = torch.empty_like(a), torch.cuda.Stream()

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            move()
        torch.mm(a, b, out=c)
        torch.cuda.current_stream().wait_stream(side)

    return {
        "product": milliseconds(lambda: torch.mm(a, b, out=c), 2)[0],
        "move": milliseconds(move, 2)[0],
        "both": milliseconds(both, 2)[0],
    }


def moves(exchange: Exchange, group: dist.ProcessGroup | None) -> dict:
    record: dict = exchange.check()
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source))[0] / 1e6
    record["device copy, GB/s"] = copy
    pairs, row = TOKENS * CHOICES, WIDTH * 2
    traffic = {"dispatch": (TOKENS + pairs) * row, "combine": 2 * pairs * row}
    sent = exchange.shares[exchange.rank].view(exchange.layout.ranks, -1).sum(1)
    away = int(sent.sum() - sent[exchange.rank]) * row
    record |= {"minimal bytes": traffic, "bytes to other ranks": away, "by programs": {}}
    calls = {"dispatch": exchange.push, "combine": exchange.pull}
    for programs in [*PROGRAMS, None]:
        line = {}
        for name, call in calls.items():
            time, spread = milliseconds(lambda call=call, programs=programs: call(programs))
            line[name] = {"ms": time, "spread": spread, "GB/s": traffic[name] / time / 1e6}
            if group is not None:
                line[name]["links, GB/s"] = away / time / 1e6
        record["by programs"][str(programs or "default")] = line
        print(
            f"{programs or 'default'} programs:", {k: {n: round(x, 3) for n, x in v.items()} for k, v in line.items()}
        )
    both = record["by programs"]["default"]
    total = sum(v["ms"] for v in both.values())
    record["dispatch + combine"] = {"ms": total, "share of copy": sum(traffic.values()) / total / 1e6 / copy}
    record["variants, ms"] = {
        name: milliseconds(call)
        for name, call in {
            "dispatch, once per destination": exchange.push_once,
            "combine and weighted sum": exchange.pull_sum,
            "pack and dispatch fp8": exchange.push_packed,
            "combine fp8": exchange.pull_packed,
            "unpack own buffer": lambda: unpack_rows(
                exchange.own["packed"], exchange.own["rows"], exchange.routing.window
            ),
            "spread own buffer": lambda: spread_rows(
                exchange.own["rows"], exchange.own["references"], exchange.routing.window
            ),
        }.items()
    }
    lead = exchange.routing.lead_TK
    assert lead is not None
    carried = int((lead == torch.arange(CHOICES, device=lead.device)).sum())
    record["rows sent once per destination"] = {"carried": carried, "of": pairs}
    name = "index_select, copy, index_select, there and back"
    if group is not None:
        name = "index_select, NCCL all_to_all_single, index_select, there and back"
    run = selections(exchange, exchanger(exchange, group))
    record[name] = dict(zip(("ms", "spread"), milliseconds(run), strict=True))
    record[name]["ratio"] = record[name]["ms"] / total
    print(f"{name}: {record[name]['ms']:.3f} ms, {record[name]['ratio']:.2f} x dispatch + combine ({total:.3f} ms)")
    record["beside an 8192^3 product, ms"] = {
        f"{name}, {programs} programs": beside_a_product(lambda call=call, programs=programs: call(programs))
        for name, call in calls.items()
        for programs in (8, 16, 32, 132)
    }
    print(json.dumps(record["variants, ms"]), json.dumps(record["beside an 8192^3 product, ms"], indent=1))
    return record


def exchanger(exchange: Exchange, group: dist.ProcessGroup | None) -> Callable[[Tensor, bool], Tensor]:
    """The exchange of rows sorted by destination: a copy in one process, else all_to_all_single."""
    if group is None:
        return lambda rows, back: rows.clone()
    per_rank = exchange.shares.view(exchange.layout.ranks, exchange.layout.ranks, -1).sum(2).tolist()
    send, receive = per_rank[exchange.rank], [line[exchange.rank] for line in per_rank]

    def exchange_rows(rows: Tensor, back: bool) -> Tensor:
        give, take = (receive, send) if back else (send, receive)
        out = rows.new_empty(sum(take), *rows.shape[1:])
        dist.all_to_all_single(out, rows, take, give, group=group)
        return out

    return exchange_rows


def plot(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {int(n): line for n, line in record["by programs"].items() if n.isdigit()}
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in ("dispatch", "combine"):
        axes.plot(list(lines), [line[name]["GB/s"] for line in lines.values()], marker="o", label=name)
    axes.axhline(record["device copy, GB/s"], color="grey", linestyle="--", label="copy of the device")
    axes.set(xscale="log", xlabel="programs", ylabel="GB/s, rows read and written once", title=record["device"])
    axes.set_xticks(list(lines), [str(n) for n in lines])
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, default=8, help="virtual ranks on one GPU")
    parser.add_argument("--read", type=Path, help="a record to draw, instead of measuring")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.read:
        return plot(json.loads(args.read.read_text()), args.plot)
    group, rank, ranks = None, 0, args.ranks
    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    record = {
        "command": "python -m benchmarks.data_plane_tokens" if group is None else f"torchrun --nproc-per-node {ranks} -m benchmarks.data_plane_tokens",
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "ranks": f"{ranks} virtual, rank 0 sends" if group is None else f"{ranks}, one a GPU",
        "shape": {"tokens": TOKENS, "choices": CHOICES, "width": WIDTH, "dtype": "bf16", "experts": 64, "slots": 2 if ranks > 1 else 0},
        "method": f"median of {REPEATS} repetitions of 5 calls; reroute: of 16 chained in a CUDA graph, microseconds",
    }  # fmt: skip
    if rank:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    print(record["device"], record["versions"], record["ranks"])
    if group is None:
        record["reroute, 64 ranks, us"] = reroute_times()
    record |= moves(Exchange(ranks, rank, group), group)
    if args.json and rank == 0:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot and rank == 0:
        plot(record, args.plot)
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
