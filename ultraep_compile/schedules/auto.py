"""Choose what the nested rule leaves open: base schedule, virtual stages, encoder memory, generator groups.

Every choice is planned and played; the fastest within memory wins, and the table of what was refused says
why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.nested import Rule, least_memory
from ultraep_compile.schedules.plan import plan_nested
from ultraep_compile.schedules.problem import Problem, place_virtual
from ultraep_compile.schedules.simulate import Peaks, peaks, simulate

_TIE = 0.003  # makespans this close count as equal, and memory decides
Stages = Callable[[str, int], Problem]
Fits = Callable[[Problem, Peaks], str]


@dataclass(frozen=True, slots=True)
class Tried:
    """One choice: what it costs, or why it is out."""

    base: str
    virtual: int
    groups_held: int  # c
    generator_group: int
    makespan: float
    encoder: float  # microbatches that a rank holds
    llm: float  # stage activations that a rank holds
    refused: str  # empty: it fits

    def __str__(self) -> str:
        what = f"{self.base:12} V={self.virtual} c={self.groups_held}"
        what += f" q={self.generator_group}" if self.generator_group else ""
        if self.makespan:
            what += f"  makespan {self.makespan:.5g}  encoder {self.encoder:.3g}  LLM {self.llm:.3g}"
        return what + (f"  refused: {self.refused}" if self.refused else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest schedule that fits, and everything that was tried."""

    problem: Problem
    base: str
    schedule: Schedule
    taken: Tried
    tried: tuple[Tried, ...]

    def why(self) -> str:
        """The choice and its reasons, one line per alternative, fastest first."""
        mine = (self.taken.base, self.taken.virtual, self.taken.generator_group)
        fits = [t for t in self.tried if not t.refused and (t.base, t.virtual, t.generator_group) != mine]
        lines = [f"chosen: {self.taken}"]
        if fits:
            second = min(fits, key=lambda t: t.makespan)
            gain = second.makespan / self.taken.makespan - 1
            how = f"{gain:.1%} faster than" if gain > _TIE else "as fast as, and holds less than,"
            lines.append(f"  {how} the next that fits: {second}")
        refused = sorted((t for t in self.tried if t.refused), key=lambda t: (not t.makespan, t.makespan))
        faster = [t for t in refused if t.makespan and t.makespan < self.taken.makespan]
        lines += [f"  faster, but {t}" for t in faster[:5]]
        lines += [f"  not possible: {t}" for t in refused if not t.makespan][:3]
        lines.append(f"  {len(self.tried)} tried, {len(refused)} refused")
        return "\n".join(lines)


def choose(
    problem: Problem,
    encoder_memory: float | None = None,
    llm_memory: float | None = None,
    stages: Stages | None = None,
    fits: Fits | None = None,
) -> Choice:
    """The fastest nested schedule of a problem.

    `encoder_memory`: encoder microbatches a rank may hold; `llm_memory`: stage activations (None: twice what
    1F1B holds, 2P). `stages(base, virtual)` gives the problem with the LLM cut for a base schedule (default:
    equal stages); `fits(problem, peaks)` may refuse a schedule with a reason, for limits in bytes."""
    limit = 2.0 * problem.ranks if llm_memory is None else llm_memory
    tried: list[Tried] = []
    fitting: list[tuple[Tried, Schedule, Problem]] = []
    for base, virtual, q in _choices(problem):
        cut = stages(base, virtual) if stages else _equal_stages(problem, base, virtual)
        try:
            rule = Rule(base=base, generator_group=q, memory=encoder_memory)
            least = least_memory(cut, rule) if cut.has_encoder else 1
            depths = [
                c for c in (least, least + 1, least + 2) if encoder_memory is None or c <= encoder_memory
            ]
            if not depths:
                raise ScheduleError(f"holds {least} encoder groups")
        except ScheduleError as error:
            tried.append(Tried(base, virtual, 0, q, 0.0, 0.0, 0.0, str(error)))
            continue
        for c in depths if cut.has_encoder else [1]:
            try:
                schedule = plan_nested(cut, replace(rule, memory=c), thorough=False)
            except ScheduleError as error:
                tried.append(Tried(base, virtual, c, q, 0.0, 0.0, 0.0, str(error)))
                continue
            peak = peaks(schedule)
            makespan = simulate(schedule).makespan
            refused = ""
            if encoder_memory is not None and max(peak.encoder) > encoder_memory + 1e-6:
                refused = f"holds {max(peak.encoder):.3g} encoder microbatches of {encoder_memory:g} allowed"
            if max(peak.llm) > limit + 1e-6:
                refused = f"holds {max(peak.llm):.3g} stage activations of {limit:g} allowed"
            refused = refused or (fits(cut, peak) if fits else "")
            entry = Tried(base, virtual, c, q, makespan, max(peak.encoder), max(peak.llm), refused)
            tried.append(entry)
            if not refused:
                fitting.append((entry, schedule, cut))
    if not fitting:
        reasons = list(dict.fromkeys(t.refused for t in tried))
        more = f" and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        raise ScheduleError(
            f"No nested schedule fits: {'; '.join(sorted(reasons)[:3])}{more}. Raise a memory limit or use"
            " smaller microbatches."
        )
    enough = min(entry.makespan for entry, *_ in fitting) * (1 + _TIE)
    entry, schedule, cut = min(
        (f for f in fitting if f[0].makespan <= enough),
        key=lambda f: (f[0].llm + f[0].encoder, f[0].makespan),
    )
    return Choice(cut, entry.base, schedule, entry, tuple(tried))


def _choices(problem: Problem) -> Iterator[tuple[str, int, int]]:
    """(base, virtual stages, generator group). 0: no generator."""
    p = problem.ranks
    groups = [0]
    if problem.has_generator:
        groups = sorted({q for q in (1, 2, 4, p // 2, p) if q and p % q == 0}, reverse=True)
    for base, virtual in (
        ("1f1b", 1),
        ("zero-bubble", 1),
        ("interleaved", 2),
        ("interleaved", 4),
        ("dualpipev", 2),
    ):
        for q in groups:
            if base != "dualpipev" or q < 2:
                yield base, virtual, q


def _equal_stages(problem: Problem, base: str, virtual: int) -> Problem:
    """The problem with V equal stages per rank; encoders keep feeding the same depths of the LLM."""
    cut = place_virtual(replace(problem, encoders=()), virtual, "vee" if base == "dualpipev" else "loop")
    old, new = problem.stages, cut.stages
    encoders = tuple(
        replace(
            e,
            feeds=tuple(range(new))
            if len(e.feeds) == old > 1
            else tuple(sorted({s * new // old for s in e.feeds})),
        )
        for e in problem.encoders
    )
    return replace(cut, encoders=encoders)


def balanced_stages(costs: list[float], stages: int) -> list[range]:
    """Cut consecutive layers into stages so that the dearest stage is as cheap as it can be.

    `costs`: seconds per layer. Returns the layers of each stage. Binary search over the dearest stage's cost.
    """
    n = len(costs)
    if stages > n:
        raise ScheduleError(f"{n} layers cannot fill {stages} stages. Use fewer stages or virtual stages.")

    def cut(limit: float) -> list[range] | None:
        parts, first, load = [], 0, 0.0
        for i, cost in enumerate(costs):
            must = n - i < stages - len(parts)  # the layers left would not give every stage one
            if i > first and (load + cost > limit or must):
                parts.append(range(first, i))
                first, load = i, 0.0
            load += cost
        parts.append(range(first, n))
        return (
            parts if len(parts) == stages and all(sum(costs[i] for i in p) <= limit for p in parts) else None
        )

    candidates = sorted({sum(costs[a:b]) for a in range(n) for b in range(a + 1, n + 1)})
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        limit = candidates[middle] * (1 + 1e-12)
        if cut(limit) is None:
            low = middle + 1
        else:
            high = middle
    parts = cut(candidates[low] * (1 + 1e-12))
    assert parts is not None
    return parts
