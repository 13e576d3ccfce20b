"""The main job for multimodal models: an unmodified transformers vision-language model learns to read handwritten digits over
local processes, as a nested pipeline.

Every process holds the vision encoder and one stage of the language model. In the first steps one more copy of the model
runs the same microbatches in one process, without us: their losses must agree."""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ultraep_compile import digits
from ultraep_compile.clipping import clip_grad_norm_
from ultraep_compile.errors import OptionError
from ultraep_compile.local_processes import Send, run_local
from ultraep_compile.schedules.simulate import Timeline, peaks

SAMPLES = 32  # in a batch
COMPARED = 10  # steps that the single process runs too
LOOKS = 10  # at the held-out digits, in the whole run
NEWEST = 31  # steps of which the median is the one shown
RATE, WARM_UP = 3e-3, 20


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of the demo."""

    steps: int
    processes: int

    def __post_init__(self) -> None:
        if not 2 <= self.processes <= digits.LAYERS:
            raise OptionError(
                f"--processes {self.processes} does not fit demo --multimodal: each process runs a stage of at least one layer,"
                f" and the language model has {digits.LAYERS}. Use 2 to {digits.LAYERS}."
            )

    @property
    def microbatches(self) -> int:
        return 4 * self.processes


@dataclass(frozen=True, slots=True)
class Progress:
    """What is shown after every step."""

    step: int
    loss: float
    loss_single: float | None
    accuracy: float | None
    """Of the newest look at the held-out digits."""
    encoder_bytes: list[int]
    """Most activation bytes of encoders, by rank."""
    llm_bytes: list[int]


@dataclass(slots=True)
class Result:
    """A finished run, as rank 0 saw it."""

    explanation: str = ""
    losses: list[float] = field(default_factory=list)
    losses_single: list[float] = field(default_factory=list)
    """Of the first steps."""
    looks: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, accuracy on held-out digits)."""
    encoder_bytes: list[int] = field(default_factory=list)
    """Most activation bytes of encoders in any step, by rank."""
    llm_bytes: list[int] = field(default_factory=list)
    encoder_microbatch_bytes: float = 0.0
    """Activation bytes of one microbatch in the encoder, mean over a batch."""
    encoder_planned: float = 0.0
    """Most microbatches that a rank was to hold in the encoder, in any step's plan."""
    newest: list[tuple[Timeline, Timeline]] = field(default_factory=list)
    """(measured, predicted) of the newest steps, in seconds."""

    @property
    def worst_difference(self) -> float:
        """Largest relative difference of the two losses."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, self.losses_single, strict=False))

    @property
    def shown(self) -> tuple[Timeline, Timeline]:
        """(measured, predicted) of the step of median length among the newest."""
        ordered = sorted(self.newest, key=lambda pair: pair[0].makespan)
        return ordered[len(ordered) // 2]

    @property
    def measured_over_predicted(self) -> float:
        """Step time against the simulator: median over the newest steps."""
        return statistics.median(measured.makespan / predicted.makespan for measured, predicted in self.newest)

    @property
    def encoder_microbatches(self) -> float:
        """The most that any rank held in the encoder, by its bytes; to compare with `encoder_planned`."""
        return max(self.encoder_bytes) / self.encoder_microbatch_bytes


def run(settings: Settings, show: Any) -> Result:
    """Train over local processes; `show` gets a Progress after every step."""
    digits.load()  # what is missing is told here, once
    digits.find_transformers()
    return run_local(settings.processes, train, (settings,), show)


def summary(settings: Settings, result: Result, seconds: float) -> str:
    """One paragraph about a finished run, which took so many seconds."""
    measured, predicted = (t.makespan for t in result.shown)
    crowded = "" if settings.processes <= (os.cpu_count() or 1) else "; larger where processes wait for a core, as here"
    return (
        f"After {settings.steps} steps ({seconds:.0f} s) the model reads {result.looks[-1][1]:.1%} of {digits.HELD_OUT} held-out"
        f" digits (chance: 10%). In the first {len(result.losses_single)} steps its loss differs from that of one process, which"
        f" runs the same microbatches, by at most {result.worst_difference:.1e} (relative). No rank held more encoder"
        f" activations than {result.encoder_microbatches:.2f} of the {settings.microbatches} microbatches leave ({result.encoder_planned:.2f} planned):"
        f" {max(result.encoder_bytes) / 1e6:.2f} MB, beside {max(result.llm_bytes) / 1e6:.2f} MB of the LLM. A step's operations"
        f" take {measured * 1e3:.0f} ms; the simulator says {predicted * 1e3:.0f} ms from their mean times (median ratio of the"
        f" last {len(result.newest)} steps {result.measured_over_predicted:.3f}{crowded})."
    )


def train(rank: int, send: Send, settings: Settings) -> Result:
    """One rank's part of the run. Collective."""
    import ultraep_compile

    learned, held_out = digits.load()
    stream = digits.batches(learned, SAMPLES, settings.steps + 1)
    first = next(stream)
    model = digits.build_model()
    single = Single(copy.deepcopy(model)) if rank == 0 else None
    pipe = ultraep_compile.pipeline(
        model,
        init_device_mesh("cpu", (settings.processes,), mesh_dim_names=("pp",)),
        settings.microbatches,
        first,
        costs="measured",
        trace=True,
        measure_memory=True,
    )
    optimizer, decay = make_optimizer(list(pipe.parameters()), settings.steps)
    result = Result(encoder_microbatch_bytes=encoder_bytes(pipe, first))
    look_at = {round(settings.steps * (n + 1) / LOOKS) for n in range(LOOKS)} | {settings.steps}
    for step, batch in enumerate(stream):
        outcome = pipe.step(batch)
        clip_grad_norm_(pipe.parameters(), 1.0)
        optimizer.step()
        decay.step()
        pipe.zero_grad()
        every = _bytes_of_all(outcome.peak_bytes, settings.processes)
        state = pipe.full_state_dict() if step + 1 in look_at else None
        if single is None:
            continue
        single.follow(step, pipe.parts.microbatches(batch, settings.microbatches), settings.steps)
        if state is not None:
            result.looks.append((step + 1, single.read(state, held_out)))
        result.losses.append(float(outcome))
        _note(result, pipe, every)
        send(_progress(result, single, every))
    if single is not None:
        result.losses_single = single.losses
        result.explanation = pipe.explain()
    return result


class Single:
    """The unmodified model in this process alone: trains beside the pipeline for a few steps, then reads digits with the
    pipeline's weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.reader = model, copy.deepcopy(model)
        self.losses: list[float] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.decay: Any = None

    def follow(self, step: int, microbatches: list[Any], steps: int) -> None:
        """The step that the pipeline has just done, if it is among the first."""
        if step >= COMPARED:
            return
        if self.optimizer is None:
            self.optimizer, self.decay = make_optimizer(list(self.model.parameters()), steps)
        loss = 0.0
        for mb in microbatches:
            part = self.model(**mb.inputs).loss * mb.weight
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.decay.step()
        self.optimizer.zero_grad()
        self.losses.append(loss)

    def read(self, state: dict[str, Tensor], data: digits.Digits) -> float:
        """Accuracy with these weights, 0..1."""
        self.reader.load_state_dict(state)
        return digits.accuracy(self.reader, data)


def make_optimizer(parameters: list[Tensor], steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and its rate's warm-up and decay."""
    # Gradients below eps count as small, so rounding noise in them is not blown up to full steps.
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=1e-6, foreach=False)
    factor = lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def encoder_bytes(pipe: Any, batch: digits.Batch) -> float:
    """Activation bytes that the forward of one microbatch leaves in the encoder, mean over a batch."""
    from ultraep_compile.executor.memory import Meter
    from ultraep_compile.executor.units import EncoderUnit

    (encoder,) = pipe.parts.encoders
    total = 0
    microbatches = pipe.parts.microbatches(batch, pipe.settings.microbatches)
    for mb in microbatches:
        meter = Meter(True, {p.untyped_storage().data_ptr() for p in encoder.module.parameters()})
        unit = EncoderUnit(encoder.name, encoder.module, pipe.device, meter)
        unit.forward({(0, i): item for i, item in enumerate(mb.items[encoder.name])}, False)
        total += meter.peak["encoder"]
    return total / len(microbatches)


def _bytes_of_all(peak: dict[str, int], processes: int) -> tuple[list[int], list[int]]:
    """Every rank's activation bytes of (encoders, LLM)."""
    rows = [torch.empty(2, dtype=torch.long) for _ in range(processes)]
    dist.all_gather(rows, torch.tensor([peak["encoder"], peak["llm"]]))
    encoder, llm = torch.stack(rows).T.tolist()
    return encoder, llm


def _note(result: Result, pipe: Any, every: tuple[list[int], list[int]]) -> None:
    encoder, llm = every
    result.encoder_bytes = [max(pair) for pair in zip(encoder, result.encoder_bytes or encoder, strict=True)]
    result.llm_bytes = [max(pair) for pair in zip(llm, result.llm_bytes or llm, strict=True)]
    result.encoder_planned = max(result.encoder_planned, *peaks(pipe.schedule).encoder)
    result.newest = [*result.newest[-NEWEST + 1 :], (pipe.timeline, pipe.predicted)]


def _progress(result: Result, single: Single, every: tuple[list[int], list[int]]) -> Progress:
    step = len(result.losses) - 1
    beside = single.losses[step] if step < len(single.losses) else None
    accuracy = result.looks[-1][1] if result.looks else None
    return Progress(step, result.losses[-1], beside, accuracy, *every)
