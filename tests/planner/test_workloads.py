"""Synthetic loads: legal counts, repeatable, each with the property it is named for."""

from __future__ import annotations

import numpy as np
import pytest

from ultraep_compile.errors import OptionError, TopologyError
from ultraep_compile.workloads import HEAT, PERIOD, WORKLOADS, Setting, generate, inclusion_probability

SETTING = Setting(microbatches=12, ranks=8, experts=32, top_k=4, tokens=600, seed=3)


def imbalance_N(counts_NRE):
    loads_NR = counts_NRE.sum(1).reshape(len(counts_NRE), counts_NRE.shape[1], -1).sum(-1)
    return loads_NR.max(1) / loads_NR.mean(1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_counts_are_those_of_tokens_with_k_different_experts(name):
    counts_NRE = generate(name, SETTING)
    assert counts_NRE.shape == SETTING.shape and counts_NRE.dtype == np.int64
    tokens_NR, rest_NR = np.divmod(counts_NRE.sum(-1), SETTING.top_k)
    assert not rest_NR.any() and counts_NRE.min() >= 0
    assert (counts_NRE <= tokens_NR[..., None]).all()
    assert np.array_equal(counts_NRE, generate(name, SETTING))
    if name not in ("W0_balanced",):
        other = Setting(microbatches=12, ranks=8, experts=32, top_k=4, tokens=600, seed=4)
        assert not np.array_equal(counts_NRE, generate(name, other))


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("setting", [Setting(2, 1, 3, 3, 5), Setting(3, 4, 4, 1, 2), Setting(1, 4, 8, 8, 30)], ids=str)
def test_odd_settings(name, setting):
    counts_NRE = generate(name, setting)
    assert counts_NRE.shape == setting.shape and not (counts_NRE.sum(-1) % setting.top_k).any()


def test_each_varies_what_it_is_named_for():
    made = {name: generate(name, SETTING) for name in WORKLOADS}
    heat = {name: imbalance_N(counts) for name, counts in made.items()}
    assert heat["W0_balanced"].max() == 1.0 and heat["W4_source_ragged"].max() < 1.01
    assert heat["W2_hot_rank"].min() > heat["W1_hot_expert_set"].max() > heat["W3_spread_hot_experts"].max()
    sources_NR = made["W4_source_ragged"].sum(-1)
    assert (sources_NR.max(1) > 1.3 * sources_NR.mean(1)).all()
    assert not made["W5_zero_expert_rank"][:, 0].any() and not made["W5_zero_expert_rank"][:, :, -4:].any()
    hot_N = made["W6_rotating_hotspot"].sum(1).reshape(12, 8, -1).sum(-1).argmax(1)
    assert hot_N.tolist() == [0] * PERIOD + [1] * PERIOD + [2] * PERIOD
    burst_N = heat["W7_burst"] > 2
    assert burst_N.tolist() == ([False] * (PERIOD - 1) + [True]) * 3
    zipf_E = np.sort(made["zipf"].sum((0, 1)))[::-1]
    assert zipf_E[0] < 12 * 8 * 600 and zipf_E[0] > 2 * zipf_E[4] > 4 * zipf_E[20]
    spike_E = made["spike"].sum((0, 1))
    assert spike_E.max() > 0.95 * 12 * 8 * 600
    shares_RE = made["source_skew"].sum(0) / made["source_skew"].sum((0, 2))[:, None]
    assert np.corrcoef(shares_RE)[~np.eye(8, dtype=bool)].max() < 0.9
    drift_NE = np.log(made["drift"].sum(1) + 1)
    near = np.mean([np.corrcoef(drift_NE[n], drift_NE[n + 1])[0, 1] for n in range(11)])
    assert 0.95 > near > np.corrcoef(drift_NE[0], drift_NE[11])[0, 1]


def test_inclusion_probability():
    assert np.allclose(inclusion_probability(np.ones(8), 2), 0.25)
    chosen = inclusion_probability(np.array([HEAT, 1, 1, 0]), 2)
    assert chosen.sum() == pytest.approx(2) and chosen[3] == 0 and chosen[0] > chosen[1]
    assert np.allclose(inclusion_probability(np.array([5.0, 1, 0, 0]), 2)[:2], 1, atol=1e-3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"ranks": 5}, TopologyError, "32 experts cannot be divided over 5 ranks"),
        ({"top_k": 33}, OptionError, "top_k is 33 of 32 experts. Give at most 32"),
        ({"tokens": 0}, OptionError, "tokens is 0. Give a whole number, 1 or more"),
        ({"microbatches": True}, OptionError, "microbatches is True"),
        ({"microbatches": 10**9}, OptionError, "more than 2 GiB"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        Setting(**({"ranks": 8, "experts": 32, "top_k": 4} | change))


def test_unknown_workload():
    with pytest.raises(OptionError, match=r"There is no workload 'zipff'. Did you mean 'zipf'\?"):
        generate("zipff", SETTING)
