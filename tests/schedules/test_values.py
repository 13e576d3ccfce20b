"""Problems, operations and schedules as values: checks, text and JSON forms, equality."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedules.problems import random_problem
from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import KINDS, Op, from_json, parse_op, parse_schedule
from ultraep_compile.schedules.nested import nest
from ultraep_compile.schedules.plan import plan_nested
from ultraep_compile.schedules.problem import (
    Caps,
    Encoder,
    Problem,
    items_from_sizes,
    place_virtual,
    uniform_problem,
)
from ultraep_compile.schedules.report import report, report_json, schedule_of_report

small = st.integers(0, 300)
ops = st.one_of(
    st.builds(Op, st.sampled_from(KINDS), small, small, st.just(())),
    st.builds(
        Op,
        st.sampled_from(("EF", "EB", "G")),
        small,
        st.just(-1),
        st.lists(st.tuples(small, small), min_size=1, max_size=5).map(tuple),
    ),
)


@given(ops)
def test_an_operation_prints_and_parses_back(op):
    assert parse_op(str(op)) == op


def test_operations_print_as_in_torch_pipelining():
    assert str(Op("F", 2, 0)) == "2F0"
    assert str(Op("EF", 0, -1, ((3, 0), (5, 2)))) == "0EF(3.0,5.2)"
    assert Op("EF", 0, -1, ((3, 0), (3, 1), (5, 2))).microbatches == (3, 5)


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2F", "2F0 ", "0EF()", "0EF(1)", "-1F0", "2F0x"])
def test_what_is_no_operation_is_refused(text):
    with pytest.raises(ScheduleError, match="not an operation"):
        parse_op(text)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_schedules_survive_text_and_json(seed):
    schedule = plan_nested(*random_problem(seed))
    assert parse_schedule(str(schedule)) == schedule
    assert from_json(schedule.to_json()) == schedule
    assert schedule_of_report(json.loads(json.dumps(report_json(report(schedule))))) == schedule
    assert hash(schedule) == hash(parse_schedule(str(schedule)))


def test_schedules_compare():
    a, b = nest(uniform_problem(2, 4, encoder=(1, 2))), nest(uniform_problem(2, 4, encoder=(1, 2)))
    assert a == b
    assert a != nest(uniform_problem(2, 4, encoder=(1, 3)))
    assert a != replace(a, ranks=(a.ranks[0][::-1], a.ranks[1]))


@pytest.mark.parametrize(
    "text", ["", "hello", "# pipeline schedule, format 1\n# {}\n", "# pipeline schedule, format 1\n# {"]
)
def test_foreign_text_is_refused(text):
    with pytest.raises(ScheduleError, match="schedule"):
        parse_schedule(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"problem": {}}', '{"problem": {"x": 1}, "ranks": []}', '{"problem": 3}']
)
def test_foreign_json_is_refused(text):
    with pytest.raises(ScheduleError, match="schedule"):
        from_json(text)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: uniform_problem(0, 4), "at least one stage"),
        (lambda: uniform_problem(-2, 4), "at least one stage"),
        (lambda: uniform_problem(2, 0), "at least one microbatch"),
        (lambda: uniform_problem(2, True), "at least one microbatch"),
        (lambda: uniform_problem(2, 2.5), "at least one microbatch"),
        (lambda: Problem(2, 4, (1.0,) * 3, (2.0,) * 4), "llm_forward has 3 entries, not 4"),
        (lambda: Problem(2, 4, (1.0,) * 4, (2.0,) * 5), "llm_backward has 5 entries, not 4"),
        (lambda: uniform_problem(2, 4, (1, -2)), r"llm_backward\[0\] is -2"),
        (lambda: uniform_problem(2, 4, (NAN, 2)), r"llm_forward\[0\] is nan"),
        (lambda: uniform_problem(2, 4, encoder=(INF, 2)), r"encoder_forward\[0\] is inf"),
        (lambda: uniform_problem(2, 4, encoder=("a", 2)), r"encoder_forward\[0\] is 'a'"),
        (lambda: uniform_problem(2, 4, (0, 2)), "cost nothing"),
        (lambda: uniform_problem(2, 4, latency=-1.0), "latency is -1"),
        (lambda: uniform_problem(2, 4, latency=NAN), "latency is nan"),
        (lambda: uniform_problem(2, 4, input_share=1.0), "input_share"),
        (lambda: uniform_problem(2, 4, caps=Caps(encoder=0)), "No encoder can run"),
        (lambda: uniform_problem(2, 4, caps=Caps(llm=(1.0,))), "LLM's memory limit"),
        (lambda: uniform_problem(2, 4, stage_rank=(0, 2)), "outside 0..1"),
        (lambda: uniform_problem(2, 4, stage_share=(1.0,)), "one share per stage"),
        (lambda: place_virtual(uniform_problem(2, 4), 0), "at least one virtual stage"),
        (lambda: Problem(1, 2, (1.0,) * 2, (2.0,) * 2, (Encoder((1.0, 1.0), feeds=(1,)),)), "feeds stages"),
        (
            lambda: Problem(1, 2, (1.0,) * 2, (2.0,) * 2, (Encoder((0.0, 1.0), (2.0, 2.0)),)),
            "backward but no forward",
        ),
        (lambda: Problem(1, 1, (1.0,), (2.0,), (Encoder((1.0,), items=((0.5, 0.4),)),)), "must sum to 1"),
        (
            lambda: Problem(1, 2, (1.0,) * 2, (2.0,) * 2, (Encoder((1.0, 1.0), items=((1.0,),)),)),
            "lists the items of 1",
        ),
    ],
)
def test_impossible_problems_are_refused_in_words(make, words):
    with pytest.raises(ScheduleError, match=words):
        make()


def test_items_share_their_microbatch():
    encoder = items_from_sizes([[1, 3], [], [2, 2]], backward_ratio=2, name="vision")
    assert encoder.forward == (4.0, 0.0, 4.0)
    assert encoder.backward == (8.0, 0.0, 8.0)
    assert encoder.items == ((0.25, 0.75), (), (0.5, 0.5))
    assert encoder.mean_forward == 4.0
