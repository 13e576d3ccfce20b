"""Random pipeline problems, and the checks that every plan must pass. Shared by tests and benchmarks."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.baselines import colocated, with_recompute
from ultraep_compile.schedules.nested import Rule, base_run
from ultraep_compile.schedules.plan import BASELINES, plan, plan_nested
from ultraep_compile.schedules.problem import Caps, Encoder, Generator, Problem, items_from_sizes, place_virtual
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate


def lognormal_items(
    ranks: int, microbatches: int, cv: float, share: float, items: int, seed: int, llm: float = 3.0
) -> Encoder:
    """An encoder whose item costs are lognormal with coefficient of variation `cv`; its mean microbatch costs
    `share` of a microbatch's whole LLM work (`llm` per rank), a third of it forward."""
    draw = random.Random(seed)
    s2 = math.log(1 + cv * cv)
    sizes = [[math.exp(draw.gauss(-s2 / 2, s2**0.5)) for _ in range(items)] for _ in range(microbatches)]
    scale = share * llm * ranks / 3 * microbatches / sum(map(sum, sizes))
    return items_from_sizes([[x * scale for x in row] for row in sizes])


def _costs(draw: random.Random, m: int, mean: float, cv: float, empty: float) -> tuple[float, ...]:
    s2 = math.log(1 + cv * cv)
    return tuple(
        0.0 if draw.random() < empty else mean * math.exp(draw.gauss(-s2 / 2, s2**0.5)) for _ in range(m)
    )


def _encoder(draw: random.Random, m: int, stages: int, mean: float) -> Encoder:
    empty = draw.choice((0.0, 0.0, 0.3, 0.8))  # text-only microbatches
    forward = _costs(draw, m, mean, draw.choice((0.0, 0.0, 0.5, 1.5)), empty)
    ratio = draw.choice((2.0, 2.0, 1.0, 0.0))  # 0: frozen
    items: tuple[tuple[float, ...], ...] = ()
    if draw.random() < 0.4:
        rows = []
        for _ in range(m):
            sizes = [draw.random() + 0.05 for _ in range(draw.randint(1, 9))]
            rows.append(tuple(x / sum(sizes) for x in sizes))
        items = tuple(rows)
    feeds = draw.choice(((0,), (0,), tuple(range(stages)), tuple(range(min(3, stages))), (stages // 2,)))
    return Encoder(forward, tuple(ratio * f for f in forward), items, feeds)


def random_problem(seed: int) -> tuple[Problem, Rule]:
    """A problem and a rule: ranks, virtual stages, ragged counts, several encoders, items, generators,
    latency."""
    draw = random.Random(seed)
    p = draw.choice((1, 2, 2, 3, 4, 4, 5, 8))
    base, virtual = draw.choice(
        (("1f1b", 1),) * 4
        + (("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("dualpipev", 2), ("gpipe", 1))
    )
    m = draw.choice((p, 2 * p, 2 * p + draw.randint(0, p), 4 * p, draw.randint(p, 5 * p)))
    even = draw.random() < 0.7
    ratio = draw.choice((1.0, 2.0, 2.0, 3.0))
    forward = (1.0,) * m if even else _costs(draw, m, 1.0, 0.3, 0.0)
    latency = draw.choice((0.0, 0.0, 0.05, 0.3))
    problem = Problem(p, m, forward, tuple(ratio * f for f in forward), latency=latency)
    problem = place_virtual(problem, virtual, "vee" if base == "dualpipev" else "loop")
    scale = draw.choice((0.1, 0.3, 0.6)) * draw.choice((1, p))
    encoders = tuple(_encoder(draw, m, problem.stages, scale) for _ in range(draw.choice((1, 1, 1, 2, 0))))
    generators: tuple[Generator, ...] = ()
    group = 0
    if draw.random() < 0.35:
        cost = _costs(draw, m, scale * 3, draw.choice((0.0, 0.0, 0.8)), draw.choice((0.0, 0.3)))
        generators = (Generator(cost),)
        group = draw.choice([0, 0, *(q for q in range(1, p + 1) if p % q == 0)]) if base != "dualpipev" else 0
    return replace(problem, encoders=encoders, generators=generators), Rule(base=base, generator_group=group)


def contest_problem(seed: int) -> tuple[Problem, str]:
    """A problem and its base schedule, to hold methods against each other: 2 to 16 ranks, P to 6 P microbatches, costs that
    vary by up to their mean, items, generators, one or two virtual stages, latency."""
    draw = random.Random(seed)
    p = draw.choice((2, 3, 4, 5, 6, 8, 8, 12, 16))
    m = draw.randint(p, 6 * p)
    cv, share = draw.choice((0.0, 0.3, 0.6, 1.0)), draw.choice((0.05, 0.1, 0.3, 0.6, 1.0))
    virtual, latency = draw.choice((1, 1, 2)), draw.choice((0.0, 0.0, 0.05, 0.3))
    llm = (1.0,) * m if draw.random() < 0.7 else _costs(draw, m, 1.0, cv, 0.0)
    forward = _costs(draw, m, share * p, cv, 0.0)
    items: tuple[tuple[float, ...], ...] = ()
    if draw.random() < 0.4:
        most = draw.randint(1, 8)
        sizes = [[draw.random() + 0.1 for _ in range(draw.randint(1, most))] for _ in range(m)]
        items = tuple(tuple(x / sum(row) for x in row) for row in sizes)
    encoder = Encoder(forward, tuple(2 * x for x in forward), items)
    generators = (Generator(_costs(draw, m, draw.choice((0.3, 0.9)) * p, cv, 0.0)),) if draw.random() < 0.25 else ()
    problem = Problem(p, m, llm, tuple(2 * x for x in llm), (encoder,), generators, latency=latency)
    return place_virtual(problem, virtual), "interleaved" if virtual > 1 else "1f1b"


class Contest(NamedTuple):
    """Nested beside another method, in the memory that the other one takes."""

    method: str
    memory: float  # encoder microbatches that both may hold
    ratio: float  # nested / other; 0: nested refuses so little memory
    held: float  # encoder microbatches that nested holds


def contests(problem: Problem, base: str) -> Iterator[Contest]:
    """Nested against every method that can do a problem. Its LLM may hold what the other's holds on any rank, but at least
    what its base schedule does. `recompute` changes the problem, and nested then plans the changed one."""
    waiting = 2 if problem.has_generator else 1  # microbatches, the least that a nested generator needs
    least = max(base_run(problem.llm_only(), base, waiting).peak)
    for method in BASELINES:
        try:
            other = plan(problem, method, base)
        except ScheduleError:  # it cannot do this problem
            continue
        peak = peaks(other)
        memory, llm = max(peak.encoder), max(least, *peak.llm)
        asked = with_recompute(problem, encoder=True) if method == "recompute" else problem
        try:
            ours = plan(replace(asked, caps=Caps(llm=(llm,) * problem.ranks)), base=base, memory=memory)
        except ScheduleError as error:
            assert re.search(r"Give at least \d", str(error)), error
            yield Contest(method, memory, 0.0, 0.0)
            continue
        validate(ours)
        mine = peaks(ours)
        assert max(mine.llm) <= llm + 1e-6
        yield Contest(method, memory, simulate(ours).makespan / simulate(other).makespan, max(mine.encoder))


def check_memory_asked(problem: Problem, base: str, memory: int) -> bool:
    """Whether a nested schedule of the problem fits into whole microbatches; one that is made does, and one that is refused
    is possible with the least that the refusal names."""
    try:
        schedule = plan(problem, base=base, memory=memory)
    except ScheduleError as error:
        found = re.search(r"Give at least (\d+)", str(error))
        assert found is not None and int(found[1]) > memory, error
        assert max(peaks(plan(problem, base=base, memory=int(found[1]))).encoder) <= int(found[1]) + 1e-6
        return False
    validate(schedule)
    held = max(peaks(schedule).encoder)
    assert held <= memory + 1e-6, f"{held} encoder microbatches held, {memory} allowed"
    return True


def check_plan(problem: Problem, rule: Rule) -> Schedule:
    """Plan, prove, and hold against what is promised of every nested schedule."""
    schedule = plan_nested(problem, rule)
    validate(schedule)
    peak, caps = peaks(schedule), schedule.caps
    held = max(peak.encoder)
    assert held <= (caps.encoder or 0.0) + 1e-6, (held, caps)
    assert max(peak.generator) <= (caps.generator or 0.0) + 1e-6
    assert all(a <= b + 1e-6 for a, b in zip(peak.llm, caps.llm or (), strict=True))
    if rule.base == "1f1b" and problem.has_encoder and not any(e.items for e in problem.encoders):
        p = problem.ranks
        q = rule.generator_group or p
        lag = (q if q == p else q + 1) if problem.has_generator else 1
        assert held <= math.ceil((2 * p + lag - 2 + 1) / p), (held, p, lag)
    free = not rule.generator_group  # a group that was asked for may cost time: it is there to save memory
    if problem.microbatches >= 2 * problem.ranks and not problem.latency and free:
        ours, theirs = simulate(schedule).makespan, simulate(colocated(problem, rule.base)).makespan
        assert ours <= theirs * (1 + 1e-9), f"nested {ours} is slower than co-located {theirs}"
    return schedule
