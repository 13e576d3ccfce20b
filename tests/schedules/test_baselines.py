"""Baselines: sound schedules of the same problem, with the makespans and peaks of their definitions."""

from __future__ import annotations

import pytest

from tests.schedules.problems import lognormal_items
from ultraep_compile.schedules.baselines import flush, with_recompute
from ultraep_compile.schedules.bounds import ideal
from ultraep_compile.schedules.nested import nest
from ultraep_compile.schedules.plan import BASELINES, plan
from ultraep_compile.schedules.problem import Problem, place_virtual, uniform_problem
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate

# P, groups, encoder share of the whole LLM (or of a stage), makespan / ideal of each method: three digits, by
# an independent simulation of the same definitions
METHODS = ("colocated", "uneven", "flush", "recompute", "optimus")
TABLE = [
    (4, 4, 0.3, False, (1.134, 1.011, 1.446, 1.020, 0.955)),
    (8, 4, 0.6, False, (1.316, 1.013, 1.507, 1.019, 0.957)),
    (8, 4, 0.1, True, (1.431, 1.017, 1.498, 1.025, 0.943)),
    (4, 4, 0.3, True, (1.513, 1.038, 1.378, 1.067, 1.017)),
    (8, 4, 0.3, True, (2.239, 1.630, 1.432, 1.066, 0.984)),
    (8, 8, 0.3, True, (2.412, 1.729, 1.543, 1.071, 0.987)),
]
DISTTRAIN = {(4, 0.3, False): 1.203, (8, 0.6, False): 1.063, (8, 0.1, True): 1.048, (4, 0.3, True): 1.059}
PEAKS = {"flush": 1, "recompute": 1}


@pytest.mark.parametrize(("p", "groups", "share", "of_all", "expected"), TABLE)
def test_uniform_makespans(p, groups, share, of_all, expected):
    cost = share * (p if of_all else 1)
    problem = uniform_problem(p, p * groups, encoder=(cost, 2 * cost))
    for method, ratio in zip(METHODS, expected, strict=True):
        schedule = plan(problem, method)
        validate(schedule)
        assert simulate(schedule).makespan / ideal(problem) == pytest.approx(ratio, abs=0.0006), method
        if method in PEAKS:
            assert max(peaks(schedule).encoder) == PEAKS[method]
        if method in ("colocated", "uneven"):
            assert max(peaks(schedule).encoder) == p
    schedule = plan(problem, "encoder-first")
    assert simulate(schedule).makespan == pytest.approx(ideal(problem))
    assert set(peaks(schedule).encoder) == {groups}
    two = flush(problem, groups=2)
    validate(two)
    assert max(peaks(two).encoder) == 2
    # an ordering search found what this fixed order does not: 0.6% at most
    expected_dist = DISTTRAIN.get((p, share, of_all))
    if expected_dist and groups == 4:
        found = simulate(plan(problem, "disttrain")).makespan / ideal(problem)
        assert found == pytest.approx(expected_dist, rel=0.007)


@pytest.mark.parametrize("method", sorted(BASELINES))
def test_generators_and_uneven_costs(method):
    encoder = lognormal_items(4, 16, 1.0, 0.3, 4, 3)
    plain = Problem(4, 16, (1.0,) * 16, (2.0,) * 16, (encoder,))
    validate(plan(plain, method))
    if method != "optimus":
        problem = uniform_problem(4, 16, encoder=(1, 2), generator=3.0)
        schedule = plan(problem, method)
        validate(schedule)
        assert simulate(schedule).makespan >= simulate(plan(problem)).makespan


@pytest.mark.parametrize("method", ["colocated", "uneven", "encoder-first", "flush", "optimus", "recompute"])
@pytest.mark.parametrize(("base", "v"), [("interleaved", 2), ("zero-bubble", 1), ("gpipe", 1)])
def test_any_base(method, base, v):
    validate(plan(place_virtual(uniform_problem(4, 9, encoder=(1, 2)), v), method, base))


def test_recomputation_costs_time_and_holds_inputs_only():
    problem = uniform_problem(4, 16, encoder=(1.0, 2.0))
    changed = with_recompute(problem, encoder=True, llm=True)
    assert changed.encoders[0].backward == (3.0,) * 16 and changed.llm_backward == (3.0,) * 16
    assert with_recompute(changed, encoder=True, llm=True) == changed
    schedule = nest(changed)
    validate(schedule)
    assert max(peaks(schedule).encoder) == 1 and max(peaks(schedule).llm) == 1


def test_the_dead_weight_of_tiny_llms_goes_to_nobody():
    """An encoder larger than the LLM: re-splitting leaves the first rank without layers."""
    schedule = plan(uniform_problem(4, 8, encoder=(20.0, 40.0)), "uneven")
    validate(schedule)
    assert schedule.problem.stage_share[0] == 0.0
