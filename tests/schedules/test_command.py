"""The `schedule` command: JSON keys, files, and one clear sentence with exit code 2 for every bad input."""

from __future__ import annotations

import json
import re

import pytest
import typer
from typer.testing import CliRunner

from ultraep_compile.cli.schedule import schedule
from ultraep_compile.errors import UltraEPError
from ultraep_compile.schedules.plan import METHODS
from ultraep_compile.schedules.report import schedule_of_report
from ultraep_compile.schedules.validate import validate

app = typer.Typer()
app.command("schedule")(schedule)
app.command("other")(lambda: None)  # with one command alone typer drops its name


def run(*words: str):
    result = CliRunner().invoke(app, ["schedule", *map(str, words)])
    if isinstance(result.exception, UltraEPError):  # what the real command does
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def as_json(*words: str):
    code, text = run("--stages", 4, "--microbatches", 16, *words, "--json", "-")
    assert code == 0, text
    return json.loads(text)


def test_json_has_the_promised_keys():
    value = as_json("--encoder-cost", "2,4", "--generator-cost", "1,2")
    assert {"ranks", "makespan", "ideal", "lower_bound", "lower_bound_capped", "bubble", "peak"} <= set(value)
    assert len(value["ranks"]) == 4
    for op in (op for rank in value["ranks"] for op in rank):
        assert {"op", "stage", "start", "end"} <= set(op) and ("microbatch" in op) != ("items" in op)
        assert op["op"] in ("EF", "EB", "F", "B", "I", "W", "G")
        assert 0 <= op["start"] <= op["end"] <= value["makespan"]
    assert {len(value["peak"][k]) for k in ("encoder", "generator", "llm")} == {4}
    assert 0 <= value["bubble"] < 1
    assert value["lower_bound"] <= value["makespan"]
    validate(schedule_of_report(value))


def test_uniform_numbers():
    value = as_json("--encoder-cost", "1,2", "--llm-cost", "1,2", "--encoder-memory", "2")
    assert value["ideal"] == pytest.approx((16 + 3) * 3 + 16 * 3 / 4)
    assert value["makespan"] <= value["ideal"]
    assert value["lower_bound_capped"] <= value["makespan"] <= 1.035 * value["lower_bound_capped"]
    assert max(value["peak"]["encoder"]) == 2 and value["peak"]["llm"] == [4, 3, 2, 1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    value = as_json("--encoder-cost", "1,2", "--method", method)
    made = schedule_of_report(value)
    validate(made)
    assert made.method == method
    work = 16 * (4 * 3 + 3) + (16 if method == "recompute" else 0)
    busy = sum(op["end"] - op["start"] for rank in value["ranks"] for op in rank)
    assert busy == pytest.approx(work)


@pytest.mark.parametrize("base", ["interleaved", "dualpipev"])
def test_virtual_stages(base):
    value = as_json("--encoder-cost", "1,2", "--virtual", 2, "--base", base)
    assert {op["stage"] for rank in value["ranks"] for op in rank if op["op"] == "F"} == set(range(8))
    assert max(value["peak"]["encoder"]) == 3


def test_costs_from_a_file(tmp_path):
    file = tmp_path / "costs.json"
    forward = [float(j % 3) for j in range(16)]
    items = [[1, 1, 2] if f else [] for f in forward]
    table = {"encoder_forward": forward, "encoder_backward": [2 * f for f in forward], "encoder_items": items}
    file.write_text(json.dumps({**table, "llm_forward": [1.0] * 16, "llm_backward": [2.0] * 16}))
    value = as_json("--costs", file)
    assert any("items" in op for rank in value["ranks"] for op in rank)
    validate(schedule_of_report(value))
    unit = {"forward": [1] * 16, "backward": [0] * 16, "feeds": [0, 1, 2, 3]}
    file.write_text(json.dumps({"encoders": [unit] * 2}))
    assert not any(op["op"] == "EB" for rank in as_json("--costs", file)["ranks"] for op in rank)


def test_files_are_written(tmp_path):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "png", "html", "trace")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", file)]
    code, text = run("--stages", 2, "--microbatches", 4, "--encoder-cost", "1,2", "--compare", *options)
    assert code == 0 and "colocated" in text and "speedup" in text
    assert json.loads(files["json"].read_text())["method"] == "nested"
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    page = files["html"].read_text()
    assert page.startswith("<!doctype html>") and not re.search(
        r"(src|href)\s*=|https?://|@import|url\(", page
    )
    events = json.loads(files["trace"].read_text())["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}


def test_summary_and_automatic_choice():
    code, text = run(
        "--stages",
        4,
        "--microbatches",
        16,
        "--encoder-cost",
        "1,2",
        "--auto",
        "--llm-memory",
        5,
        "--noise",
        0.1,
    )
    assert code == 0 and "chosen:" in text and "tried" in text and "varying" in text
    assert "nested" in text and "idle" not in text


SMALL = ["--stages", 4, "--microbatches", 8]
BAD = [
    (["--stages", 0, "--microbatches", 8], "at least one stage"),
    (["--stages", -1, "--microbatches", 8], "at least one stage"),
    (["--stages", 4, "--microbatches", 0], "at least one microbatch"),
    (["--stages", 4, "--microbatches", 3, "--encoder-cost", "1,2"], "do not fill one group"),
    ([*SMALL, "--encoder-cost", "-1,2"], "finite number >= 0"),
    ([*SMALL, "--encoder-cost", "nan,2"], "finite number >= 0"),
    ([*SMALL, "--llm-cost", "1"], "two numbers"),
    ([*SMALL, "--llm-cost", "1,2,3"], "two numbers"),
    ([*SMALL, "--llm-cost", "0,0"], "cost nothing"),
    ([*SMALL, "--llm-cost", "a,b"], "two numbers"),
    ([*SMALL, "--latency", "-1"], "latency"),
    ([*SMALL, "--latency", "nan"], "latency"),
    ([*SMALL, "--virtual", 0], "virtual stage"),
    ([*SMALL, "--method", "nestet"], "Did you mean 'nested'"),
    ([*SMALL, "--base", "2f2b"], "no base schedule"),
    ([*SMALL, "--encoder-cost", "1,2", "--encoder-memory", 1], "at least 2"),
    ([*SMALL, "--encoder-cost", "1,2", "--encoder-memory", 0], "at least 1"),
    (
        ["--stages", 4, "--microbatches", 8, "--generator-cost", "1,2", "--generator-group", 3],
        "does not divide",
    ),
    (
        ["--stages", 4, "--microbatches", 8, "--generator-cost", "1,2", "--method", "optimus"],
        "encoder work only",
    ),
    ([*SMALL, "--costs", "absent.json"], "cannot be read"),
    ([*SMALL, "--llm-memory", 3], "Add --auto"),
    ([*SMALL, "--auto", "--llm-memory", 0.5], "No nested schedule fits"),
    ([*SMALL, "--auto", "--method", "flush"], "nothing to choose"),
    ([*SMALL, "--noise", "-1"], "--noise"),
    ([*SMALL, "--json", "/absent/dir/x.json"], "cannot be written"),
    ([*SMALL, "--png", "/absent/dir/x.png"], "cannot be written"),
    (["--stages", "x", "--microbatches", 8], "valid integer"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else ""
)
def test_bad_options(words, message):
    code, text = run(*words)
    assert code == 2 and message in " ".join(text.split())
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "object of lists"),
        ("{", "not JSON"),
        ('{"encoder_foward": [1]}', "Did you mean 'encoder_forward'"),
        ('{"encoder_forward": [1, 1]}', "alone"),
        ('{"encoder_forward": [1, 1], "encoder_backward": [1, 1]}', "has 2 entries, not 8"),
        (
            '{"llm_forward": [SEVEN, NaN], "llm_backward": ONES}',
            r"llm_forward[7] is nan",
        ),
        (
            '{"llm_forward": [SEVEN, "x"], "llm_backward": ONES}',
            "llm_forward[7] is 'x'",
        ),
        ('{"llm_forward": 3, "llm_backward": ONES}', "Give a list"),
        ('{"generator_forward": [1], "generator_backward": [1]}', "has 1 entries, not 8"),
        ('{"encoders": [3]}', "Give an object"),
        ('{"encoders": [{"forwards": 3}]}', "Did you mean 'forward'"),
        (
            '{"encoders": [{"forward": ONES, "backward": ONES, "feeds": [9]}]}',
            "stages 0..3",
        ),
        (
            '{"encoders": [{"forward": ONES, "backward": ONES, "items": [[1]]}]}',
            "1 entries",
        ),
    ],
)
def test_bad_cost_files(tmp_path, content, message):
    file = tmp_path / "costs.json"
    file.write_text(content.replace("ONES", str([1] * 8)).replace("SEVEN", "1, 1, 1, 1, 1, 1, 1"))
    code, text = run("--stages", 4, "--microbatches", 8, "--costs", file)
    assert code == 2 and message in text


def test_costs_given_twice(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text('{"llm_forward": [1, 1], "llm_backward": [1, 1]}')
    code, text = run("--stages", 2, "--microbatches", 2, "--costs", file, "--llm-cost", "1,2")
    assert code == 2 and "both give llm costs" in text


def test_a_method_that_ignores_the_memory_says_so():
    code, text = run(*SMALL, "--encoder-cost", "1,2", "--encoder-memory", 2, "--method", "colocated")
    assert code == 0 and "holds more than --encoder-memory 2" in text
