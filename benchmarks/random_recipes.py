"""Training recipes at random: pipelines over two processes beside one process, in loss, gradients and buffers of every step.

    python -m benchmarks.random_recipes [--steps 300] [--life 20] [--seed 0] [--out FILE.json]

Every life draws a model (a tower that is trained, run under no_grad, or detached; a teacher in the loss, or none), and every step
a batch (none to two images a sample, or none at all; masked labels), what is frozen, the mode, whether gradients are kept, an evaluation,
or a failure: a rank with another batch, or one that raises in its forward. Prints a JSON record.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.multimodal.seeing import WIDTH, WORDS, Layer, Seeing
from tests.multirank import run_ranks
from ultraep_compile.errors import PeerTimeoutError, PipelineError
from ultraep_compile.exchange import failing
from ultraep_compile.multimodal.check import relative_error

WAYS = ("trained", "no_grad", "detached")
KINDS = ("step", "step", "step", "step", "evaluate", "other batch", "raises")
IMAGE, PATCHES, LENGTH, MICROBATCHES = WORDS - 1, 4, 16, 4
TOLERANCE = 2e-5


class Noting(Layer):
    """A layer that keeps an average of what passes while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 1)), 0.1)
        return super().forward(x)


class Placed(Seeing):
    """Images stand where placeholders are: as many in a sample as there are."""

    def __init__(self, way: str, teacher: bool) -> None:
        super().__init__()
        self.way, self.trunk = way, nn.ModuleList(Noting() for _ in range(4))
        self.averages = [f"trunk.{n}.mean" for n in range(4)]
        self.teacher = nn.Linear(WIDTH, WORDS, bias=False) if teacher else None

    def features(self, image: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.way != "no_grad"):
            x = self.tower["patch"](image).flatten(2).transpose(1, 2)
            for block in self.tower["blocks"].children():
                x = block(x)
        return self.projector(x.detach() if self.way == "detached" else x)

    def forward(self, tokens: Tensor, labels: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.table(tokens)
        if image is not None:
            x = x.masked_scatter((tokens == IMAGE)[..., None], self.features(image).flatten(0, 1))
        for layer in self.trunk.children():
            x = layer(x)
        states = self.norm(x)
        logits = self.head(states)
        if self.teacher is not None:
            with torch.no_grad():
                hint = self.teacher(states).softmax(-1)
            logits = logits + hint
        return self.text_loss(logits, labels)


def drawn_batch(draw: random.Random, example: bool = False) -> dict[str, Any]:
    """Samples with images, ragged labels."""
    g = torch.Generator().manual_seed(draw.randrange(10**9))
    samples = 8 if example else draw.randint(MICROBATCHES, 9)
    nothing = not example and draw.random() < 0.15
    counts = [0 if nothing else draw.choice((0, 1, 1, 2)) for _ in range(samples)]
    if example:
        counts[:4] = [1, 2, 0, 1]
    tokens = torch.randint(0, IMAGE, (samples, LENGTH), generator=g)
    labels = tokens.clone()
    for row, count in enumerate(counts):
        at = 1
        for _ in range(count):
            tokens[row, at : at + PATCHES] = IMAGE
            at += PATCHES + 1
        labels[row, : draw.randint(0, LENGTH - 2)] = -100
        if not example and row and draw.random() < 0.15:
            labels[row] = -100  # nothing is learnt of this sample
    labels[tokens == IMAGE] = -100
    labels[0, -2:] = tokens[0, -2:]  # of some sample something is
    batch = {"tokens": tokens, "labels": labels}
    if sum(counts):
        batch["image"] = torch.randn(sum(counts), 3, 8, 8, generator=g)
    return batch


@dataclass(slots=True)
class Lived:
    """What one rank saw in one life."""

    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)


class Life:
    """A pipeline and one process that do the same."""

    def __init__(self, rank: int, seed: int) -> None:
        self.rank, self.draw, self.seen = rank, random.Random(seed), Lived()
        torch.manual_seed(seed)
        way, teacher = self.draw.choice(WAYS), self.draw.random() < 0.5
        self.model = Placed(way, teacher)
        self.single = copy.deepcopy(self.model)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
        example = drawn_batch(self.draw, example=True)
        method = self.draw.choice(("nested", "recompute", "optimus"))
        self.pipe = ultraep_compile.pipeline(self.model, mesh, MICROBATCHES, example, method=method, deadline=60.0)
        self.seen.events[f"{way}{', teacher' if teacher else ''}, {method}"] += 1

    def live(self, steps: int) -> Lived:
        for n in range(steps):
            kind = self.draw.choice(KINDS)
            self.change()
            batch = drawn_batch(self.draw)
            if kind in ("other batch", "raises"):
                self.fail(kind, batch)
            else:
                self.compare(n, kind, batch)
            self.seen.events[kind] += 1
            self.seen.events["batches without images"] += "image" not in batch
            if kind == "step" and self.draw.random() < 0.5:
                self.update()
        return self.seen

    def change(self) -> None:
        """Freeze, unfreeze, train, evaluate: both alike."""
        if self.draw.random() < 0.4:
            chosen = {name: self.draw.random() < 0.6 for name, _ in self.model.named_children()}
            chosen |= {f"trunk.{n}": self.draw.random() < 0.7 for n in range(4)}
            for one in (self.model, self.single):
                for name, trains in chosen.items():
                    one.get_submodule(name).requires_grad_(trains)
            self.seen.events["frozen otherwise"] += 1
        if self.draw.random() < 0.3:
            trains = self.draw.random() < 0.5
            self.model.train(trains)
            self.single.train(trains)
            self.seen.events["modes"] += 1

    def compare(self, n: int, kind: str, batch: Mapping[str, Any]) -> None:
        ours = float(getattr(self.pipe, kind)(batch))
        theirs = 0.0
        with torch.set_grad_enabled(kind == "step"):
            microbatches = self.pipe.parts.microbatches(batch, MICROBATCHES)
            for m in (microbatches[j] for j in self.order(batch)):
                loss = self.single(**m.inputs)
                if m.weight:
                    theirs += float(loss.detach()) * m.weight
                    if loss.requires_grad:
                        (loss * m.weight).backward()
        self.note(n, kind, "loss", abs(ours - theirs) / abs(theirs))
        named = dict(self.single.named_parameters())
        floor = 1e-3 * max((float(p.grad.abs().max()) for p in named.values() if p.grad is not None), default=0.0)
        for name, p in self.pipe.named_parameters():
            self.note(n, kind, name, relative_error(p.grad, named[name].grad, floor))
        for name, own, other in self.buffers():
            self.note(n, kind, name, relative_error(own, other, 1e-3))

    def order(self, batch: Mapping[str, Any]) -> list[int]:
        """The order in which the plan runs microbatches: averages depend on it."""
        schedule = self.pipe.planner.program(self.pipe.problem(batch)).schedule
        return [op.microbatch for op in schedule.ranks[self.rank] if op.kind == "F"]

    def note(self, n: int, kind: str, what: str, error: float) -> None:
        self.seen.worst = max(self.seen.worst, error)
        if not error <= TOLERANCE:
            self.seen.wrong.append(f"{kind} {n}: {what} {error:.1e}")

    def buffers(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, ours, theirs) of the layers that this rank runs."""
        layers = set(self.pipe.layers())
        names = [n for n in self.model.averages if self.model.get_submodule(n.rpartition(".")[0]) in layers]
        return [(name, self.model.get_buffer(name), self.single.get_buffer(name)) for name in names]

    def fail(self, kind: str, batch: dict[str, Any]) -> None:
        """A step that fails on both ranks: gradients stay; averages are those of the forwards that ran."""
        other, victim = drawn_batch(self.draw), self.draw.randrange(2)
        layer = next(m for m in self.pipe.layers())
        before = [None if p.grad is None else p.grad.clone() for p in self.pipe.parameters()]

        def strike(*_: Any) -> None:
            raise RuntimeError("strike")

        hook = layer.register_forward_pre_hook(strike) if kind == "raises" and self.rank == victim else None
        try:
            with failing():
                self.pipe.step(other if kind == "other batch" and self.rank == victim else batch)
        except (PipelineError, PeerTimeoutError, RuntimeError) as error:
            if "strike" not in str(error) and not isinstance(error, (PipelineError, PeerTimeoutError)):
                raise
        else:
            self.seen.wrong.append(f"{kind}: not noticed")
        finally:
            if hook is not None:
                hook.remove()
        for was, p in zip(before, self.pipe.parameters(), strict=True):
            if was is not p.grad and (was is None or p.grad is None or not torch.equal(was, p.grad)):
                self.seen.wrong.append(f"{kind}: a gradient has changed")
        for _, own, theirs in self.buffers():
            theirs.copy_(own)

    def update(self) -> None:
        """A step of SGD on both; gradients are let go."""
        self.seen.events["updates"] += 1
        for one in (self.model, self.single):
            with torch.no_grad():
                for p in one.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.05)
            one.zero_grad()


def lives(rank: int, seeds: list[int], steps: int) -> list[Lived]:
    """Lives of one rank, one after the other."""
    warnings.simplefilter("ignore")
    return [Life(rank, seed).live(steps) for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--life", type=int, default=20, help="steps of one model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="written after every life")
    args = parser.parse_args()
    started, worst, wrong, events, steps = time.monotonic(), 0.0, [], Counter(), 0
    record: dict[str, Any] = {}
    for n in track(range(-(-args.steps // args.life)), "recipes"):
        seed = args.seed * 1000 + n
        found = [of[0] for of in run_ranks(2, lives, [seed], args.life)]
        worst = max(worst, *(f.worst for f in found))
        wrong += [{"seed": seed, "rank": r, "wrong": f.wrong[:5]} for r, f in enumerate(found) if f.wrong]
        events += found[0].events
        steps += args.life
        record = {
            "benchmark": "random_recipes", "device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
            "python": platform.python_version(), "seed": args.seed, "steps": steps, "processes": 2,
            "largest relative difference": worst, "tolerance": TOLERANCE, "wrong": wrong,
            "events": dict(sorted(events.items())), "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
