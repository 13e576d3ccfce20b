"""What a pipeline of a model would look like, in one process and without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ultraep_compile.executor.costs import estimated_rates, make_problem
from ultraep_compile.executor.story import parts_lines, schedule_lines
from ultraep_compile.multimodal.parts import find_parts
from ultraep_compile.schedules import Schedule, plan


def outline(model: nn.Module, inputs: Mapping[str, Any], stages: int, microbatches: int) -> tuple[str, Schedule]:
    """(stages and schedule in words, the schedule), one stage per rank, costs estimated from parameters and sizes.

    Raises: PartsError if the model or the batch cannot be divided so."""
    parts = find_parts(model, inputs, stages)
    pieces = parts.microbatches(inputs, microbatches)
    schedule = plan(make_problem(parts, pieces, estimated_rates(parts, model), range(stages), split=False))
    return "\n".join([*parts_lines(parts, range(stages)), *schedule_lines(schedule, "estimated")]), schedule
