"""Plans made beside a step: the same on every rank, waited for, and errors raised where the plan is wanted."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from tests.schedules.problems import lognormal_items
from ultraep_compile.errors import ScheduleError
from ultraep_compile.executor import planning
from ultraep_compile.executor.planning import Planner
from ultraep_compile.executor.settings import Settings
from ultraep_compile.schedules import Problem, plan


def ragged(seed: int, p: int = 4, m: int = 16, items: bool = True) -> Problem:
    encoder = lognormal_items(p, m, 0.8, 0.3, 4, seed)
    return Problem(p, m, (1.0,) * m, (2.0,) * m, (encoder if items else replace(encoder, items=()),))


def test_a_prepared_plan_is_the_thorough_one_on_every_rank() -> None:
    settings = Settings(16, encoder_memory=4)
    problem = ragged(1, items=False)
    expected = plan(problem, memory=4)
    for rank in range(4):
        planner = Planner(settings, rank)
        planner.prepare(problem)
        program = planner.program(problem)
        assert program.schedule == expected and program.rank == rank
        assert planner.program(problem) is program


def test_a_step_waits_for_the_plan_that_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the thread is, no other plan takes its place: ranks would differ."""
    gate, made = threading.Event(), []

    def slow(*args: object) -> object:
        made.append(threading.current_thread() is threading.main_thread())
        gate.wait(30)
        return plan(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(planning, "plan", slow)
    planner = Planner(Settings(16), 0)
    planner.prepare(ragged(2))
    planner.prepare(ragged(2))
    threading.Timer(0.05, gate.set).start()
    assert planner.program(ragged(2)).schedule == plan(ragged(2))
    assert made == [False]


def test_errors_of_the_background_are_raised_in_the_step_and_not_kept() -> None:
    planner = Planner(Settings(16, encoder_memory=1), 0)
    problem = ragged(3, items=False)
    planner.prepare(problem)
    for _ in range(2):
        with pytest.raises(ScheduleError, match="at least 2"):
            planner.program(problem)
    assert len(planner) == 0


def test_old_plans_are_let_go() -> None:
    planner = Planner(Settings(4), 0)
    before = threading.active_count()
    for seed in range(40):
        planner.prepare(ragged(seed, 2, 4))
        planner.program(ragged(seed, 2, 4))
    assert len(planner) == 32 and threading.active_count() <= before


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("memory", [None, 4])
def test_a_new_ragged_batch_is_planned_within_a_fraction_of_a_step(items: bool, memory: float | None) -> None:
    """50 ms on a quiet core, planned, proven and lowered; the least of several, because other work may share the core."""
    took = []
    for seed in range(4):
        planner = Planner(Settings(64, encoder_memory=memory), 3)
        problem = ragged(seed, 8, 64, items)
        start = time.thread_time()
        planner.program(problem)
        took.append(time.thread_time() - start)
    assert min(took) < 0.15, took
