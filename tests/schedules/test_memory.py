"""Memory that is granted is used, and never exceeded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.schedules.problems import check_memory_asked, contest_problem, contests, lognormal_items
from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.fit import fit
from ultraep_compile.schedules.improve import improve
from ultraep_compile.schedules.nested import Rule, nest
from ultraep_compile.schedules.plan import plan
from ultraep_compile.schedules.problem import Caps, Encoder, Generator, Problem, items_from_sizes, uniform_problem
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate


def ragged(seed: int, p: int, m: int, cv: float, items: int, share: float = 0.3) -> Problem:
    encoder = lognormal_items(p, m, cv, share, items or 1, seed)
    return Problem(p, m, (1.0,) * m, (2.0,) * m, (encoder if items else replace(encoder, items=()),))


RECUT = ("uneven", "disttrain")  # cut the LLM anew, which nested may not: now and then faster


def check_contest(seed: int) -> None:
    for result in contests(*contest_problem(seed)):
        assert result.held <= result.memory + 1e-6, result
        assert result.ratio <= 1.005 or result.method in RECUT, result


@pytest.mark.parametrize("seed", [4, 10, 18, 51, 57, 104, 113])
def test_no_method_is_faster_in_the_same_memory(seed: int) -> None:
    check_contest(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_no_method_is_faster_in_200_problems(seed: int) -> None:
    check_contest(seed)


@pytest.mark.parametrize("memory", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_items_stay_within_the_memory_asked_for_or_the_least_is_said(seed: int, memory: int) -> None:
    check_memory_asked(ragged(seed, 4, 12, 0.8, 1 + seed, 0.1), "1f1b", memory)


def test_whole_microbatches_use_what_they_are_granted() -> None:
    for seed in range(3):
        problem = ragged(seed, 4, 16, 1.0, 0)
        least, more = plan(problem), plan(problem, memory=4)
        validate(more)
        assert max(peaks(least).encoder) == 2 < max(peaks(more).encoder) <= 4
        assert simulate(more).makespan < simulate(least).makespan * 0.98


def test_one_item_larger_than_the_memory_is_refused_before() -> None:
    encoder = items_from_sizes([[1.0]] * 7 + [[30.0]])
    generator = Generator((9.0,) * 8)  # no method without items for it
    problem = Problem(4, 8, (1.0,) * 8, (2.0,) * 8, (encoder,), (generator,))
    assert not check_memory_asked(problem, "1f1b", 3)


def test_a_limit_of_the_problem_binds_as_the_argument_does() -> None:
    problem = ragged(1, 4, 16, 0.6, 4)
    free, tight = plan(problem, memory=8), plan(replace(problem, caps=Caps(encoder=2.0)))
    validate(tight)
    assert max(peaks(tight).encoder) <= 2 + 1e-6 < max(peaks(free).encoder)


def test_generators_wait_in_smaller_groups_where_the_llm_has_no_room() -> None:
    problem = uniform_problem(4, 16, encoder=(1.0, 2.0), generator=3.0)
    tight = plan(replace(problem, caps=Caps(llm=(5.0,) * 4)))
    validate(tight)
    assert max(peaks(tight).llm) <= 5 < max(peaks(plan(problem)).llm)


@pytest.mark.parametrize("seed", range(12))
def test_fitted_schedules_run_or_are_refused_within_the_limit(seed: int) -> None:
    """Whatever the limit: the same operations in total, and no peak above it unless there is no way on."""
    problem = ragged(seed, 3, 9 + seed, 0.8, seed % 4)
    start = plan(problem, "encoder-first")
    limit = max(peaks(start).encoder) * 0.8
    made = fit(start, limit)
    try:
        validate(made)
    except ScheduleError as error:
        assert "deadlock" in str(error).lower() or "Deadlock" in str(error)
    else:
        assert max(peaks(made).encoder) <= max(limit, 1.0) * 1.5 + 1e-6
    assert fit(start, 1e9) == start


@pytest.mark.parametrize("seed", range(4))
def test_local_search_stays_sound_within_its_caps_and_repeats_itself(seed: int) -> None:
    problem = ragged(seed, 3, 9, 1.0, seed % 2 * 3)
    start = nest(problem, Rule(fill=0, family="time", ahead=1))
    found = improve(start, 0.0, 200)
    validate(found)
    assert simulate(found).makespan <= simulate(start).makespan
    assert found == improve(start, 0.0, 200)


def test_frozen_and_recomputed_encoders_need_no_more_than_one() -> None:
    forward = tuple(1.0 + j % 3 for j in range(16))
    frozen = Problem(4, 16, (1.0,) * 16, (2.0,) * 16, (Encoder(forward, (0.0,) * 16),))
    again = replace(frozen, encoders=(Encoder(forward, forward, recompute=True),))
    for problem in (frozen, again):
        schedule = plan(problem, memory=1)
        validate(schedule)
        assert max(peaks(schedule).encoder) == 1
