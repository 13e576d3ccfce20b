"""A pipeline in words: parts, who holds them, the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ultraep_compile.schedules import peaks, simulate

if TYPE_CHECKING:
    from ultraep_compile.executor.pipeline import Pipeline


def describe(pipe: Pipeline) -> str:
    """The text of `Pipeline.explain`."""
    parts = pipe.parts
    lines = [f"{len(parts.stages)} stages on {pipe.ranks} ranks, this is rank {pipe.rank}"]
    for stage, rank in zip(parts.stages, pipe.stage_rank, strict=True):
        lines.append(f"  stage {stage.index} on rank {rank}: {_size(stage.module)}")
    for encoder in parts.encoders:
        trainable = any(p.requires_grad for p in encoder.module.parameters())
        frozen = "" if trainable else ", frozen: no backward"
        lines.append(
            f"  encoder {encoder.name} on every rank, feeds stages {encoder.feeds}: {_size(encoder.module)}{frozen}"
        )
    for generator in parts.generators:
        lines.append(f"  generator {generator.name} on every rank: {_size(generator.module)}")
    for ranks, names in pipe.held.tied:
        lines.append(f"  tied on ranks {ranks}: {', '.join(names)}")
    schedule = pipe.schedule
    if schedule is None:
        lines.append("no step has run: the schedule is planned from a batch")
        return "\n".join(lines)
    timeline, peak = simulate(schedule), peaks(schedule)
    lines += [
        f"schedule {schedule.method} ({schedule.note}), {schedule.problem.microbatches} microbatches, rates {pipe.rates.unit}",
        f"  bubble {timeline.bubble:.1%} of the ranks' time, as predicted",
        f"  most held at once, by rank: encoders {_row(peak.encoder)} microbatches, LLM {_row(peak.llm)} stage activations",
    ]
    if pipe.timeline is not None and pipe.predicted is not None:
        lines.append(f"  last step {pipe.timeline.makespan:.4g} s, predicted {pipe.predicted.makespan:.4g} s")
    return "\n".join(lines)


def _size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    return f"{sum(p.numel() for p in parameters):,} parameters, {sum(p.numel() * p.element_size() for p in parameters):,} bytes"


def _row(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{x:.3g}" for x in numbers)
