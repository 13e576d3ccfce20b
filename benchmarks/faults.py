"""Faults at random: a random rank, moment and kind, over 2 and 3 processes and every way to exchange on CPUs.

    python -m benchmarks.faults [--faults 200] [--seed 0] [--out FILE.json]

Every group of processes trains a small model: after each fault the survivors must have ended in time with an error that names
the rank; weights must be as they were, and a good step must follow where all ranks are still there. A fault that ends a
process ends its group. What processes, descriptors, threads and files in shared memory are left is counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.executor import toys
from tests.multirank import start_processes
from ultraep_compile import clip_grad_norm_, shard_experts
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.exchange import failing
from ultraep_compile.exchange.distributed_tensors import whole
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings

JOBS = ("collective", "symmetric", "pipeline")
MOMENTS = ("forward", "backward", "optimizer", "save", "between")
CAUGHT = ("hook", "loader", "ctrl-c", "memory")  # raised inside `failing`, so that the processes go on
LEFT_OUT = ("alone", "skip")  # a rank evaluates alone, or leaves a step out
LAST = ("kill", "stop", "uncaught", "exit")  # the process is no more
RAISED = {"hook": RuntimeError, "loader": OSError, "ctrl-c": KeyboardInterrupt, "memory": MemoryError,
          "uncaught": RuntimeError}  # fmt: skip
DEADLINE_S, SLACK_S, TOLD_S = 3, 5.0, 2.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to which rank, and when."""

    rank: int
    moment: str
    kind: str


@dataclass(slots=True)
class Group:
    """The processes of one job and their faults, in order; the last one ends a process."""

    job: str
    ranks: int
    faults: list[Fault]


@dataclass(slots=True)
class Seen:
    """What one rank saw of one fault."""

    error: str = ""
    seconds: float = 0.0  # until the error
    weights_kept: bool = True
    held: tuple[int, int, int] = (
        0,
        0,
        0,
    )  # descriptors, threads, files in shared memory after the good step that followed


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(6, 8, 12) / 3), nn.Parameter(torch.randn(6, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        h = torch.einsum("td,tkdf->tkf", x, self.up[ids]).relu()
        return x + (torch.einsum("tkf,tkfd->tkd", h, self.down[ids]) * w[..., None]).sum(1)


class _ExpertJob:
    """Two balanced layers, compiled one by one, with a moment between them."""

    def __init__(self, rank: int, ranks: int, transport: str) -> None:
        torch.manual_seed(0)
        self.layers = nn.ModuleList([_Experts(), _Experts()])
        shard_experts(self.layers, init_device_mesh("cpu", (ranks,)), None)
        options = {"inner": "eager", "redundant_experts": 1, "transport": transport, "deadline_s": 60}
        for layer in self.layers:
            layer.compile(backend="ultraep", options=options)
        self.x = torch.randn(24, 8)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.layers.parameters())

    def shorten(self) -> None:
        """The first step has compiled: from now on ranks wait as long as the deadline."""
        from ultraep_compile.ops import plane
        from ultraep_compile.ops.transport import choose_transport, deadline_of

        name = dist.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]
        assert deadline_of(name) == 60
        kind = "symmetric" if plane._boards else "collective"
        choose_transport(name, kind, DEADLINE_S)
        plane.close_planes()

    def forward(self, strike: Callable[[str], None]) -> Tensor:
        hidden = self.layers[0](self.x)
        strike("forward")
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: strike("backward"))
        return self.layers[1](hidden).square().mean()

    def step(self, strike: Callable[[str], None]) -> None:
        self.forward(strike).backward()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.forward(lambda moment: None)

    def save(self, strike: Callable[[str], None]) -> None:
        for n, p in enumerate(self.parameters()):
            if n == 1:
                strike("save")
            whole(p.detach(), "a checkpoint")


class _PipelineJob:
    """Stages by hand, an image encoder on every rank."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.parts = toys.parts(ranks, seed=1)
        self.settings, self.mesh = Settings(2 * ranks, deadline=60.0), init_device_mesh("cpu", (ranks,))
        self.pipe = Pipeline(None, self.parts, self.mesh, self.settings)
        self.batch = {"microbatches": toys.microbatches(2 * ranks, 0)}
        self.stage = self.parts.stages[rank].module
        self.strike: Callable[[str], None] = lambda moment: None
        self.stage.register_forward_pre_hook(lambda *_: self.strike("forward"))
        next(self.stage.parameters()).register_hook(lambda grad: self.strike("backward"))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.pipe.parameters())

    def shorten(self) -> None:
        self.pipe.settings = Settings(self.settings.microbatches, deadline=float(DEADLINE_S))

    def step(self, strike: Callable[[str], None]) -> None:
        self.strike = strike
        self.pipe.step(self.batch)

    def evaluate(self) -> None:
        self.strike = lambda moment: None
        with torch.no_grad():
            self.pipe.full_state_dict()  # a pipeline evaluates together; a rank may save alone

    def save(self, strike: Callable[[str], None]) -> None:
        strike("save")
        self.pipe.full_state_dict()


def _round(job: Any, strike: Callable[[str], None]) -> None:
    """One step of a training loop, up to where the weights would change."""
    strike("between")
    job.step(strike)
    strike("optimizer")
    clip_grad_norm_(job.parameters(), 1.0)
    job.save(strike)


def _striking(job: Any, fault: Fault, rank: int) -> Callable[[str], None]:
    """Called at every moment: does what the fault is, once, on its rank."""
    done: list[str] = []

    def strike(moment: str) -> None:
        if rank != fault.rank or moment != fault.moment or done:
            return
        done.append(moment)
        if fault.kind in RAISED:
            raise RAISED[fault.kind]("out of luck")
        if fault.kind == "alone":
            job.evaluate()
        elif fault.kind == "exit":
            os._exit(0)
        elif fault.kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)

    return strike


def _held() -> tuple[int, int, int]:
    """Descriptors, threads and files in shared memory, once what other threads are just closing is closed."""
    gc.collect()
    samples = []
    for _ in range(5):
        time.sleep(0.1)
        samples.append((len(os.listdir("/proc/self/fd")), threading.active_count(), _files()))
    return min(samples)


def _files() -> int:
    return sum(name.startswith("ultraep-pool-") for name in os.listdir("/dev/shm"))


def _local(p: Tensor) -> Tensor:
    return (p.to_local() if hasattr(p, "to_local") else p).detach().clone()  # pyright: ignore


def _train(rank: int, group: Group, folder: str) -> None:
    """One process of a group."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=group.ranks)
    job = _PipelineJob(rank, group.ranks) if group.job == "pipeline" else _ExpertJob(rank, group.ranks, group.job)
    _round(job, lambda moment: None)
    job.evaluate()  # compiles, too
    _round(job, lambda moment: None)
    job.shorten()
    _round(job, lambda moment: None)
    seen: list[Seen] = []
    for fault in group.faults:
        told, weights, began = Seen(), [_local(p) for p in job.parameters()], time.monotonic()
        strike = _striking(job, fault, rank)
        try:
            with failing() if fault.kind in CAUGHT else _open():
                _round(job, strike)
                if fault.kind == "skip" and rank != fault.rank:
                    _round(job, strike)  # the faulty rank thinks that it is over
        except BaseException as error:
            told.error = f"{type(error).__name__}: {error}"
            if fault.kind == "uncaught" and rank == fault.rank:
                sys.excepthook(type(error), error, None)
                os._exit(1)
        if fault.kind == "skip" and rank == fault.rank:
            time.sleep(DEADLINE_S + 1.0)
        told.seconds = time.monotonic() - began
        told.weights_kept = all(torch.equal(a, _local(p)) for a, p in zip(weights, job.parameters(), strict=True))
        if fault.kind not in LAST:
            if fault.kind in LEFT_OUT and rank == fault.rank and not told.error:
                _swallow(job)
            _round(job, lambda moment: None)
            told.held = _held()
        seen.append(told)
        Path(folder, f"seen.{rank}").write_text(json.dumps([asdict(s) for s in seen]))
    os._exit(0)


def _swallow(job: Any) -> None:
    """The rank that left something out hears at its next exchange that the others have failed."""
    try:
        _round(job, lambda moment: None)
    except PeerTimeoutError:
        pass


class _open:
    """No context."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def judged(group: Group, seen: Sequence[list[dict[str, Any]]]) -> list[tuple[Fault, list[str]]]:
    """Every fault, with what was wrong about how it ended."""
    out = []
    for n, fault in enumerate(group.faults):
        wrong = []
        for rank in range(group.ranks):
            if rank == fault.rank and fault.kind in LAST:
                continue
            if len(seen[rank]) <= n:
                wrong.append(f"rank {rank} did not get there")
                continue
            one, tells = seen[rank][n], fault.kind in (*CAUGHT, "uncaught", "kill", "exit")
            if rank != fault.rank:
                text = one["error"].partition("cannot go on")[2] or one["error"].partition(" waited ")[2]
                if not one["error"].startswith("PeerTimeoutError") or f"rank {fault.rank}" not in text:
                    wrong.append(f"rank {rank} got {one['error'][:300] or 'no error'}")
                limit = TOLD_S + 1.0 if tells else DEADLINE_S + SLACK_S  # a step takes its own time
                if one["seconds"] > limit + (2 * DEADLINE_S if fault.kind == "skip" else 0):
                    wrong.append(f"rank {rank} took {one['seconds']:.1f} s")
            if not one["weights_kept"]:
                wrong.append(f"rank {rank} has other weights")
        out.append((fault, wrong))
    return out


def grown(group: Group, seen: Sequence[list[dict[str, Any]]]) -> list[int]:
    """Descriptors, threads and files more after the last fault that all survived than after the first."""
    worst = [0, 0, 0]
    for rows in seen:
        held = [row["held"] for row in rows if any(row["held"])]
        if len(held) > 1:
            worst = [max(w, last - first) for w, first, last in zip(worst, held[0], held[-1], strict=True)]
    return worst


def drawn(rng: random.Random, faults: int, job: str, ranks: int) -> Group:
    """A group with so many faults, of which the last ends a process."""
    chosen = []
    for n in range(faults):
        kind = rng.choice(LAST if n == faults - 1 else (*CAUGHT, *LEFT_OUT))
        moment = rng.choice(MOMENTS)
        if kind == "loader" or kind in LEFT_OUT:
            moment = "between"
        chosen.append(Fault(rng.randrange(ranks), moment, kind))
    return Group(job, ranks, chosen)


@dataclass(slots=True)
class Outcome:
    """How one group's faults ended."""

    group: Group
    ended: list[tuple[Fault, list[str]]]
    grown: list[int]
    hung: list[int] = field(default_factory=list)
    seconds: list[tuple[str, float]] = field(default_factory=list)


def run(group: Group, limit_s: float = 240.0) -> Outcome:
    """Start the processes of a group, and see how they end."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_processes(group.ranks, _train, group, folder)
        last, until = group.faults[-1], time.monotonic() + limit_s
        stays = {last.rank} if last.kind == "stop" else set()
        try:
            while time.monotonic() < until and any(p.is_alive() for r, p in enumerate(processes) if r not in stays):
                time.sleep(0.05)
            hung = [r for r, p in enumerate(processes) if p.is_alive() and r not in stays]
        finally:
            for process in processes:
                process.kill()
                process.join()
        files = [Path(folder, f"seen.{r}") for r in range(group.ranks)]
        seen = [json.loads(f.read_text()) if f.exists() else [] for f in files]
    ended = judged(group, seen)
    seconds = [
        (fault.kind, seen[r][n]["seconds"])
        for n, fault in enumerate(group.faults)
        for r in range(group.ranks)
        if r != fault.rank and len(seen[r]) > n
    ]
    return Outcome(group, ended, grown(group, seen), hung, seconds)


def record_of(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """What the groups that have ended show together."""
    bad = [(o.group.job, o.group.ranks, f, w) for o in outcomes for f, w in o.ended if w]
    kinds = Counter(f.kind for o in outcomes for f, _ in o.ended)
    times = {k: [s for o in outcomes for kind, s in o.seconds if kind == k] for k in kinds}
    return {
        "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(), "seed": seed,
        "faults": sum(kinds.values()), "groups": len(outcomes), "deadline_s": DEADLINE_S, "kinds": dict(kinds),
        "jobs": dict(Counter(f"{o.group.job} over {o.group.ranks}" for o in outcomes)),
        "survivors' seconds, median and largest": {
            k: [round(statistics.median(t), 2), round(max(t), 2)] for k, t in times.items() if t
        },
        "most grown (descriptors, threads, shared files)": [max(o.grown[i] for o in outcomes) for i in range(3)],
        "hung processes": sum(len(o.hung) for o in outcomes), "files left in shared memory": _files(),
        "not as they should be": [{"job": j, "ranks": r, **asdict(f), "wrong": w} for j, r, f, w in bad],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=8, help="faults of one group of processes")
    parser.add_argument("--out", type=Path, help="written after every group")
    args = parser.parse_args()
    rng, groups, left = random.Random(args.seed), [], args.faults
    while left > 0:
        groups.append(drawn(rng, min(args.each, left), JOBS[len(groups) % 3], 2 + len(groups) // 3 % 2))
        left -= len(groups[-1].faults)
    outcomes: list[Outcome] = []
    for group in track(groups, "faults"):
        outcomes.append(run(group))
        if args.out:
            args.out.write_text(json.dumps(record_of(outcomes, args.seed), indent=1) + "\n")
    record = record_of(outcomes, args.seed)
    print(json.dumps(record, indent=1))
    sys.exit(bool(record["not as they should be"] or record["hung processes"]))


if __name__ == "__main__":
    main()
