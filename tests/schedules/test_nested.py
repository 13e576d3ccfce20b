"""The nested schedule against its formulas, on every kind of problem it is made for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.schedules.problems import lognormal_items
from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.bounds import capped_bound, ideal, lower_bound
from ultraep_compile.schedules.nested import Rule, least_memory, nest
from ultraep_compile.schedules.plan import plan, plan_many
from ultraep_compile.schedules.problem import Caps, Encoder, Generator, Problem, place_virtual, uniform_problem
from ultraep_compile.schedules.simulate import bubbles, peaks, simulate
from ultraep_compile.schedules.validate import validate

CLOSE = 1 + 1e-9


def uniform(p, m, share, of_all=True, generator=None):
    """An encoder that costs `share` of the whole LLM (or of one stage), a third of it forward."""
    cost = share * 3 * (p if of_all else 1)
    return uniform_problem(p, m, encoder=(cost / 3, 2 * cost / 3), generator=generator)


def makespan(schedule):
    return simulate(schedule).makespan


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("of_all", [True, False], ids=["of the LLM", "of a stage"])
def test_uniform_costs(p, groups, share, of_all):
    problem = uniform(p, groups * p, share, of_all)
    plain = nest(problem, Rule(fill=0))
    assert makespan(plain) <= ideal(problem) * CLOSE
    filled = plan(problem)
    bound = capped_bound(problem, 2, filled.caps.llm)
    assert bound * (1 - 1e-9) <= makespan(filled) <= bound * (1.065 if groups == 2 else 1.035)
    assert max(peaks(filled).encoder) == 2
    assert peaks(filled).llm == tuple(float(p - r) for r in range(p))


def test_filling_reaches_the_bound_where_bubbles_are_large():
    problem = uniform(8, 32, 0.3)
    filled = plan(problem)
    assert makespan(filled) == pytest.approx(capped_bound(problem, 2, filled.caps.llm))
    assert makespan(filled) == pytest.approx(ideal(problem) - 7.2)  # one microbatch's encoder work


@pytest.mark.parametrize("p", [2, 4, 8])
def test_memory_does_not_grow_with_microbatches(p):
    short, long = (peaks(plan(uniform(p, n * p, 0.3, generator=p / 3))) for n in (3, 64))
    assert short == long
    short, long = (peaks(plan(uniform(p, n * p, 0.3))) for n in (2, 64))
    assert short == long


@pytest.mark.parametrize("p", [3, 4, 8])
@pytest.mark.parametrize("lag", [1, "p"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_encoder_memory_formula(p, lag, ahead):
    problem = uniform(p, 6 * p, 0.3, generator=p if lag == "p" else None)
    w = p if lag == "p" else 1
    assert least_memory(problem, Rule(family="time" if ahead else "wave", ahead=ahead)) == math.ceil(
        (2 * p + w - 2 + ahead) / p
    )


@pytest.mark.parametrize(
    ("base", "v"), [("interleaved", 2), ("interleaved", 4), ("gpipe", 1), ("zero-bubble", 1)]
)
def test_any_base_schedule_costs_the_encoder_work_and_no_more(base, v):
    problem = place_virtual(uniform(4, 16, 0.3), v)
    schedule = nest(problem, Rule(base=base, fill=0))
    validate(schedule)
    assert makespan(schedule) <= ideal(problem, base) * CLOSE
    alone = nest(problem.llm_only(), Rule(base=base))
    assert peaks(schedule).llm == peaks(alone).llm


def test_dualpipev_can_be_nested():
    problem = place_virtual(uniform(4, 16, 0.3), 2, "vee")
    schedule = plan(problem, base="dualpipev")
    validate(schedule)
    assert makespan(schedule) <= ideal(problem, "dualpipev") * 1.01


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(("q", "lag"), [(8, 8), (4, 5), (2, 3), (1, 2)])
def test_generator_groups(q, lag, share):
    problem = uniform(8, 32, 0.3, generator=share * 24)
    schedule = plan(problem, generator_group=q)
    validate(schedule)
    peak = peaks(schedule)
    assert makespan(schedule) <= ideal(problem) * 1.02
    assert max(peak.generator) == q / 8
    assert peak.llm == tuple(float(8 - r + lag - 1) for r in range(8))
    assert max(peak.encoder) <= 3


def test_cheap_generators_stay_where_they_are():
    problem = uniform_problem(2, 6, generator=0.05)
    schedule = plan(problem)
    validate(schedule)
    assert makespan(schedule) <= makespan(plan(problem, "colocated")) * CLOSE


@pytest.mark.parametrize("cv", [0, 0.3, 0.6, 1.0, 1.5])
@pytest.mark.parametrize("items", [4, 8])
def test_uneven_items_are_balanced(cv, items):
    for seed in range(3):
        encoder = lognormal_items(8, 64, cv, 0.3, items, seed)
        problem = Problem(8, 64, (1.0,) * 64, (2.0,) * 64, (encoder,))
        schedule = plan(problem)
        dearest = (
            max(f * max(i) for f, i in zip(encoder.forward, encoder.items, strict=True))
            / encoder.mean_forward
        )
        assert makespan(schedule) <= ideal(problem) * CLOSE
        assert max(peaks(schedule).encoder) <= max(1.8 * 2, dearest + 1.3)


def test_uneven_whole_microbatches_are_grouped_alike():
    encoder = replace(lognormal_items(8, 64, 0.6, 0.3, 4, 0), items=())
    problem = Problem(8, 64, (1.0,) * 64, (2.0,) * 64, (encoder,))
    schedule = plan(problem)
    assert max(peaks(schedule).encoder) == 2
    assert makespan(schedule) < makespan(nest(problem)) * 0.97
    assert makespan(schedule) <= ideal(problem) * CLOSE


def checked(problem, base="1f1b", **choices):
    schedule = plan(problem, base=base, **choices)
    validate(schedule)
    return schedule


def test_frozen_encoders_have_no_backward_and_hold_one():
    schedule = checked(uniform_problem(4, 16, encoder=(2.0, 0.0)))
    assert not any(op.kind == "EB" for ops in schedule.ranks for op in ops)
    assert max(peaks(schedule).encoder) == 1


def test_text_only_microbatches_have_no_encoder_operation():
    forward = tuple(2.0 if j % 3 == 0 else 0.0 for j in range(16))
    problem = Problem(4, 16, (1.0,) * 16, (2.0,) * 16, (Encoder(forward, tuple(2 * x for x in forward)),))
    schedule = checked(problem)
    assert {op.microbatch for ops in schedule.ranks for op in ops if op.kind == "EF"} == set(range(0, 16, 3))
    assert makespan(schedule) <= ideal(problem) * 1.03
    checked(replace(problem, encoders=(Encoder((0.0,) * 16, (0.0,) * 16),)))


def test_text_only_answers_have_no_generator_operation():
    cost = tuple(3.0 * (j % 2) for j in range(16))
    schedule = checked(Problem(4, 16, (1.0,) * 16, (2.0,) * 16, generators=(Generator(cost),)))
    assert {op.microbatch for ops in schedule.ranks for op in ops if op.kind == "G"} == set(range(1, 16, 2))


def test_encoders_of_different_depth():
    m = 16
    deep, flat = Encoder((3.0,) * m, (6.0,) * m, name="video"), Encoder((0.5,) * m, (1.0,) * m, name="audio")
    problem = Problem(4, m, (1.0,) * m, (2.0,) * m, (deep, flat))
    schedule = checked(problem)
    assert makespan(schedule) <= ideal(problem) * CLOSE
    assert max(peaks(schedule).encoder) == 2


@pytest.mark.parametrize(
    "feeds", [(0, 1, 2, 3), (0, 1, 2), (2,)], ids=["cross-attention", "several early", "late"]
)
def test_features_may_go_to_any_stages(feeds):
    problem = uniform(4, 16, 0.2)
    problem = replace(problem, encoders=(replace(problem.encoders[0], feeds=feeds),))
    schedule = checked(problem)
    assert makespan(schedule) <= ideal(problem) * CLOSE
    assert max(peaks(schedule).encoder) == 2


@pytest.mark.parametrize("m", [8, 9, 11, 13, 15, 17])
@pytest.mark.parametrize("base", ["1f1b", "interleaved"])
def test_counts_that_do_not_divide(m, base):
    problem = place_virtual(uniform(4, m, 0.2, generator=2.0), 2 if base == "interleaved" else 1)
    schedule = checked(problem, base)
    assert makespan(schedule) <= makespan(plan(problem, "colocated", base)) * CLOSE


@pytest.mark.parametrize("latency", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("v", [1, 2])
def test_latency_costs_the_pipeline_not_the_nesting(latency, v):
    problem = place_virtual(uniform_problem(8, 32, encoder=(2.4, 4.8), latency=latency), v)
    base = "interleaved" if v > 1 else "1f1b"
    assert makespan(checked(problem, base)) <= makespan(plan(problem, "encoder-first", base)) * 1.01


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_plans_stand_noise(noise):
    """A plan made with nominal costs, played with others, against unlimited memory under the same noise."""
    problem = uniform(8, 32, 0.3)
    ours = sum(simulate(plan(problem), noise, seed).makespan for seed in range(5))
    free = sum(simulate(plan(problem, "encoder-first"), noise, seed).makespan for seed in range(5))
    assert ours <= free


def test_planning_is_deterministic_and_many_pipelines_are_independent():
    problems = [
        Problem(4, 16, (1.0,) * 16, (2.0,) * 16, (lognormal_items(4, 16, 0.6, 0.3, 4, s),)) for s in range(4)
    ]
    assert plan_many(problems) == [plan(p) for p in problems]


def test_idle_time_is_all_accounted_for():
    schedule = plan(uniform(4, 16, 0.3))
    timeline = simulate(schedule)
    idle = bubbles(timeline)
    busy = sum(
        e - s for row in zip(timeline.start, timeline.end, strict=True) for s, e in zip(*row, strict=True)
    )
    assert sum(sum(rank.values()) for rank in idle) == pytest.approx(4 * timeline.makespan - busy)
    assert timeline.bubble == pytest.approx(1 - busy / (4 * timeline.makespan))
    assert lower_bound(schedule.problem) <= timeline.makespan


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plan(uniform(4, 3, 0.3)), "do not fill one group of 4"),
        (lambda: plan(uniform(4, 3, 0.3), "flush"), "do not fill one group of 4"),
        (lambda: plan(uniform(4, 8, 0.3), memory=1), "at least 2"),
        (lambda: plan(place_virtual(uniform(4, 16, 0.3), 2), base="interleaved", memory=2), "at least 3"),
        (lambda: plan(uniform(4, 8, 0.3), "nestd"), "Did you mean 'nested'"),
        (lambda: plan(uniform(4, 8, 0.3), base="1f2b"), "Did you mean '1f1b'"),
        (lambda: plan(uniform(4, 8, 0.3, generator=1.0), generator_group=3), "does not divide 4 ranks"),
        (lambda: plan(replace(uniform(4, 8, 0.3), caps=Caps(llm=(3.0,) * 4))), "LLM memory limit of 3"),
        (lambda: plan(replace(uniform(4, 8, 0.3), caps=Caps(encoder=1.5))), "encoder memory limit of 1.5"),
        (lambda: plan(uniform(4, 8, 0.3, generator=1.0), "optimus"), "encoder work only"),
        (lambda: plan(uniform(2, 8, 0.3, generator=1.0), "disttrain"), "too few"),
        (lambda: plan(place_virtual(uniform(4, 8, 0.3), 2), "disttrain"), "one virtual stage"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(make, words):
    with pytest.raises(ScheduleError, match=words):
        make()
