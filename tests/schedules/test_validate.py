"""The validator refuses every kind of broken schedule and names rank and operation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.schedules.mutations import (
    MESSAGE_MUTATIONS,
    MUTATIONS,
    edit,
    move_encoder_backward,
    move_llm_op,
    place,
    programs_of,
    repeat_elsewhere,
)
from tests.schedules.problems import random_problem
from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.messages import Transfer
from ultraep_compile.schedules.nested import nest
from ultraep_compile.schedules.plan import plan_nested
from ultraep_compile.schedules.problem import Caps, uniform_problem
from ultraep_compile.schedules.validate import data_edges, validate


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_mutated_schedules_are_refused(mutate):
    tried = 0
    for seed in range(60):
        draw = random.Random(seed)
        schedule = plan_nested(*random_problem(seed))
        if len(schedule.ranks) == 1 and mutate in (repeat_elsewhere, move_llm_op, move_encoder_backward):
            continue
        changed = mutate(schedule, draw)
        if changed is None:
            continue
        tried += 1
        with pytest.raises(ScheduleError):
            validate(changed)
    assert tried >= 10


@pytest.mark.parametrize("mutate", MESSAGE_MUTATIONS, ids=lambda f: f.__name__)
def test_mutated_messages_are_refused(mutate):
    schedule = nest(uniform_problem(4, 12, encoder=(1, 2), generator=2.0))
    for seed in range(25):
        programs = programs_of(schedule)
        mutate(programs, random.Random(seed))
        with pytest.raises(ScheduleError):
            validate(schedule, tuple(map(tuple, programs)))


def test_rendezvous_deadlock_is_found_although_every_pair_agrees():
    """Rank 1 holds back its first outputs until it has received microbatch 5, which rank 0 runs after a
    backward."""
    schedule = nest(uniform_problem(4, 8))
    programs = programs_of(schedule)
    queue = [a for a in programs[1] if isinstance(a, Transfer) and a.message.channel == "FWD"]
    last = next(a for a in queue if a.kind == "RECV" and a.message.microbatch == 5)
    ran = programs[1][: programs[1].index(Op("B", 1, 0))]
    held_back = [a for a in queue if a.kind == "SEND" and a.message.producer in ran]
    program = [a for a in programs[1] if a not in held_back]
    program.remove(last)
    first_backward = program.index(Op("B", 1, 0))
    program[first_backward:first_backward] = [last, *held_back]
    early = [
        a for a in program[first_backward:] if isinstance(a, Transfer) and a in queue and a.kind == "RECV"
    ]
    early = [a for a in early if a.message.microbatch < 5]
    program = [a for a in program if a not in early]
    at = program.index(last)
    program[at:at] = early
    programs[1] = program
    with pytest.raises(ScheduleError, match="Deadlock when sends wait"):
        validate(schedule, tuple(map(tuple, programs)))


def test_failures_name_rank_and_operation_and_show_the_place():
    schedule = nest(uniform_problem(4, 8, encoder=(1, 2)))
    r, i = place(schedule, Op("B", 2, 3))
    ops = list(schedule.ranks[r])
    ops.insert(0, ops.pop(i))
    with pytest.raises(ScheduleError) as caught:
        validate(edit(schedule, r, ops))
    text = str(caught.value)
    assert "Rank 2" in text and "2B3" in text and ">>2B3<<" in text and "rank 3:" in text


def test_limits_of_the_problem_bind():
    problem = uniform_problem(4, 8, encoder=(1, 2))
    schedule = nest(problem)
    tight = replace(schedule, problem=replace(problem, caps=Caps(llm=(3.0, 3.0, 3.0, 3.0))))
    with pytest.raises(ScheduleError, match="stage activations"):
        validate(tight)
    tight = replace(schedule, problem=replace(problem, caps=Caps(encoder=1)))
    with pytest.raises(ScheduleError, match="microbatches of the encoder"):
        validate(tight)


def test_sound_schedules_pass():
    for seed in range(40):
        validate(plan_nested(*random_problem(seed + 500)))


def test_validator_and_simulator_know_the_same_dependencies():
    """Two definitions, written apart: per operation in dependencies.py, per microbatch in validate.py."""
    for seed in range(60):
        schedule = plan_nested(*random_problem(seed))
        graph = Graph(schedule.problem, schedule.ranks)
        theirs = {(graph.ops[p], op) for op, need in zip(graph.ops, graph.preds, strict=True) for p in need}
        places = {op: (r, i) for r, ops in enumerate(schedule.ranks) for i, op in enumerate(ops)}
        ours = set(data_edges(schedule.problem, places))
        assert theirs <= ours
        extra = ours - theirs  # a stage's own activations, which data already orders
        assert all(a.kind == "F" and b.kind in ("B", "I") and a.stage == b.stage for a, b in extra)
