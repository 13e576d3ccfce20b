"""The report: in one file, true to the trace, bounded, safe with hostile names. Needs no browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from synthetic_traces import random_counts, record_run

from ultraep_compile.telemetry import LayerTrace, Recorder, Trace, summarize, write_report
from ultraep_compile.telemetry.replan import other_slots
from ultraep_compile.telemetry.report_data import pack, report_data

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028{{7*7}}@DATA@\"'&amp;"


def unpack(packed) -> np.ndarray:
    raw = base64.b64decode(packed["d"])
    return np.frombuffer(raw, dtype="<" + packed["t"]).reshape(packed["s"])


def page_of(trace, tmp_path, **kwargs) -> str:
    write_report(trace, tmp_path / "sub" / "report.html", **kwargs)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["report.html"]
    return (tmp_path / "sub" / "report.html").read_text(encoding="utf-8")


def data_in(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


@pytest.fixture
def trace(tmp_path) -> Trace:
    recorder = Recorder(tmp_path / "t.npz")
    recorder.describe("layers.0.mlp", top_k=2, expert_bytes=1000, row_bytes=64)
    return record_run(recorder, layers=3, microbatches=6)


@pytest.mark.parametrize(
    "values",
    [[], [0, 255], [-1, 3], [0, 65535], [-1, 40_000], [2**32 - 1], [-(2**31)], [2**40], [0.5, np.nan]],
)
def test_packed_arrays_hold_the_numbers(values):
    found = unpack(pack(np.array(values)))
    assert np.array_equal(found.astype(np.float64), np.array(values, dtype=np.float64), equal_nan=True)


def test_one_file_that_loads_nothing(trace, tmp_path):
    page = page_of(trace, tmp_path)
    head = page[: page.index('<script type="application/json"')]
    own = re.sub(r"<script>\s*/\*\*\s*\* plotly.*?</script>", "", page, flags=re.S)
    assert "plotly.js v" in page and "plotly.js v" not in own
    for pattern in (
        'src="http',
        "src='http",
        "@import",
        "url(http",
        "<link",
        "<script src",
        "fetch(",
        "XMLHttp",
    ):
        assert pattern not in own, pattern
    assert not re.search(r'src="?(https?:)?//', page) and "@import" not in page
    assert not re.search(r"https?://", own)
    assert "default-src 'none'" in head


def test_policy_names_the_two_scripts_and_no_others(trace, tmp_path):
    page = page_of(trace, tmp_path)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    script_src = next(part.strip() for part in policy.split(";") if part.strip().startswith("script-src"))
    assert script_src == "script-src " + " ".join(f"'sha256-{value}'" for value in hashes)


def test_numbers_in_the_page_are_those_of_the_trace(trace, tmp_path):
    data = data_in(page_of(trace, tmp_path))
    summary = summarize(trace).as_dict()
    assert data["summary"]["loads"] == summary["loads"] and data["summary"]["records"] == 18
    for layer, found in zip(trace, data["layers"], strict=True):
        assert unpack(found["series"]["index"]).tolist() == list(range(6))
        assert np.array_equal(unpack(found["series"]["before"]), layer.before_NR)
        assert np.array_equal(unpack(found["series"]["after"]), layer.after_NR)
        assert np.array_equal(unpack(found["detail"]["load"]), layer.expert_load_NE)
        assert np.array_equal(unpack(found["detail"]["quota"]), layer.quota_NP)
        assert np.array_equal(unpack(found["detail"]["slot"]), layer.slot_expert_NRS)
        assert np.allclose(unpack(found["traffic"]["after"]), layer.traffic()[1] / 6)
        expected = layer.before_NR.max(1) / layer.before_NR.mean(1)
        assert np.allclose(unpack(found["records"]["before"]), expected)
        assert found["realised"]["records"] == found["realised"]["equal"] == 3
        assert found["seconds"]["replicate"]["p50"] == pytest.approx(2e-3)
    assert data["layers"][0]["facts"] == {"top_k": 2, "expert_bytes": 1000, "row_bytes": 64}


def test_realised_loads_that_differ_are_counted(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    counts = torch.full((2, 4), 10)
    recorder.record("a", counts, realised_P=torch.tensor([20, 20, 20, 20]))
    recorder.record("a", counts, realised_P=torch.tensor([20, 27, 13, -1]))
    recorder.record("a", counts)
    found = report_data(recorder.trace(), "")["layers"][0]["realised"]
    assert (found["records"], found["equal"], found["largest"]) == (2, 1, 7)
    assert unpack(found["index"]).tolist() == [0]


def test_hostile_names_stay_text(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    number = recorder.record(HOSTILE, random_counts(0, 2, 4))
    recorder.add(number, seconds={HOSTILE: 1.0})
    curves = {HOSTILE: ([0, 1], [1.0, float("nan")])}
    page = page_of(recorder.trace(), tmp_path, title=HOSTILE, notes=[HOSTILE], curves=curves)
    assert len(re.findall(r"<script\b", page)) == 3 == page.count("</script>")
    assert "<img" not in page[: page.index("plotly.js v")]
    assert "\u2028" not in page[page.index('id="data"') : page.index("plotly.js v")]
    data = data_in(page)
    assert data["title"] == data["layers"][0]["name"] == data["notes"][0] == HOSTILE
    assert data["curves"][0]["y"] == [1.0, None]
    (shown,) = re.findall("<h1>(.*?)</h1>", page)
    assert shown.startswith("&lt;/script&gt;") and "@DATA@" in shown


def test_page_scripts_write_no_markup_from_data(trace, tmp_path):
    own = page_of(trace, tmp_path).rsplit("<script>", 1)[1]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "new Function"):
        assert forbidden not in own


def test_empty_trace_says_there_was_nothing_to_balance(tmp_path):
    page = page_of(Trace(), tmp_path, title="dense", curves={"loss": ([0], [1])}, notes=["a note"])
    data = data_in(page)
    assert data["layers"] == [] == data["slots"] and data["summary"]["loads"]["before_p50"] is None
    assert "nothing to balance" in page


def test_title_and_notes_come_from_the_trace_unless_given(tmp_path):
    trace = Trace(info={"title": "from the run", "notes": "one line"})
    data = data_in(page_of(trace, tmp_path))
    assert (data["title"], data["notes"]) == ("from the run", ["one line"])
    data = data_in(page_of(trace, tmp_path, title="given", notes=["a", "b"]))
    assert (data["title"], data["notes"]) == ("given", ["a", "b"])


def test_curves_are_grouped_thinned_and_checked():
    x = np.arange(10_001)
    data = report_data(
        Trace(), "", {"loss: ours": (x, x / 7), "loss: plain": (x, x / 7), "other": ([1], [2])}
    )
    assert [(c["group"], c["name"]) for c in data["curves"]] == [
        ("loss", "ours"),
        ("loss", "plain"),
        ("", "other"),
    ]
    assert (
        3000 < len(data["curves"][0]["x"]) <= 4000
        and data["curves"][0]["y"][1] == data["curves"][0]["x"][1] / 7
    )
    with pytest.raises(ValueError, match="3 x and 2 y"):
        report_data(Trace(), "", {"bad": ([1, 2, 3], [1, 2])})


def test_records_without_rows_without_plans_and_of_one_rank(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    recorder.record("zero", torch.zeros(2, 4, dtype=torch.int64))
    recorder.record("one rank", torch.tensor([[1, 2]]))
    recorder.record("one expert takes all", torch.tensor([[9, 0, 0, 0]] * 2))
    page = page_of(recorder.trace(), tmp_path)
    assert len(data_in(page)["layers"]) == 3


def test_other_slots_are_planned_on_the_same_records(trace):
    rows = other_slots(trace, slots=(0, 1, 4), sample=9)
    assert [row["slots"] for row in rows] == [0, 1, 2, 4]
    assert {row["records"] for row in rows} == {9}
    none, *some = rows
    assert none["replicas"] == 0 and none["p50"] == pytest.approx(none["bound"])
    assert all(row["p50"] <= none["p50"] and row["bound"] <= row["p50"] + 1e-9 for row in some)
    assert none["slot_bytes"] is None  # two of the three layers do not say how large an expert is


def test_other_slots_leaves_out_what_a_layer_cannot_have_and_stops_in_time(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    recorder.describe("a", expert_bytes=10)
    for i in range(3):
        recorder.record("a", random_counts(i, 2, 4))
    rows = other_slots(recorder.trace())
    assert [(row["slots"], row["slot_bytes"]) for row in rows] == [(0, 0), (1, 10), (2, 20)]
    assert other_slots(recorder.trace(), limit_s=-1.0) == [] == other_slots(Trace())


def huge_layer(name: str, n: int, ranks: int, experts: int, slots: int) -> LayerTrace:
    generator = np.random.default_rng(0)
    load = generator.integers(0, 60_000, (n, experts))
    quota = np.concatenate([load.reshape(n, ranks, -1), np.zeros((n, ranks, slots), int)], -1).reshape(n, -1)
    detail = np.arange(0, n, 100)
    return LayerTrace(
        name, ranks, experts, slots,
        microbatch_N=np.arange(n), expert_load_NE=load, source_load_NR=load.reshape(n, ranks, -1).sum(-1),
        slot_expert_NRS=np.full((n, ranks, slots), -1), quota_NP=quota, realised_NP=np.full(quota.shape, -1),
        kept_N2=np.zeros((n, 2), int), rounds_N=np.full(n, -1), detail_n=detail,
        counts_nRE=np.repeat(load[detail][:, None] // ranks, ranks, 1),
        shares_nRP=np.repeat(quota[detail][:, None] // ranks, ranks, 1), seen=n,
    )  # fmt: skip


def test_size_is_bounded_for_any_trace(tmp_path, monkeypatch):
    """A tenth of all budgets for a tenth of the layers of a large run: a tenth of the size."""
    from ultraep_compile.telemetry import report_data as module
    from ultraep_compile.telemetry import summary

    for name in ("SERIES_BYTES", "DETAIL_BYTES", "TRAFFIC_VALUES", "SCATTER_POINTS"):
        monkeypatch.setattr(module, name, getattr(module, name) // 10)
    monkeypatch.setattr(summary, "BOUND_RECORDS", 100)
    trace = Trace([huge_layer(f"model.layers.{i}.mlp", 1000, 64, 128, 2) for i in range(9)])
    data = module.report_data(trace, "")
    assert len(json.dumps(data)) < 2_000_000  # so a page is below 20 MB + the chart library's 5 MB
    for layer, found in zip(trace, data["layers"], strict=True):
        worst = int((layer.before_NR.max(1) / layer.before_NR.mean(1)).argmax())
        assert worst in unpack(found["detail"]["index"])
        assert len(unpack(found["records"]["before"])) == 1000
        assert np.isnan(unpack(found["records"]["bound"])).sum() > 900
        assert found["summary"]["lower_bound"] is not None
