"""`ultraep-compile plan` and `replay`: what they print and write, and one sentence for every mistake."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
import zipfile
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.planner.problems import skewed
from ultraep_compile.cli import main
from ultraep_compile.planner import PLANNERS, loads_before, make_plan

PLAN_KEYS = {
    "name", "before", "after", "lower_bound", "replicas", "max_ingress", "max_egress", "remote_share", "microseconds",
}  # fmt: skip


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two matrices in loads.npz in the working directory."""
    monkeypatch.chdir(tmp_path)
    arrays = {
        "small": skewed(4, 2, 500, 4.0, seed=1).numpy().astype(np.int32),
        "wide/layer 3": skewed(8, 4, 3000, 6.0, seed=2).numpy(),
    }
    np.savez("loads.npz", **arrays)
    return arrays


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    """Exit code 2, nothing on standard output, and one sentence."""
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and message in err, (code, out, err)
    assert "Traceback" not in err and err.count("ultraep-compile: ") == 1


# ---- plan


@pytest.mark.parametrize("planner", [*PLANNERS, "ideal"])
def test_plan_json(planner, loads, capsys):
    code, out, err = run(
        capsys, "plan", "loads.npz", "--redundant-experts", "2", "--planner", planner, "--json"
    )
    assert code == 0 and err == ""
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(loads)
    for row, counts in zip(rows, loads.values(), strict=True):
        assert set(row) == PLAN_KEYS
        loads_R = loads_before(torch.from_numpy(counts)).numpy()
        assert row["before"] == pytest.approx(loads_R.max() / loads_R.mean())
        assert 1 <= row["lower_bound"] <= row["after"] + 1e-12
        assert row["max_ingress"] <= 2 and row["replicas"] <= 2 * counts.shape[0]
        assert 0 < row["remote_share"] < 1 and row["microseconds"] >= 0
        if planner == "quota":
            assert row["after"] <= 1.011 < row["before"] and row["replicas"] > 0
        if planner == "none":
            assert row["after"] == row["before"] and row["replicas"] == 0
        if planner == "ideal":
            assert row["after"] < 1.01 and row["replicas"] == 0


@pytest.mark.parametrize("planner", PLANNERS)
def test_plan_file_sums_exactly(planner, loads, capsys):
    code, out, _ = run(
        capsys, "plan", "loads.npz", "--redundant-experts", "2", "--planner", planner, "--out", "plan.npz"
    )
    assert code == 0 and "planner " + planner in out and "small" in out
    with np.load("plan.npz", allow_pickle=False) as found:
        assert set(found.files) == {f"{name}/{part}" for name in loads for part in ("instances", "shares")}
        for name, counts in loads.items():
            instances, shares = found[f"{name}/instances"], found[f"{name}/shares"]
            ranks, experts = counts.shape
            assert instances.dtype == shares.dtype == np.int32
            assert instances.shape[1] == 3 and shares.shape == (ranks, len(instances))
            assert np.array_equal(shares.sum(0), instances[:, 2])
            per_expert = np.zeros_like(counts, dtype=np.int64)
            np.add.at(per_expert.T, instances[:, 0], shares.T)
            assert np.array_equal(per_expert, counts)
            masters = instances[np.unique(instances[:, 0], return_index=True)[1]]
            assert masters[:, :2].tolist() == [[e, e // (experts // ranks)] for e in range(experts)]
            assert len({tuple(row) for row in instances[:, :2].tolist()}) == len(instances)
            replicas = np.bincount(instances[:, 1], minlength=ranks) - experts // ranks
            assert replicas.max() <= 2


def test_plan_exact_optimum(loads, capsys):
    _, out, _ = run(capsys, "plan", "loads.npz", "--redundant-experts", "1", "--exact", "--json")
    for row in json.loads(out):
        assert row["lower_bound"] <= row["optimum"] + 1e-9 and row["optimum"] <= row["after"] + 1e-9
    _, out, _ = run(capsys, "plan", "loads.npz", "--redundant-experts", "1", "--exact")
    assert "optimum" in out


def test_plan_as_a_process_prints_json_alone(loads, tmp_path):
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-m", "ultraep_compile", "plan", "loads.npz", "--redundant-experts", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 2 and done.stderr == ""


@pytest.mark.parametrize("planner", PLANNERS)
def test_copies_stay_in_their_domain(planner, loads, capsys):
    arguments = ("--redundant-experts", "2", "--planner", planner, "--domain", "4", "--out", "plan.npz", "--json")
    code, out, _ = run(capsys, "plan", "loads.npz", *arguments)
    assert code == 0
    free = json.loads(run(capsys, "plan", "loads.npz", "--redundant-experts", "2", "--json")[1])
    for row, without in zip(json.loads(out), free, strict=True):
        assert without["lower_bound"] <= row["lower_bound"] <= row["after"] + 1e-12
        with np.load("plan.npz") as found:
            instances, shares = found[f"{row['name']}/instances"], found[f"{row['name']}/shares"]
        counts = loads[row["name"]]
        homes = instances[:, 0] // (counts.shape[1] // counts.shape[0])
        assert np.array_equal(instances[:, 1] // 4, homes // 4)
        assert np.array_equal(shares.sum(0), instances[:, 2]) and shares.sum() == counts.sum()


def test_replay_within_domains(tmp_path, capsys):
    arguments = ("W2_hot_rank", "--microbatches", "6", "--planners", "none,eplb@2,lplb,quota,ideal", "--slots", "1")
    apart, together = (replayed(capsys, *arguments, *more) for more in (("--domain", "2"), ()))
    assert all(row["network_bytes"] > 0 for row in apart["results"])
    assert all(row["network_bytes"] == 0 for row in together["results"])
    quota = [next(r for r in found["results"] if r["planner"] == "quota") for found in (apart, together)]
    assert quota[0]["after_p50"] > quota[1]["after_p50"] and quota[0]["step_us"] > quota[1]["step_us"]
    assert apart["lower_bound"]["1"] > together["lower_bound"]["1"]


ones = np.ones((4, 8), np.int32)


@pytest.mark.parametrize(
    "array, message",
    [
        (ones.astype(float), "array 'a': dtype is float64. Pass token counts as integers"),
        (ones.astype(bool), "array 'a': dtype is bool"),
        (ones[0], "array 'a': shape is [8]. Pass [ranks, experts]"),
        (ones[None], "array 'a': shape is [1, 4, 8]"),
        (ones[:0], "array 'a': shape is [0, 8]"),
        (ones[:3], "8 experts cannot be divided over 3 ranks"),
        (-ones, "array 'a': a count is -1. Pass counts between 0 and 2147483647"),
        (ones * np.int64(2**31), "a count is 2147483648"),
        (np.full((4, 8), 2**64 - 1, np.uint64), "a count is 18446744073709551615"),
        (np.array(["x"]), "dtype is <U1"),
        (np.array([{}], dtype=object), "holds Python objects, which are never loaded"),
    ],
)
def test_bad_arrays(array, message, loads, capsys):
    np.savez("bad.npz", a=array)
    refused(capsys, message, "plan", "bad.npz", "--redundant-experts", "1")


def test_bad_files(loads, capsys):
    whole = Path("loads.npz").read_bytes()
    contents = {
        "absent.npz": (None, "There is no file absent.npz"),
        "text.npz": (b"ranks,experts\n", "is no .npz, or a damaged one"),
        "empty.npz": (b"", "is no .npz"),
        "short.npz": (whole[: len(whole) // 2], "is no .npz, or a damaged one"),
        "flipped.npz": (whole[:300] + bytes(b ^ 255 for b in whole[300:320]) + whole[320:], "damaged"),
        "pickle.npz": (pickle.dumps([1]), "is no .npz"),
        "pickled.npy": (b"\x93NUMPY\x02", "damaged"),
    }
    for name, (content, message) in contents.items():
        if content is not None:
            Path(name).write_bytes(content)
        refused(capsys, message, "plan", name, "--redundant-experts", "1")
    with zipfile.ZipFile("nothing.npz", "w"):
        pass
    refused(capsys, "holds no arrays", "plan", "nothing.npz", "--redundant-experts", "1")
    refused(capsys, "is a directory", "plan", ".", "--redundant-experts", "1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--redundant-experts", "-1"), "redundant_experts is -1"),
        (("--redundant-experts", "99"), "Array 'small': Too many redundant experts"),
        (("--redundant-experts", "1", "--planner", "qota"), "There is no planner 'qota'. Did you mean 'quota'?"),
        (("--redundant-experts", "1", "--domain", "3"), "Array 'small': --domain 3 does not divide its 4 ranks"),
        (("--redundant-experts", "1", "--domain", "0"), "--domain is 0. Give the number of ranks in a domain"),
        (("--redundant-experts", "1", "--out", "no/such/plan.npz"), "there is no directory no/such"),
        (("--redundant-experts", "1", "--out", "."), "cannot be written"),
        (("--redundant-experts", "1", "--planner", "ideal", "--out", "p.npz"), "so there is nothing to write"),
    ],
)
def test_bad_arguments_of_plan(arguments, message, loads, capsys):
    refused(capsys, message, "plan", "loads.npz", *arguments)
    assert not list(Path().rglob("*.part"))


def test_usage_errors_of_plan(loads, capsys):
    assert run(capsys, "plan", "loads.npz")[0] == 2
    assert run(capsys, "plan", "loads.npz", "--redundant-experts", "two")[0] == 2
    assert run(capsys, "plan", "loads.npz", "--redundant-experts", "1", "--jason")[0] == 2


# ---- replay


def replayed(capsys, *arguments):
    code, out, err = run(capsys, "replay", *arguments, "--json")
    assert code == 0 and err == "", err
    return json.loads(out)


def test_replay_of_a_workload(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("W6_rotating_hotspot", "--microbatches", "16", "--tokens", "2048", "--slots", "1,2")
    found = replayed(capsys, *arguments, "--html", "page.html")
    assert found["source"] == "W6_rotating_hotspot" and found["layers"][0]["shape"] == [16, 8, 64]
    rows = {(row["planner"], row["slots"]): row for row in found["results"]}
    assert set(rows) == {("none", 0), ("ideal", 0)} | {
        (name, slots) for name in ("eplb@8", "lplb@8", "greedy", "quota") for slots in (1, 2)
    }
    quota, stale, none, ideal = rows["quota", 2], rows["eplb@8", 2], rows["none", 0], rows["ideal", 0]
    assert none["step_us"] == pytest.approx(found["none_us"])
    assert ideal["step_us"] < quota["step_us"] < stale["step_us"] and quota["step_us"] < none["step_us"]
    assert quota["after_max"] <= 1.011 < 2 < stale["after_max"]
    assert none["after_p50"] == pytest.approx(found["before_p50"])
    assert found["lower_bound"]["2"] <= quota["after_p50"]
    assert quota["step_us"] == pytest.approx(sum(quota["parts_us"].values()))
    assert 0 < quota["break_even_tokens"] < 2048 and none["break_even_tokens"] is None
    assert quota["slot_bytes"] == 2 * 3 * 4096 * 1536 * 2 and none["slot_bytes"] == 0
    assert found["winner"]["planner"] == "quota"
    assert not found["formulas"]["gemm"].startswith("0") and "S" in found["memory_formulas"]["slot_bytes"]

    page = Path("page.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    (policy,) = re.findall(r"script-src ([^\"]*)\"", page)
    assert len(scripts) == 2
    assert set(policy.split()) == {
        f"'sha256-{b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    }
    own = page.replace(scripts[0], "")
    assert "default-src 'none'" in own and "http" not in own.replace("http-equiv", "") and "src=" not in own
    figures = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0])
    assert set(figures) == {"time", "imbalance", "slots", "traffic"}
    assert all(f'id="{name}"' in own for name in figures)


def test_replay_prints_a_table_and_a_verdict(capsys):
    small = ("--microbatches", "3", "--ranks", "4", "--experts", "8", "--top-k", "2", "--planners", "none,quota")
    code, out, _ = run(capsys, "replay", "W2_hot_rank", *small, "--explain")
    assert code == 0 and "Fastest: quota with" in out and "replicate  = expert_bytes*exposed" in out
    code, out, _ = run(capsys, "replay", "W0_balanced", *small)
    assert code == 0 and "Balancing does not pay here" in out
    code, out, _ = run(capsys, "replay", "list")
    assert code == 0 and "W5_zero_expert_rank" in out


def test_replay_of_a_recorded_trace(tmp_path, capsys):
    from ultraep_compile.telemetry import Recorder

    path = tmp_path / "run.npz"
    recorder = Recorder(path)
    for layer in ("layers.0", "layers.1"):
        recorder.describe(layer, top_k=2, expert_bytes=10**6, row_bytes=512, flops_per_row=10**6)
        for seed in range(3):
            counts_RE = skewed(4, 4, 20000, 5.0, seed).int()
            recorder.record(layer, counts_RE, *make_plan(counts_RE, 1))
    recorder.close()
    found = replayed(capsys, str(path), "--planners", "none,quota,eplb@2", "--slots", "2")
    assert [layer["name"] for layer in found["layers"]] == ["layers.0", "layers.1"]
    assert found["layers"][0]["expert_bytes"] == 10**6 and found["layers"][0]["top_k"] == 2
    rows = {row["planner"]: row for row in found["results"]}
    assert rows["quota"]["slot_bytes"] == 2 * 10**6  # all layers share slots
    assert rows["eplb@2"]["slot_bytes"] == 4 * 10**6  # copies that stay cannot
    assert rows["quota"]["after_max"] < 1.02 < rows["none"]["after_p50"]


def test_rehomed_plans_name_the_logical_experts(loads, capsys):
    arguments = ("--redundant-experts", "1", "--domain", "4", "--rehome")
    code, out, _ = run(capsys, "plan", "loads.npz", *arguments, "--json", "--out", "plan.npz")
    assert code == 0
    for row in json.loads(out):
        assert set(row) == PLAN_KEYS | {"lower_bound_at_home"}
        assert row["lower_bound"] <= row["lower_bound_at_home"] and row["lower_bound"] <= row["after"] + 1e-12
        counts = loads[row["name"]]
        with np.load("plan.npz", allow_pickle=False) as found:
            instances, shares, homes = (found[f"{row['name']}/{part}"] for part in ("instances", "shares", "homes"))
        assert sorted(homes.tolist()) == list(range(counts.shape[1]))
        sent = np.zeros_like(counts, dtype=np.int64)
        np.add.at(sent.T, instances[:, 0], shares.T)
        assert np.array_equal(sent, counts)
        masters = {tuple(pair) for pair in zip(homes.tolist(), (np.arange(homes.size) // (homes.size // counts.shape[0])).tolist(), strict=True)}
        assert masters <= {tuple(pair) for pair in instances[:, :2].tolist()}
    assert "rehomed" in run(capsys, "plan", "loads.npz", *arguments)[1]


def test_replay_rehomed_and_by_time(capsys):
    sizes = ("--ranks", "8", "--experts", "32", "--domain", "4", "--microbatches", "6", "--tokens", "1024")
    at_home = replayed(capsys, "W2_hot_rank", *sizes, "--planners", "quota,quota:auto,quota:16000000", "--slots", "2")
    by_planner = {row["planner"]: row for row in at_home["results"]}
    assert by_planner["quota:auto"]["step_us"] <= by_planner["quota"]["step_us"]
    assert by_planner["quota:16000000"]["replicas"] == 0 < by_planner["quota"]["replicas"]
    moved = replayed(capsys, "W2_hot_rank", *sizes, "--planners", "quota", "--slots", "2", "--rehome", "2")
    assert moved["lower_bound"]["2"] < 0.8 * at_home["lower_bound"]["2"] and "rehomed after 2" in moved["source"]
    assert moved["layers"][0]["shape"][0] == 4


def test_replay_of_load_matrices(loads, capsys):
    found = replayed(capsys, "loads.npz", "--planners", "quota", "--slots", "1")
    assert [layer["name"] for layer in found["layers"]] == ["4 ranks x 8 experts", "8 ranks x 32 experts"]
    np.savez("over_time.npz", layer=np.stack([loads["small"]] * 5))
    found = replayed(capsys, "over_time.npz", "--planners", "lplb@2", "--microbatches", "4")
    assert found["layers"][0]["shape"] == [4, 4, 8]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("zipff",), "There is no workload and no file 'zipff'. Did you mean 'zipf'?"),
        (("absent.npz",), "There is no file absent.npz"),
        (("zipf", "--planners", "quota,eplv"), "There is no planner 'eplv'. Did you mean"),
        (("zipf", "--planners", "greedy:100"), "The planner 'greedy:100' is not known. Only quota takes a number"),
        (("zipf", "--rehome", "32"), "32 microbatches cannot spare 32 to choose homes by"),
        (("zipf", "--planners", "eplb@x"), "after @ comes the number of microbatches"),
        (("zipf", "--planners", "none@4"), "none looks at no history"),
        (("zipf", "--planners", "eplb@32"), "32 microbatches are too few for a history of 32"),
        (("zipf", "--slots", "1,many"), "--slots is '1,many'. Give whole numbers"),
        (("zipf", "--slots", "-2"), "--slots has -2"),
        (("zipf", "--slots", "1000"), "Too many redundant experts"),
        (("zipf", "--phase", "backward"), "--phase is 'backward'. Give forward or train"),
        (("zipf", "--ranks", "7"), "64 experts cannot be divided over 7 ranks"),
        (("zipf", "--domain", "3"), "domains of 3 do not divide 8 ranks"),
        (("zipf", "--ffn", "0"), "--ffn is 0. Give 1 or more"),
        (("zipf", "--rates", "absent.json"), "absent.json cannot be read"),
        (("zipf", "--microbatches", "9", "--html", "/proc/none/page.html"), "cannot be written"),
    ],
)
def test_bad_arguments_of_replay(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, message, "replay", *arguments)
