"""Bounds and builders against exhaustive search on tiny problems."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.bounds import capped_bound, ideal, lower_bound
from ultraep_compile.schedules.plan import plan
from ultraep_compile.schedules.problem import Caps, Problem, uniform_problem
from ultraep_compile.schedules.search import exhaustive
from ultraep_compile.schedules.simulate import simulate
from ultraep_compile.schedules.validate import validate

TINY = [(1, 3, 3.0), (2, 2, 1.5), (2, 4, 1.5), (2, 4, 3.0), (2, 4, 6.0), (3, 3, 3.0), (3, 3, 7.5)]


@pytest.mark.parametrize(("p", "m", "cost"), TINY)
def test_nested_schedules_of_whole_groups_are_optimal(p, m, cost):
    problem = uniform_problem(p, m, encoder=(cost / 3, 2 * cost / 3))
    ours = plan(problem)
    best = exhaustive(problem, ours.caps, simulate(ours).makespan + 1e-6)
    assert best is not None
    validate(best)
    found = simulate(best).makespan
    assert found == pytest.approx(simulate(ours).makespan)
    bounds = lower_bound(problem), capped_bound(problem, ours.caps.encoder or 0, ours.caps.llm or ())
    assert max(bounds) <= found * (1 + 1e-9)
    assert found <= ideal(problem) * (1 + 1e-9)


@pytest.mark.parametrize("cost", [0.6, 1.5, 3.6, 6.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("latency", [0.0, 0.3])
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_no_schedule_beats_the_bounds(cost, ratio, latency, cap):
    """All hostings of two ranks: the bounds hold whatever rank runs which encoder work."""
    problem = uniform_problem(2, 3, (1.0, ratio), (cost / 3, 2 * cost / 3), latency=latency)
    caps = Caps(encoder=cap, llm=(2.0, 1.0))
    best = float("inf")
    for bits in range(4):
        found = exhaustive(problem, caps, best, (0, bits & 1, bits >> 1))
        if found is not None:
            validate(found)
            best = simulate(found).makespan
    assert lower_bound(problem) <= best * (1 + 1e-9)
    assert capped_bound(problem, cap, (2.0, 1.0)) <= best * (1 + 1e-9)


@pytest.mark.parametrize("items", [(0.0, 1.0, 2.0), (2.0, 0.0, 0.0), (1.0, 3.0, 0.5)])
def test_uneven_and_text_only_bounds(items):
    base = uniform_problem(2, 3, encoder=(1.0, 2.0))
    encoder = replace(base.encoders[0], forward=items, backward=tuple(2 * x for x in items))
    problem = replace(base, encoders=(encoder,))
    caps = Caps(encoder=2, llm=(2.0, 1.0))
    found = exhaustive(problem, caps)
    assert found is not None
    assert capped_bound(problem, 2, (2.0, 1.0)) <= simulate(found).makespan * (1 + 1e-9)


@pytest.mark.parametrize("generator", [0.5, 2.0])
def test_generator_bounds(generator):
    problem = uniform_problem(2, 3, encoder=(0.5, 1.0), generator=generator)
    found = exhaustive(problem, Caps(encoder=2, llm=(3.0, 2.0)))
    assert found is not None
    validate(found)
    assert lower_bound(problem) <= simulate(found).makespan * (1 + 1e-9)
    assert simulate(plan(problem)).makespan <= ideal(problem) * 1.1


def test_impossible_caps_have_no_schedule():
    problem = uniform_problem(2, 2, encoder=(1.0, 2.0))
    assert exhaustive(problem, Caps(llm=(0.5, 0.5))) is None
    assert exhaustive(problem, Caps(), best=1.0) is None
    with pytest.raises(ScheduleError, match="ends at"):
        exhaustive(uniform_problem(4, 16), Caps())


def test_formulas_of_uniform_costs():
    problem = uniform_problem(8, 32, encoder=(2.4, 4.8))
    assert ideal(problem) == pytest.approx((32 + 7) * 3 + 32 * 7.2 / 8)
    assert lower_bound(problem) == pytest.approx(32 * 3 + 32 * 7.2 / 8)
    few = uniform_problem(8, 8, encoder=(0.1, 0.2))
    assert lower_bound(few) == pytest.approx(0.1 + 7 + 8 * 3 + 14 + 0.2)
    assert capped_bound(problem, 2, tuple(8.0 - r for r in range(8))) == pytest.approx(ideal(problem) - 7.2)


def test_split_backwards_have_their_own_bound():
    problem = Problem(4, 8, (1.0,) * 8, (2.0,) * 8)
    assert lower_bound(problem, split=True) == 3 + 8 * 3 < lower_bound(problem)
    schedule = plan(problem, base="zero-bubble")
    assert lower_bound(problem, split=True) <= simulate(schedule).makespan
