"""Base schedules against the formulas known for them."""

from __future__ import annotations

import pytest

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.base import base_order
from ultraep_compile.schedules.problem import place_virtual, uniform_problem
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate


def made(base, p, v, m, lag=1):
    problem = place_virtual(uniform_problem(p, m), v, "vee" if base == "dualpipev" else "loop")
    schedule = Schedule(problem, tuple(map(tuple, base_order(base, p, v, m, lag))), base)
    validate(schedule)
    return schedule


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 5), (4, 8), (4, 11), (8, 24)])
@pytest.mark.parametrize("lag", [1, 2, 4])
def test_1f1b(p, m, lag):
    schedule = made("1f1b", p, 1, m, lag)
    assert simulate(schedule).makespan == (m + p - 1) * 3
    assert peaks(schedule).llm == tuple(min(m, p - r + lag - 1) for r in range(p))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16), (8, 24)])
@pytest.mark.parametrize("v", [2, 4])
def test_interleaving_divides_the_bubble(p, m, v):
    schedule = made("interleaved", p, v, m)
    assert simulate(schedule).makespan == pytest.approx(3 * m + 3 * (p - 1) / v)
    assert max(peaks(schedule).llm) == min(m, (2 * (p - 1) + (v - 1) * p + 1) / v)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 24)])
def test_zero_bubble_fills_with_weight_gradients(p, m):
    schedule = made("zero-bubble", p, 1, m)
    assert simulate(schedule).makespan == 3 * m + (p - 1) * (1 + 1 - 1)
    assert set(peaks(schedule).llm) == {float(p)}


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 20), (8, 24)])
def test_dualpipev_is_even_in_memory(p, m):
    schedule = made("dualpipev", p, 2, m)
    assert set(peaks(schedule).llm) == {p + 0.5}
    assert simulate(schedule).makespan <= simulate(made("interleaved", p, 2, m)).makespan


def test_gpipe_holds_everything():
    schedule = made("gpipe", 4, 1, 8)
    assert simulate(schedule).makespan == (8 + 3) * 3
    assert peaks(schedule).llm == (8.0,) * 4


@pytest.mark.parametrize("base", ["1f1b", "gpipe", "interleaved", "zero-bubble", "dualpipev"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (3, 1), (4, 3), (4, 9), (5, 13)])
def test_any_number_of_microbatches(base, p, m):
    made(base, p, 2 if base in ("interleaved", "dualpipev") else 1, m)


@pytest.mark.parametrize(
    ("base", "v", "words"),
    [
        ("1f1B", 1, "Did you mean '1f1b'"),
        ("dualpipev", 1, "2 virtual stages"),
        ("zero-bubble", 2, "1 virtual stage"),
    ],
)
def test_impossible_bases_are_refused(base, v, words):
    with pytest.raises(ScheduleError, match=words):
        base_order(base, 4, v, 8)
