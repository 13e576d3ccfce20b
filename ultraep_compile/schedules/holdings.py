"""What an operation takes into a rank's memory and what it gives back: the definition behind all peaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.problem import Encoder, Generator, Problem

Amounts = tuple[tuple[str, float], ...]


def memory_steps(problem: Problem, ops: Sequence[Op]) -> Iterator[tuple[Op, Amounts, Amounts]]:
    """For each operation: (op, what it takes when it starts, what it gives back when it ends).

    Amounts are pairs (what, amount), what in count (microbatches of its encoder), load (the same weighted by
    cost), generator, llm."""
    means = [e.mean_forward for e in problem.encoders]
    made = [g.mean_cost for g in problem.generators]
    split = {(op.stage, op.microbatch) for op in ops if op.kind == "I"}
    for op in ops:
        kind = op.kind
        if kind in ("EF", "EB"):
            encoder = problem.encoders[op.stage]
            amounts = encoder_amounts(encoder, op, means[op.stage])
            held = not encoder.frozen and not encoder.recompute
            takes = kind == "EF" or encoder.recompute
            gives = kind == "EB" or not held
            yield op, amounts if takes else (), amounts if gives else ()
        elif kind == "G":
            amounts = (("generator", generator_amount(problem.generators[op.stage], op, made[op.stage])),)
            yield op, amounts, amounts
        else:
            amounts = (("llm", problem.stage_share[op.stage]),)
            if problem.llm_recompute:
                ends = kind in ("F", "W") or (kind == "B" and (op.stage, op.microbatch) not in split)
                yield op, amounts if kind in ("F", "B", "I") else (), amounts if ends else ()
            else:
                yield op, amounts if kind == "F" else (), amounts if kind in ("B", "W") else ()


def encoder_amounts(encoder: Encoder, op: Op, mean: float) -> Amounts:
    """What the activations of an encoder operation occupy: (count, load), in microbatches and mean microbatches.
    `mean`: the encoder's mean_forward."""
    count = encoder_amount(encoder, op, mean)
    return ("count", count), ("load", count if op.items else encoder.forward[op.microbatch] / mean)


def encoder_amount(encoder: Encoder, op: Op, mean: float) -> float:
    """Microbatches that an encoder operation works on (items: mean microbatches, by cost)."""
    return sum(encoder.forward[j] * encoder.items[j][i] for j, i in op.items) / mean if op.items else 1.0


def generator_amount(generator: Generator, op: Op, mean: float) -> float:
    """What a generator operation holds while it runs, in microbatches (items: mean microbatches, by cost). `mean`: the
    generator's mean_cost."""
    if not op.items:
        return 1.0
    return sum(generator.cost[j] * generator.items[j][i] for j, i in op.items) / mean
