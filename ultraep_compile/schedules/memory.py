"""What each rank holds over time."""

from __future__ import annotations

from ultraep_compile.schedules.holdings import memory_steps
from ultraep_compile.schedules.simulate import Timeline

KINDS = {"llm": "LLM", "count": "encoder", "generator": "generator"}
Curve = list[tuple[float, float]]  # (time, amount held from then on)


def memory_curves(timeline: Timeline) -> list[dict[str, Curve]]:
    """Per rank, per kind: a step curve. LLM in stage activations, the others in microbatches (of all
    encoders, or all generators, together)."""
    curves = []
    problem = timeline.schedule.problem
    for ops, starts, ends in zip(timeline.schedule.ranks, timeline.start, timeline.end, strict=True):
        held = dict.fromkeys(KINDS, 0.0)
        points: dict[str, Curve] = {what: [(0.0, 0.0)] for what in KINDS}
        for (_, takes, gives), start, end in zip(memory_steps(problem, ops), starts, ends, strict=True):
            for time, sign, amounts in ((start, 1, takes), (end, -1, gives)):
                for what, amount in amounts:
                    if what in KINDS:
                        held[what] = round(held[what] + sign * amount, 9)
                        points[what].append((time, held[what]))
        used = {KINDS[what]: curve for what, curve in points.items() if len(curve) > 1}
        curves.append({what: [*curve, (timeline.makespan, curve[-1][1])] for what, curve in used.items()})
    return curves
