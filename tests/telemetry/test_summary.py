"""Every number of the summary against a plain loop over records."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from synthetic_traces import random_counts, record_run

from ultraep_compile.planner import imbalance, lower_bound
from ultraep_compile.telemetry import Recorder, Trace, summarize
from ultraep_compile.telemetry.trace import imbalance_N


def test_imbalance_is_the_planners():
    loads = torch.randint(0, 1000, (50, 7), generator=torch.Generator().manual_seed(0))
    loads[3] = 0
    assert imbalance_N(loads.numpy()).tolist() == pytest.approx([imbalance(row) for row in loads])


def test_imbalance_is_over_ranks_not_over_layers(tmp_path):
    """Two layers whose imbalances cancel when added up: each record must still count as imbalanced."""
    recorder = Recorder(tmp_path / "t.npz")
    recorder.record("a", torch.tensor([[30, 0], [30, 0]]))
    recorder.record("b", torch.tensor([[0, 30], [0, 30]]))
    assert summarize(recorder.trace()).loads.before_p50 == 2.0


def test_summary_equals_a_plain_loop(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    trace = record_run(recorder, layers=3, microbatches=7)
    before, after, bound, replicas, seconds = [], [], [], [], []
    rows = left_before = left_after = busiest_before = busiest_after = 0
    for layer in trace:
        ranks, masters, local = layer.ranks, layer.masters, layer.masters + layer.slots
        for n in range(len(layer)):
            counts, shares = layer.counts_nRE[n], layer.shares_nRP[n]
            loads = [int(counts[:, r * masters : (r + 1) * masters].sum()) for r in range(ranks)]
            planned = [int(shares[:, r * local : (r + 1) * local].sum()) for r in range(ranks)]
            before.append(max(loads) / (sum(loads) / ranks))
            after.append(max(planned) / (sum(planned) / ranks))
            bound.append(lower_bound(torch.from_numpy(counts), layer.slots))
            replicas.append(sum(1 for e in layer.slot_expert_NRS[n].ravel() if e >= 0))
            rows += sum(loads)
            for r in range(ranks):
                left_before += int(counts[r].sum() - counts[r, r * masters : (r + 1) * masters].sum())
                left_after += int(shares[r].sum() - shares[r, r * local : (r + 1) * local].sum())
            busiest_before += max(loads)
            busiest_after += max(planned)
            seconds.append(3.5e-3 if n % 2 == 0 else 1e-3)
    loads = summarize(trace).loads
    assert loads.records == 21 == len(before)
    for name, expected in {
        "before_p50": np.percentile(before, 50),
        "before_p99": np.percentile(before, 99),
        "after_p50": np.percentile(after, 50),
        "after_p99": np.percentile(after, 99),
        "after_max": max(after),
        "lower_bound": np.percentile(bound, 50),
        "replicas": np.mean(replicas),
        "remote_before": left_before / rows,
        "remote_after": left_after / rows,
        "busiest_rows_before": busiest_before,
        "busiest_rows_after": busiest_after,
        "balancing_seconds": np.mean(seconds),
    }.items():
        assert getattr(loads, name) == pytest.approx(expected), name


def test_layers_are_summed_up_one_by_one(tmp_path):
    trace = record_run(Recorder(tmp_path / "t.npz"))
    summary = summarize(trace)
    assert (summary.records, summary.layers, summary.ranks) == (15, 3, 4)
    for layer, found in zip(trace, summary.per_layer, strict=True):
        assert (found.name, found.experts, found.slots) == (layer.name, layer.experts, layer.slots)
        assert found.loads == summarize(Trace([layer])).loads


def test_empty_trace_and_records_without_rows(tmp_path):
    empty = summarize(Trace())
    assert (empty.records, empty.layers, empty.ranks) == (0, 0, 0)
    assert math.isnan(empty.loads.before_p50) and empty.loads.busiest_rows_before == 0
    assert json.loads(json.dumps(empty.as_dict(), allow_nan=False))["loads"]["before_p50"] is None

    recorder = Recorder(tmp_path / "t.npz")
    recorder.record("a", torch.zeros(2, 4, dtype=torch.int64))
    loads = summarize(recorder.trace()).loads
    assert (loads.before_p50, loads.after_p50, loads.lower_bound) == (1.0, 1.0, 1.0)
    assert math.isnan(loads.remote_after) and math.isnan(loads.balancing_seconds)


def test_a_long_trace_is_summed_up_quickly(tmp_path):
    import time

    recorder = Recorder(tmp_path / "t.npz")
    counts = random_counts(0, 8, 16)
    for _ in range(2000):
        recorder.record("a", counts)
    trace = recorder.trace()
    start = time.monotonic()
    summarize(trace)
    assert time.monotonic() - start < 5
