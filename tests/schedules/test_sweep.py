"""Random problems: every plan sound, within its memory, and never slower than co-location."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedules.problems import check_plan, random_problem
from ultraep_compile.schedules.plan import plan
from ultraep_compile.schedules.problem import uniform_problem
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9_999))
def test_random_problems(seed):
    check_plan(*random_problem(seed))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 10_000, 500))
def test_ten_thousand_random_problems(start):
    for seed in range(start, start + 500):
        check_plan(*random_problem(seed))


@pytest.mark.parametrize("stages", range(1, 5))
@pytest.mark.parametrize("encoders", range(3))
def test_every_small_grid_point(stages, encoders):
    for microbatches in range(stages, 7):
        problem = uniform_problem(stages, microbatches, encoder=(0.7, 1.4) if encoders else None)
        problem = type(problem)(
            stages, microbatches, problem.llm_forward, problem.llm_backward, problem.encoders * encoders
        )
        schedule = plan(problem)
        validate(schedule)
        assert max(peaks(schedule).encoder) <= 2
        assert simulate(schedule).makespan <= simulate(plan(problem, "colocated")).makespan * (1 + 1e-9)
