"""The replay: every planner on every microbatch, judged by the cost model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultraep_compile import cost_model
from ultraep_compile.cost_model import Layer, Loads, Rates, StepTime
from ultraep_compile.errors import OptionError, nearest
from ultraep_compile.planner import PLANNERS, Plan, lower_bound, make_plan
from ultraep_compile.planner.figures import plan_figures
from ultraep_compile.planner.ideal import forced_counts
from ultraep_compile.planner.registry import IDEAL, split_name
from ultraep_compile.planner.stale import reuse_plan
from ultraep_compile.replay.source import Sequence, Source

BREAK_EVENS = 5  # microbatches of a layer that the break-even is solved for
AUTO = "quota:auto"
WORTH_A_SLOT = 0.002  # a slot more must save this share of the time


@dataclass(frozen=True, slots=True)
class Spec:
    """A planner, and how many earlier microbatches it plans on: `eplb@8` plans on 8, and anew every 8; 0 = exact.

    `quota:auto` is `quota:N` with the N of each layer, see `cost_model.copy_tokens`.
    """

    planner: str
    history: int = 0

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `quota` or `eplb@8`."""
        name, at, number = text.strip().partition("@")
        known = [*PLANNERS, IDEAL]
        if name != AUTO and split_name(name)[0] not in known:
            raise OptionError(f"There is no planner {name!r}. {nearest(name, known)}")
        if at and not (number.isascii() and number.isdigit() and 0 < int(number) < 10**6):
            raise OptionError(f"{text!r}: after @ comes the number of microbatches to plan on, as in {name}@8.")
        if at and name in ("none", IDEAL):
            raise OptionError(f"{text!r}: {name} looks at no history. Write {name} alone.")
        return cls(name, int(number or 0))

    @property
    def uses_slots(self) -> bool:
        return self.planner not in ("none", IDEAL)

    def for_layer(self, layer: Layer, rates: Rates, phase: str) -> Spec:
        """With the number that `auto` stands for."""
        if self.planner != AUTO:
            return self
        return Spec(f"quota:{cost_model.copy_tokens(layer, rates, phase)}", self.history)

    def __str__(self) -> str:
        return f"{self.planner}@{self.history}" if self.history else self.planner


@dataclass(frozen=True, slots=True)
class Question:
    """What to replay."""

    specs: tuple[Spec, ...]
    slots: tuple[int, ...]
    rates: Rates
    phase: str = "train"
    domain: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One planner with one number of slots over all microbatches. Times and bytes of a microbatch through all layers."""

    spec: Spec
    slots: int
    step_us: float
    parts_us: dict[str, float]
    imbalance: NDArray[np.float64]
    """[records], over layers and then microbatches."""
    step_us_N: NDArray[np.float64]
    """[microbatches], all layers together, where all have the microbatch."""
    replicas: float
    max_ingress: int
    max_egress: int
    remote_share: float
    domain_bytes: float
    network_bytes: float
    copy_bytes: float
    slot_bytes: int
    buffer_bytes: int
    break_even_tokens: float | None
    """Tokens per rank and microbatch from which on this beats no balancing; the median over layers and microbatches."""

    def to_json(self) -> dict[str, Any]:
        after = self.imbalance
        return {
            "planner": str(self.spec),
            "slots": self.slots,
            "step_us": self.step_us,
            "parts_us": self.parts_us,
            "after_p50": float(np.median(after)),
            "after_p99": float(np.percentile(after, 99)),
            "after_max": float(after.max()),
            **{
                name: getattr(self, name)
                for name in (
                    "replicas", "max_ingress", "max_egress", "remote_share", "domain_bytes", "network_bytes",
                    "copy_bytes", "slot_bytes", "buffer_bytes", "break_even_tokens",
                )
            },
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay and its results."""

    source: Source
    question: Question
    outcomes: list[Outcome]
    before: NDArray[np.float64]
    """Imbalance without copies of each record."""
    lower_bounds: dict[int, float]
    """Mean over the records, by number of slots: no exact plan is below."""
    none_us: float

    def best(self, spec: Spec) -> Outcome:
        """The number of slots that is fastest; a slot more must be worth it."""
        mine = sorted((o for o in self.outcomes if o.spec == spec), key=lambda o: o.slots)
        best = mine[0]
        for one in mine[1:]:
            if one.step_us < best.step_us * (1 - WORTH_A_SLOT):
                best = one
        return best

    def winner(self) -> Outcome:
        """The fastest of all that can be run; the first of equals."""
        real = [spec for spec in self.question.specs if spec.planner != IDEAL]
        return min((self.best(spec) for spec in real), key=lambda o: o.step_us)

    def to_json(self) -> dict[str, Any]:
        first = self.source.sequences[0]
        return {
            "source": self.source.title,
            "phase": self.question.phase,
            "domain": self.question.domain,
            "layers": [
                {"name": s.name, "shape": list(s.counts_NRE.shape), **dataclasses.asdict(s.layer)}
                for s in self.source.sequences
            ],
            "rates": dataclasses.asdict(self.question.rates),
            "formulas": {name: str(formula) for name, formula in cost_model.FORMULAS.items()},
            "memory_formulas": {
                name: str(value)
                for name, value in cost_model.memory_formulas(first.layer, first.counts_NRE.shape[-1]).items()
                if name in ("slot_bytes", "buffer_bytes")
            },
            "before_p50": float(np.median(self.before)),
            "before_max": float(self.before.max()),
            "lower_bound": {str(slots): bound for slots, bound in self.lower_bounds.items()},
            "none_us": self.none_us,
            "results": [o.to_json() for o in self.outcomes],
            "best": {str(s): self.best(s).slots for s in self.question.specs if s.uses_slots},
            "winner": {"planner": str(self.winner().spec), "slots": self.winner().slots},
        }


def replay(source: Source, question: Question, track: Callable[[list], Iterable] = iter) -> Replayed:
    """Plan every microbatch with every planner and number of slots. `track` wraps the list of runs to show progress."""
    start = max(spec.history for spec in question.specs)
    for sequence in source.sequences:
        if len(sequence.counts_NRE) <= start:
            raise OptionError(
                f"{sequence.name}: {len(sequence.counts_NRE)} microbatches are too few for a history of {start}. "
                "Give more microbatches or a shorter history after @."
            )
        _check_domain(sequence, question.domain)
    without = [[cost_model.of_counts(c, question.rates, question.domain) for c in _counts(s, start)] for s in source.sequences]
    before = np.array([plan_figures(c, make_plan(c, 0, "none"))["before"] for s in source.sequences for c in _counts(s, start)])
    runs = [(spec, slots) for spec in question.specs for slots in (question.slots if spec.uses_slots else (0,))]
    outcomes = [_outcome(source, question, spec, slots, start, without) for spec, slots in track(runs)]
    bounds = {
        slots: float(
            np.mean([lower_bound(c, slots, question.domain) for s in source.sequences for c in _counts(s, start)])
        )
        for slots in question.slots
    }
    times = cost_model.occurrences(question.phase, planned=False)
    none_us = sum(
        float(np.mean([cost_model.evaluate(one, s.layer, question.rates, times).total for one in loads]))
        for s, loads in zip(source.sequences, without, strict=True)
    )
    return Replayed(source, question, outcomes, before, bounds, none_us)


def _check_domain(sequence: Sequence, domain: int | None) -> None:
    ranks = sequence.counts_NRE.shape[1]
    if domain is not None and (domain < 1 or ranks % domain):
        raise OptionError(f"{sequence.name}: domains of {domain} do not divide {ranks} ranks. Choose a divisor of {ranks}.")


def _counts(sequence: Sequence, start: int) -> Iterator[Tensor]:
    """The microbatches that all planners are compared on."""
    return (torch.from_numpy(counts) for counts in sequence.counts_NRE[start:])


def plans(sequence: Sequence, spec: Spec, slots: int, start: int, domain: int | None = None) -> Iterator[tuple[Tensor, Plan]]:
    """(counts, plan) of each microbatch from `start` on; the counts of `ideal` are those of a forced router."""
    earlier: Plan | None = None
    for n, counts_RE in enumerate(_counts(sequence, start)):
        if spec.planner == IDEAL:
            forced_RE = forced_counts(counts_RE)
            yield forced_RE, make_plan(forced_RE, 0, "none")
        elif spec.history:
            if earlier is None or n % spec.history == 0:
                window = sequence.counts_NRE[start + n - spec.history : start + n].sum(0)
                earlier = make_plan(torch.from_numpy(window), slots, spec.planner, domain=domain)
            yield counts_RE, reuse_plan(earlier, counts_RE, spec.planner)
        else:
            yield counts_RE, make_plan(counts_RE, slots, spec.planner, domain=domain)


def _outcome(
    source: Source, question: Question, spec: Spec, slots: int, start: int, without: list[list[Loads]]
) -> Outcome:
    layers = [_records(s, question, spec, slots, start, bare) for s, bare in zip(source.sequences, without, strict=True)]
    records = [record for layer in layers for record in layer]
    memory = [_memory(sequence, slots) for sequence in source.sequences]
    least = min(len(layer) for layer in layers)

    def whole(value: Callable[[_Record], float]) -> float:
        """The mean over microbatches, summed over layers."""
        return sum(float(np.mean([value(record) for record in layer])) for layer in layers)

    return Outcome(
        spec=spec,
        slots=slots,
        step_us=whole(lambda r: r.time.total),
        parts_us={name: whole(lambda r, name=name: r.time.parts[name]) for name in records[0].time.parts},
        imbalance=np.array([r.figures["after"] for r in records]),
        step_us_N=np.sum([[r.time.total for r in layer[:least]] for layer in layers], 0),
        replicas=whole(lambda r: r.figures["replicas"]),
        max_ingress=int(max(r.figures["max_ingress"] for r in records)),
        max_egress=int(max(r.figures["max_egress"] for r in records)),
        remote_share=float(np.mean([r.figures["remote_share"] for r in records])),
        domain_bytes=whole(lambda r: r.moved["domain_bytes"]),
        network_bytes=whole(lambda r: r.moved["network_bytes"]),
        copy_bytes=whole(lambda r: r.moved["copy_bytes"]) / max(spec.history, 1),
        slot_bytes=(sum if spec.history else max)(m["slots"] for m in memory),  # slots of copies that stay are not shared
        buffer_bytes=max(m["buffers"] for m in memory),
        break_even_tokens=_median([r.break_even for r in records if r.solved]) if spec.uses_slots else None,
    )


class _Record(NamedTuple):
    """One microbatch of one layer."""

    figures: dict[str, float]
    time: StepTime
    moved: dict[str, int]
    solved: bool
    break_even: float | None


def _records(
    sequence: Sequence, question: Question, spec: Spec, slots: int, start: int, bare: list[Loads]
) -> list[_Record]:
    rates, layer = question.rates, sequence.layer
    times = cost_model.occurrences(question.phase, spec.uses_slots, spec.history)
    picked = set(np.linspace(0, len(bare) - 1, min(BREAK_EVENS, len(bare))).round().astype(int).tolist())
    records = []
    planned = spec.for_layer(layer, rates, question.phase)
    for n, (counts_RE, plan) in enumerate(plans(sequence, planned, slots, start, question.domain)):
        loads = Loads.of(plan, rates, question.domain)
        solved = spec.uses_slots and n in picked
        records.append(
            _Record(
                plan_figures(counts_RE, plan),
                cost_model.evaluate(loads, layer, rates, times),
                cost_model.traffic(loads, layer),
                solved,
                cost_model.break_even(bare[n], loads, layer, rates, times) if solved else None,
            )
        )
    return records


def _median(values: list[float | None]) -> float | None:
    """The median, where never is more than any number."""
    middle = float(np.median([np.inf if value is None else value for value in values]))
    return middle if np.isfinite(middle) else None


def _memory(sequence: Sequence, slots: int) -> dict[str, int]:
    """Bytes on a rank for the microbatch with the most tokens."""
    _, ranks, experts = sequence.counts_NRE.shape
    tokens = -(-int(sequence.counts_NRE.sum((1, 2)).max()) // sequence.layer.top_k)
    return cost_model.memory(sequence.layer, experts, tokens, ranks, slots)
