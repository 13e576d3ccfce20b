"""Automatic choice, stage boundaries and cost formulas."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.auto import balanced_stages, choose
from ultraep_compile.schedules.costs import (
    Machine,
    Transformer,
    choose_for,
    explain,
    formulas,
    rank_memory,
    value,
)
from ultraep_compile.schedules.problem import uniform_problem
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate


def test_the_fastest_that_fits_is_taken_and_the_reason_told():
    problem = uniform_problem(4, 16, encoder=(1.0, 2.0))
    free = choose(problem)
    validate(free.schedule)
    fits = [t.makespan for t in free.tried if not t.refused]
    assert simulate(free.schedule).makespan <= min(fits) * 1.003
    tight = choose(problem, encoder_memory=2, llm_memory=4)
    validate(tight.schedule)
    peak = peaks(tight.schedule)
    assert max(peak.encoder) <= 2 and max(peak.llm) <= 4
    assert simulate(tight.schedule).makespan >= simulate(free.schedule).makespan * 0.997
    assert "refused: holds" in tight.why() and tight.why().startswith("chosen:")


def test_generator_groups_trade_memory_for_time():
    problem = uniform_problem(4, 16, encoder=(1.0, 2.0), generator=3.0)
    tight = choose(problem, llm_memory=5)
    assert max(peaks(tight.schedule).llm) <= 5
    assert tight.taken.generator_group < 4
    with pytest.raises(ScheduleError, match=r"No nested schedule fits: .*allowed"):
        choose(problem, llm_memory=2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_stage_boundaries_are_optimal(costs, stages):
    if stages > len(costs):
        with pytest.raises(ScheduleError, match="cannot fill"):
            balanced_stages(list(map(float, costs)), stages)
        return
    parts = balanced_stages(list(map(float, costs)), stages)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == stages and all(len(part) for part in parts)

    def least(first: int, left: int) -> int:  # all ways to cut
        if left == 1:
            return sum(costs[first:])
        return min(
            max(sum(costs[first:cut]), least(cut, left - 1))
            for cut in range(first + 1, len(costs) - left + 2)
        )

    assert max(sum(costs[i] for i in part) for part in parts) == least(0, stages)


LLM = Transformer(layers=24, width=2048, ffn=8192, key_width=512, vocabulary=128_000)
VIT = Transformer(layers=24, width=1024, ffn=4096)


def test_formulas_print_and_count():
    text = explain(LLM, 4096, 2048)
    assert "6*D*F*k*t" in text and set(formulas()) >= {"forward_flops", "activation_bytes", "parameters"}
    assert "a_enc*m_enc" in str(rank_memory())
    # a dense layer with full attention heads: 2 FLOP per parameter and token, plus attention over the context
    dense = Transformer(layers=1, width=8, ffn=32)
    weights = 4 * 8 * 8 + 3 * 8 * 32
    assert value("forward_flops", dense, 10, 0) == 2 * weights * 10
    assert value("forward_flops", dense, 10, 5) == 2 * weights * 10 + 4 * 10 * 5 * 8 / 2
    assert value("parameters", dense, 1, 1) == weights + 2 * 8
    assert value("backward_flops", dense, 10, 5) == 2 * value("forward_flops", dense, 10, 5)
    sparse = Transformer(layers=1, width=8, ffn=32, experts=16, top_k=2)
    assert value("parameters", sparse, 1, 1) == 4 * 64 + 16 * 3 * 8 * 32 + 16


def test_a_model_gets_a_plan_for_its_memory():
    wide = choose_for(LLM, 4, 16, 4096, Machine(200 * 2**30, 4e14), (VIT, 4096))
    validate(wide.schedule)
    assert "layers 0-" in wide.schedule.note
    needs = [float(t.refused.split()[1]) for t in choose_for_tight().tried if t.refused.startswith("needs")]
    assert needs and min(needs) > 40
    with pytest.raises(ScheduleError, match=r"needs .* GiB of 1 GiB"):
        choose_for(LLM, 4, 16, 4096, Machine(2**30, 4e14), (VIT, 4096))


def choose_for_tight():
    choice = choose_for(LLM, 4, 16, 4096, Machine(40 * 2**30, 4e14), (VIT, 4096))
    validate(choice.schedule)
    return choice


def test_planning_imports_nothing_heavy():
    code = "import ultraep_compile.schedules.plan, ultraep_compile.cli.schedule, sys\n"
    code += "print([m for m in ('torch', 'networkx', 'sympy', 'matplotlib', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
