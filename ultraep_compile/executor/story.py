"""A pipeline in words: parts, who holds them, the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ultraep_compile.multimodal.modules import StageModule
from ultraep_compile.multimodal.parts import Parts
from ultraep_compile.schedules import Schedule, peaks, simulate

if TYPE_CHECKING:
    from ultraep_compile.executor.pipeline import Pipeline


def describe(pipe: Pipeline) -> str:
    """The text of `Pipeline.explain`."""
    lines = [f"rank {pipe.rank} of {pipe.ranks}", *parts_lines(pipe.parts, pipe.stage_rank)]
    for ranks, names in pipe.held.tied:
        lines.append(f"  tied on ranks {ranks}: {', '.join(names)}")
    if pipe.schedule is None:
        lines.append("no step has run: the schedule is planned from a batch")
    else:
        lines += schedule_lines(pipe.schedule, pipe.rates.unit)
    if pipe.timeline is not None and pipe.predicted is not None:
        lines.append(f"  last step {pipe.timeline.makespan:.4g} s, predicted {pipe.predicted.makespan:.4g} s")
    return "\n".join(lines)


def parts_lines(parts: Parts, stage_rank: Sequence[int]) -> list[str]:
    """Stages, encoders and generators with their sizes."""
    lines = [f"{len(parts.stages)} stages on {max(stage_rank) + 1} ranks"]
    for stage, rank in zip(parts.stages, stage_rank, strict=True):
        module = stage.module
        layers = f"layers {module.first} to {module.last - 1}, " if isinstance(module, StageModule) else ""
        lines.append(f"  stage {stage.index} on rank {rank}: {layers}{_size(module)}")
    for encoder in parts.encoders:
        trainable = any(p.requires_grad for p in encoder.module.parameters())
        frozen = "" if trainable else ", frozen: no backward"
        lines.append(
            f"  encoder {encoder.name} on every rank, feeds stages {encoder.feeds}: {_size(encoder.module)}{frozen}"
        )
    for generator in parts.generators:
        lines.append(f"  generator {generator.name} on every rank: {_size(generator.module)}")
    return lines


def schedule_lines(schedule: Schedule, rates: str) -> list[str]:
    """How a schedule fares, as the simulator plays it."""
    timeline, peak = simulate(schedule), peaks(schedule)
    return [
        f"schedule {schedule.method} ({schedule.note}), {schedule.problem.microbatches} microbatches, rates {rates}",
        f"  bubble {timeline.bubble:.1%} of the ranks' time, as predicted",
        f"  most held at once, by rank: encoders {_row(peak.encoder)} microbatches, LLM {_row(peak.llm)} stage activations",
    ]


def _size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    return f"{sum(p.numel() for p in parameters):,} parameters, {sum(p.numel() * p.element_size() for p in parameters):,} bytes"


def _row(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{x:.3g}" for x in numbers)
