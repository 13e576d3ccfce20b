"""The cost model: each formula against numbers worked out by hand, and the break-even against a search."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.planner.problems import skewed
from ultraep_compile import cost_model
from ultraep_compile.cost_model import Layer, Loads, Rates, break_even, evaluate, explain, memory, occurrences, traffic
from ultraep_compile.errors import OptionError
from ultraep_compile.planner import Plan, make_plan

ROUND = Rates(
    gemm_tflops=1.0, tile_rows=4, memory_gbs=1.0, dispatch_gbs=0.5, network_gbs=0.1, copy_gbs=2.0, reduce_gbs=4.0,
    plan_us=5.0,
)  # fmt: skip
SMALL = Layer(top_k=1, row_bytes=100, flops_per_row=10**6, expert_bytes=6000, gradient_bytes=4000)


def example() -> Plan:
    # two ranks, an expert and a slot each: expert 0 copied to rank 1, which computes 3 of its own 4 tokens
    return Plan(
        torch.tensor([[-1], [0]], dtype=torch.int32), torch.tensor([[3, 0, 1, 0], [1, 0, 0, 3]], dtype=torch.int32)
    )


def test_loads_of_a_plan():
    loads = Loads.of(example(), ROUND)
    assert loads.real_rows.tolist() == [4, 4]
    assert loads.rows.tolist() == [4, 8]  # quotas 4 | 1 and 3, each rounded up to 4
    assert loads.stay.tolist() == [3, 3]
    assert loads.out.tolist() == loads.back.tolist() == [1, 1]
    assert loads.copies_out.tolist() == loads.sends.tolist() == [1, 0]
    assert loads.copies_in.tolist() == [0, 1]
    assert loads.out_far.tolist() == loads.back_far.tolist() == [0, 0]
    apart = Loads.of(example(), ROUND, domain=1)
    assert apart.out.tolist() == [0, 0] and apart.out_far.tolist() == apart.back_far.tolist() == [1, 1]


def test_time_by_hand():
    loads = Loads.of(example(), ROUND)
    once = evaluate(loads, SMALL, ROUND, dict.fromkeys(cost_model.FORMULAS, 1)).parts
    assert once["gemm"] == pytest.approx(8 * 10**6 / 10**12 * 10**6)
    assert once["exchange"] == pytest.approx((2 * 200 * 3 / 1e9 + 200 * 1 / 0.5e9) * 1e6)
    assert once["replicate"] == pytest.approx(6000 / 2e9 * 1e6)
    assert once["reduce"] == pytest.approx(4000 / 4e9 * 1e6)
    assert once["plan"] == 5.0
    far = evaluate(Loads.of(example(), ROUND, 1), SMALL, ROUND, {"exchange": 1}).total
    assert far == pytest.approx((2 * 200 * 3 / 1e9 + 200 * 1 / 0.1e9) * 1e6)
    train = evaluate(loads, SMALL, ROUND, occurrences("train"))
    assert train.total == pytest.approx(
        3 * once["gemm"] + 2 * once["exchange"] + 2 * once["replicate"] + once["reduce"] + 5
    )


def test_what_happens_how_often():
    assert occurrences("forward") == {"gemm": 1, "exchange": 1, "replicate": 1, "reduce": 0, "plan": 1}
    assert occurrences("forward", history=8)["replicate"] == 1 / 8 and occurrences("forward", history=8)["plan"] == 0
    assert occurrences("train", history=8)["replicate"] == 1 and occurrences("train")["replicate"] == 2
    assert occurrences("train", planned=False)["plan"] == 0


def test_relays_shorten_the_queue_of_the_owner():
    counts_RE = torch.zeros(16, 16, dtype=torch.int64)
    counts_RE[:, 3] = 1000
    plan = make_plan(counts_RE, 1)
    direct = Loads.of(plan, Rates())
    relayed = Loads.of(plan, Rates(relay_from=4))
    assert direct.sends[3] == direct.copies_out[3] == relayed.copies_out[3] == 15
    assert relayed.sends[3] == 4  # the square root of 15, rounded up
    assert Loads.of(plan, Rates(relay_from=16)).sends[3] == 15


@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("domain", [None, 4])
def test_break_even_is_where_the_times_meet(phase, domain):
    rates, layer = Rates(tile_rows=1), Layer.gated(512, 256, 2)
    counts_RE = skewed(8, 4, 40000, 6.0, seed=3)
    plan = make_plan(counts_RE, 2)
    before, after = cost_model.of_counts(counts_RE, rates, domain), Loads.of(plan, rates, domain)
    times = occurrences(phase)
    tokens = break_even(before, after, layer, rates, times)
    assert tokens is not None and tokens > 0

    def gain(t: float) -> float:
        def scaled(loads: Loads) -> Loads:
            factor = t / (before.real_rows.mean() / layer.top_k)
            rows = ("rows", "real_rows", "stay", "out", "back", "out_far", "back_far")
            return dataclasses.replace(loads, **{name: getattr(loads, name) * factor for name in rows})

        without = evaluate(scaled(before), layer, rates, {**times, "plan": 0}).total
        return without - evaluate(scaled(after), layer, rates, times).total

    assert gain(tokens * 0.99) < 0 < gain(tokens * 1.01)


def test_break_even_at_the_ends():
    rates, layer = Rates(), Layer.gated(512, 256, 2)
    even = torch.full((4, 8), 100)
    loads = cost_model.of_counts(even, rates)
    assert break_even(loads, loads, layer, rates, occurrences()) is None  # nothing to gain, planning to pay
    assert break_even(loads, loads, layer, rates, occurrences(planned=False)) == 0.0
    nothing = cost_model.of_counts(torch.zeros(4, 8, dtype=torch.int64), rates)
    assert break_even(nothing, nothing, layer, rates, occurrences()) is None


def test_memory_and_traffic():
    layer = Layer.gated(4096, 1536, 8)
    assert layer.expert_bytes == 3 * 4096 * 1536 * 2 and layer.flops_per_row == layer.expert_bytes
    assert memory(layer, 256, 64 * 4096, 64, 2)["slots"] == 2 * layer.expert_bytes
    assert memory(layer, 256, 64 * 4096, 64, 2)["buffers"] >= 4096 * 8 * layer.row_bytes
    moved = traffic(Loads.of(example(), ROUND), SMALL)
    assert moved == {"domain_bytes": 2 * 2 * 100, "network_bytes": 0, "copy_bytes": 6000}


def test_a_recorded_layer():
    layer = Layer.gated(64, 24, 2, value_bytes=4)
    facts = {name: getattr(layer, name) for name in ("top_k", "row_bytes", "flops_per_row", "expert_bytes")}
    assert Layer.of_facts(facts, SMALL) == layer
    assert Layer.of_facts({"top_k": 2}, SMALL) == dataclasses.replace(SMALL, top_k=2)


def test_explain_prints_the_formulas_that_are_evaluated():
    text = explain(SMALL, ROUND)
    assert all(str(formula) in text for formula in cost_model.FORMULAS.values())
    assert "3*gemm + 2*exchange + 2*replicate + reduce + plan" in text
    assert "row_bytes        100" in text and "copy_gbs         2" in text


def test_rates_from_a_file(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"copy_gbs": 100, "plan_us": 0}))
    assert Rates.load(path) == Rates(copy_gbs=100, plan_us=0)
    for content, message in [
        ('{"copy_gb": 1}', "there is no rate 'copy_gb'. Did you mean 'copy_gbs'?"),
        ('{"copy_gbs": 0}', "'copy_gbs' is 0. Give a positive number"),
        ('{"copy_gbs": "fast"}', "'copy_gbs' is 'fast'"),
        ('{"gemm_tflops": NaN}', "'gemm_tflops' is nan"),
        ('{"plan_us": -1}', "'plan_us' is -1. Give a number >= 0"),
        ("[1]", "holds no JSON object"),
        ("{", "is no JSON"),
    ]:
        path.write_text(content)
        with pytest.raises(OptionError) as error:
            Rates.load(path)
        assert message in str(error.value)
    with pytest.raises(OptionError, match="cannot be read"):
        Rates.load(tmp_path / "absent.json")


def test_slower_links_never_make_a_step_faster():
    loads = Loads.of(make_plan(skewed(8, 4, 3000, 6.0, seed=1), 2), Rates(), 4)
    layer, base = Layer.gated(1024, 512, 4), Rates()
    for field in dataclasses.fields(Rates):
        if field.name.endswith(("gbs", "tflops")):
            slower = dataclasses.replace(base, **{field.name: getattr(base, field.name) / 2})
            assert evaluate(loads, layer, slower, occurrences()).total > evaluate(loads, layer, base, occurrences()).total
    assert np.all(Loads.of(make_plan(skewed(8, 4, 3000, 6.0, seed=1), 2), base).rows % base.tile_rows == 0)


def test_measured_rates_can_be_loaded(tmp_path, monkeypatch, capsys):
    from benchmarks import measure_rates

    out = tmp_path / "rates.json"
    sizes = "--device cpu --width 64 --ffn 32 --rows 240 --megabytes 1 --repetitions 3"
    monkeypatch.setattr("sys.argv", ["measure_rates", "--out", str(out), *sizes.split()])
    measure_rates.main()
    found = Rates.load(out)
    assert found.dispatch_gbs == Rates().dispatch_gbs  # one process measures no links
    assert found.gemm_tflops < 50 and found.memory_gbs != Rates().memory_gbs and found.plan_us > 1
    assert str(out) in capsys.readouterr().out
