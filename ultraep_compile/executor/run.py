"""Run one step of a pipeline on one rank: the operations of its program, in its order, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ultraep_compile.errors import PipelineError
from ultraep_compile.exchange import at
from ultraep_compile.executor.channels import Channel
from ultraep_compile.executor.program import Program
from ultraep_compile.executor.units import EncoderUnit, Features, GeneratorUnit, Item, StageUnit, leaf, to_device
from ultraep_compile.multimodal.parts import Microbatch
from ultraep_compile.schedules import Message, Op

Grads = tuple[Tensor | None, ...]
_DOING = {
    "EF": "forward of encoder {}", "EB": "backward of encoder {}", "G": "generator {}", "F": "forward of stage {}",
    "B": "backward of stage {}", "I": "input backward of stage {}", "W": "weight backward of stage {}",
}  # fmt: skip


@dataclass(slots=True)
class Units:
    """What this rank can run."""

    encoders: list[EncoderUnit]
    stages: dict[int, StageUnit]
    generators: list[GeneratorUnit]
    states: int  # values that the last stage returns before its loss


@dataclass(slots=True)
class Clock:
    """When each operation began and ended, on the host or, by events, on the device."""

    device: torch.device
    on: bool
    marks: list[tuple[Op, Any, Any]] = field(default_factory=list)
    origin: Any = None
    host: float = 0.0  # the host's clock at the origin

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.marks.clear()
        self.origin = self.now() if self.on else None
        on_host = self.on and self.device.type != "cuda"  # then one reading is both, so that ranks compare exactly
        self.host = self.origin if on_host else time.perf_counter()

    def seconds(self) -> list[tuple[Op, float, float]]:
        """(operation, start, end) since the step began. On a GPU this waits for the device."""
        if self.device.type != "cuda":
            return [(op, a - self.origin, b - self.origin) for op, a, b in self.marks]
        torch.cuda.synchronize()
        return [(op, self.origin.elapsed_time(a) / 1e3, self.origin.elapsed_time(b) / 1e3) for op, a, b in self.marks]


@dataclass(slots=True)
class Outcome:
    """What one rank contributes to a step's result."""

    loss: Tensor  # weighted, of this rank's last stage and generators
    metrics: list[tuple[bool, Tensor]]  # (averaged or added up, total), on the last stage's rank


class StepRun:
    """One step on one rank. Everything that waits between operations is in one of these tables."""

    def __init__(
        self,
        program: Program,
        units: Units,
        channels: dict[str, Channel],
        microbatches: Sequence[Microbatch],
        step: int,
        scale: float,
        clock: Clock,
    ) -> None:
        self.program, self.units, self.channels, self.microbatches = program, units, channels, microbatches
        self.step, self.scale, self.clock = step, scale, clock
        self.device = clock.device
        self.problem = program.problem
        self.rank_of = self.problem.stage_rank
        self.hidden: dict[tuple[int, int], tuple[Any, ...]] = {}  # (stage, microbatch) -> its input
        self.out_grads: dict[tuple[int, int], Grads] = {}  # (stage, microbatch) -> gradients of its outputs
        self.features: dict[tuple[int, int, int], tuple[Any, ...]] = {}  # (encoder, microbatch, item)
        self.item_grads: dict[tuple[int, int, int], list[Grads]] = {}
        self.rows: dict[tuple[int, int, int], list[list[int]]] = {}  # (stage, encoder, microbatch) -> rows of items
        self.states: dict[int, tuple[Any, ...]] = {}
        self.state_grads: dict[int, list[Grads]] = {}
        self.tails: dict[int, list[Any]] = {}  # microbatch -> the last stage's loss and metrics
        self.outbox: dict[Message, Any] = {}
        self.inputs: dict[int, dict[str, Any]] = {}
        self.generations = program.count("G")  # left to run here, by microbatch
        self.forwards = program.count("F")
        self.last = self._last_backwards()
        self.outcome = Outcome(torch.zeros((), device=self.device), [])
        self.run_op: dict[str, Callable[[Op], None]] = {
            "EF": self.encode, "EB": self.encode_backward, "F": self.forward, "G": self.generate,
            "B": self.backward, "I": self.backward, "W": self.backward,
        }  # fmt: skip

    def _last_backwards(self) -> set[Op]:
        """The last backward of each stage here that has a gradient: of a microbatch without loss tokens it has none."""
        weighty = {j for j, m in enumerate(self.microbatches) if m.weight} | self.program.generated
        return set({op.stage: op for op in self.program.backwards if op.microbatch in weighty}.values())

    def run(self) -> Outcome:
        """All of the program. Raises PeerTimeoutError if another rank does not answer in time."""
        self.clock.start()
        for action in self.program.actions:
            if not isinstance(action, Op):
                channel = self.channels[action.message.channel]
                if action.kind == "RECV":
                    channel.post(action.message)
                else:
                    channel.send(action.message, self.outbox.pop(action.message), self.step)
                continue
            for message in self.program.needs.get(action, ()):
                with at(phase=_DOING[action.kind].format(action.stage), microbatch=message.microbatch):
                    value = self.channels[message.channel].take(message, self.step, action)
                self.arrived(message, value)
            began = self.clock.now() if self.clock.on else None
            with at(phase=_DOING[action.kind].format(action.stage), microbatch=action.microbatch):
                self.run_op[action.kind](action)
            if self.clock.on:
                self.clock.marks.append((action, began, self.clock.now()))
        for channel in self.channels.values():
            channel.drain()
        return self.outcome

    def arrived(self, message: Message, value: Any) -> None:
        """File what a message brought."""
        producer, j = message.producer, message.microbatch
        if message.channel == "FWD":
            self.hidden[producer.stage + 1, j] = value
        elif message.channel == "BWD":
            self.out_grads[producer.stage - 1, j] = value
        elif message.channel == "EMB":
            for i, features in value:
                self.features[producer.stage, j, i] = features
        elif message.channel == "EGRAD":
            for e, i, grads in value:
                self.item_grads.setdefault((e, j, i), []).append(grads)
        elif message.channel == "H":
            self.states[j] = value
        else:
            self.state_grads.setdefault(j, []).append(value)

    def give(self, op: Op, payload: Callable[[Message], Any]) -> None:
        for message in self.program.gives.get(op, ()):
            self.outbox[message] = payload(message)

    def items_of(self, op: Op) -> list[Item]:
        """(microbatch, item) that an encoder or generator operation works on."""
        if op.items:
            return list(op.items)
        name = self.units.generators[op.stage].name if op.kind == "G" else self.units.encoders[op.stage].name
        return [(op.microbatch, i) for i in range(len(self.microbatches[op.microbatch].items.get(name, ())))]

    def encode(self, op: Op) -> None:
        unit = self.units.encoders[op.stage]
        items = {(j, i): self.microbatches[j].items[unit.name][i] for j, i in self.items_of(op)}
        made = unit.forward(items, self.problem.encoders[op.stage].recompute)
        if any(self.rank_of[s] == self.program.rank for s in self.problem.encoders[op.stage].feeds):
            self.features.update({(op.stage, j, i): features for (j, i), features in made.items()})
        self.give(op, lambda m: tuple((i, f) for (j, i), f in made.items() if j == m.microbatch))

    def encode_backward(self, op: Op) -> None:
        grads = {}
        for j, i in self.items_of(op):
            grads[j, i] = _sum(self.item_grads.pop((op.stage, j, i)))
        self.units.encoders[op.stage].backward(grads)

    def forward(self, op: Op) -> None:
        s, j = op.stage, op.microbatch
        hidden = self.hidden.pop((s, j)) if s else ()
        if j not in self.inputs:
            self.inputs[j] = to_device(self.microbatches[j].inputs, self.device)
        outputs = self.units.stages[s].forward(j, hidden, self.inputs[j], self._entering(s, j))
        self.forwards[j] -= 1
        if not self.forwards[j]:
            del self.inputs[j]
        if s == self.problem.stages - 1:
            self._finish(op, outputs)
            return
        if self.rank_of[s + 1] == self.program.rank:
            self.hidden[s + 1, j] = outputs
        self.give(op, lambda m: outputs)

    def _entering(self, s: int, j: int) -> Features:
        """The features that stage s reads of microbatch j, as leaves; their rows by item are noted for the way back."""
        entering: Features = {}
        for e, (encoder, unit) in enumerate(zip(self.problem.encoders, self.units.encoders, strict=True)):
            count = len(self.microbatches[j].items.get(unit.name, ()))
            if s not in encoder.feeds or not count:
                continue
            later = [t for t in encoder.feeds if t > s and self.rank_of[t] == self.program.rank]
            get = self.features.__getitem__ if later else self.features.pop
            pieces = [get((e, j, i)) for i in range(count)]
            self.rows[s, e, j] = [[x.shape[0] if isinstance(x, Tensor) else 0 for x in piece] for piece in pieces]
            entering[unit.name] = tuple(leaf(_cat(parts), not encoder.frozen) for parts in zip(*pieces, strict=True))
        return entering

    def _finish(self, op: Op, outputs: tuple[Any, ...]) -> None:
        """The last stage's outputs: states for generators, the loss, metrics."""
        j, count = op.microbatch, self.units.states
        if len(outputs) <= count:
            raise PipelineError(
                f"The last stage returned {len(outputs)} values; {count} states and a loss are expected. Compute the loss in it."
            )
        states, tail = outputs[:count], list(outputs[count:])
        weight = self.microbatches[j].weight
        if isinstance(tail[0], Tensor) and weight:  # the mean over no label is NaN
            self.outcome.loss += tail[0].float().reshape(()) * weight
        self._count_metrics(tail[1:], weight)
        self.tails[j] = tail
        if self.generations[j]:
            self.states[j] = states
        self.give(op, lambda m: states)

    def _count_metrics(self, metrics: list[Any], weight: float) -> None:
        """Add single numbers up: floats weighted as the loss, integers (counts) as they are; the rest is left out."""
        single = [m for m in metrics if isinstance(m, Tensor) and m.dim() == 0]
        totals = self.outcome.metrics
        if not totals:
            totals += [
                (m.is_floating_point(), torch.zeros((), dtype=torch.float64, device=self.device)) for m in single
            ]
        for (averaged, total), metric in zip(totals, single, strict=True):
            if weight or not averaged:
                total += metric.double() * weight if averaged else metric

    def generate(self, op: Op) -> None:
        unit = self.units.generators[op.stage]
        gradients = {}
        by_microbatch: dict[int, list[dict[str, Any]]] = {j: [] for j in op.microbatches}
        for j, i in self.items_of(op):
            by_microbatch[j].append(self.microbatches[j].items[unit.name][i])
        for j, samples in by_microbatch.items():
            microbatch = self.microbatches[j]
            if not op.items and unit.name not in microbatch.items:
                samples = [microbatch.inputs]
            loss, gradients[j] = unit.run(j, self.states[j], samples, microbatch.weight * self.scale)
            if microbatch.weight:
                self.outcome.loss += loss * microbatch.weight
            self.generations[j] -= 1
            if not self.generations[j]:
                del self.states[j]
            if self.rank_of[-1] == self.program.rank:
                self.state_grads.setdefault(j, []).append(gradients[j])
        self.give(op, lambda m: gradients[m.microbatch])

    def backward(self, op: Op) -> None:
        s, j = op.stage, op.microbatch
        unit = self.units.stages[s]
        if op.kind == "W":
            unit.backward("W", j, (), False)
            return
        grads = self._seeds(j) if s == self.problem.stages - 1 else self.out_grads.pop((s, j))
        hidden, features = unit.backward(op.kind, j, grads, op in self.last)
        if s and self.rank_of[s - 1] == self.program.rank:
            self.out_grads[s - 1, j] = hidden
        leaving = self._leaving(s, j, features)
        for e, i, host, grad in leaving:
            if host == self.program.rank:
                self.item_grads.setdefault((e, j, i), []).append(grad)

        def payload(message: Message) -> Any:
            if message.channel == "BWD":
                return hidden
            return tuple((e, i, grad) for e, i, host, grad in leaving if host == message.target)

        self.give(op, payload)

    def _seeds(self, j: int) -> Grads:
        """Gradients of the last stage's outputs: of the states from the generators, of the loss its weight."""
        loss, *metrics = self.tails.pop(j)
        states = _sum(self.state_grads.pop(j)) if j in self.state_grads else (None,) * self.units.states
        weight = self.microbatches[j].weight * self.scale
        seed = torch.full_like(loss, weight) if isinstance(loss, Tensor) and weight else None
        return (*states, seed, *(None for _ in metrics))

    def _leaving(self, s: int, j: int, features: dict[str, Grads]) -> list[tuple[int, int, int, Grads]]:
        """(encoder, item, rank that encoded it, gradients) for the features that stage s read."""
        leaving = []
        for e, (encoder, unit) in enumerate(zip(self.problem.encoders, self.units.encoders, strict=True)):
            if unit.name not in features or s not in encoder.feeds:
                continue
            rows = self.rows.pop((s, e, j))
            if encoder.frozen:
                continue
            split = [
                (None,) * len(rows) if grad is None else grad.split([r[n] for r in rows])
                for n, grad in enumerate(features[unit.name])
            ]
            for i in range(len(rows)):
                host = self.program.host(e, j, i)
                assert host is not None
                leaving.append((e, i, host, tuple(parts[i] for parts in split)))
        return leaving


def _cat(parts: Sequence[Any]) -> Any:
    """Pieces of one value behind one another; what is no tensor must be equal in all."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if any(part != parts[0] for part in parts):
        raise PipelineError(
            f"An encoder returned {parts} for the items of one microbatch: not a tensor, and not all equal."
        )
    return parts[0]


def _sum(rows: Sequence[Grads]) -> Grads:
    """Gradients of the same values from several readers, added up in order."""
    total = list(rows[0])
    for row in rows[1:]:
        for n, grad in enumerate(row):
            old = total[n]
            total[n] = grad if old is None else old if grad is None else old + grad
    return tuple(total)
