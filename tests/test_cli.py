"""The command line: what it prints, its exit codes, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multirank import start_processes

TARGETS = """
import torch
from torch import nn
from tests import zoo

def moe(): return zoo.HandMoE(), {"x": torch.randn(2, 8, zoo.WIDTH)}
def dense(): return nn.Linear(4, 4), (torch.randn(2, 4),)
def no_inputs(): return nn.Linear(4, 4)
def wrong(): return 3
def broken(): raise RuntimeError("no luck")
value = 5
"""


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """The command in a process that was forked after the imports, and may start none itself."""
    (process,) = start_processes(1, _command, arguments, str(cwd))
    process.join(timeout)
    printed = [(cwd / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def _command(_: int, arguments: tuple[str, ...], folder: str) -> None:
    from ultraep_compile.cli import main

    os.chdir(folder)
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["ultraep-compile", *arguments]
    sys.path.insert(0, "")
    main()


def run_alone(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """The command as a user starts it."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "ultraep_compile", *arguments]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "targets.py").write_text(TARGETS)
    return tmp_path


def test_explain_json_of_an_moe(folder: Path) -> None:
    done = run("explain", "targets.py:moe", "--json", "--expect-moe-sites", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"moe_sites", "coverage", "roles", "graph_breaks"}
    (site,) = found["moe_sites"]
    assert site["status"] == "rewritten" and site["experts"] == 8 and site["top_k"] == 2
    assert site["gating"] == "softmax-topk" and "T" in site["formulas"]["flops"]
    assert found["coverage"]["rewritten"] == found["coverage"]["expert_parameters"] > 0
    assert set(found["roles"]) == {"encoders", "projectors", "llm", "generators"}


def test_explain_of_a_dense_model_is_empty_and_fine(folder: Path) -> None:
    done = run("explain", "targets.py:dense", "--json", cwd=folder)
    assert done.returncode == 0 and json.loads(done.stdout)["moe_sites"] == []
    done = run("explain", "targets:dense", "--expect-moe-sites", "1", cwd=folder)
    assert done.returncode == 1 and "expected 1 MoE layers, 0 are rewritten" in done.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("targets.py", "is not of the form"),
        ("missing.py:f", "there is no file missing.py"),
        ("no.such.module:f", "does not import"),
        ("targets.py:mo", "Did you mean 'moe'"),
        ("targets.py:value", "not a function"),
        ("targets.py:wrong", "returned int"),
        ("targets.py:broken", "no luck"),
        ("targets.py:no_inputs", "without inputs"),
    ],
)
def test_bad_targets(folder: Path, target: str, message: str) -> None:
    done = run("explain", target, cwd=folder)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_dump_writes_graphs_programs_and_report(folder: Path) -> None:
    done = run("dump", "targets.py:moe", "--out", "dumped", cwd=folder)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (folder / "dumped").iterdir()}
    assert {"index.html", "explain.json", "explain.txt", "graph0.html"} <= names
    assert any("insert_balance_pass" in n for n in names) and any(n.startswith("row_program") for n in names)
    assert "ultraep.experts" in (folder / "dumped" / "graph0.html").read_text()
    kernels = {n for n in names if n.startswith("kernel_")}
    assert {n.split("_")[1] for n in kernels} == {"push", "pass", "pull"}  # alike for all layers, so once each
    for name in kernels:
        compile((folder / "dumped" / name).read_text(), name, "exec")


def test_view_refuses_what_is_not_a_trace(folder: Path) -> None:
    (folder / "foreign.npz").write_bytes(b"not a zip")
    for name in ("foreign.npz", "absent.npz"):
        done = run("view", name, cwd=folder)
        assert done.returncode == 2 and "Traceback" not in done.stderr and name in done.stderr


def test_doctor(folder: Path) -> None:
    done = run_alone("doctor", "--json", cwd=folder)
    assert done.returncode == 0 and json.loads(done.stdout)["versions"]["torch"]


def test_version(folder: Path) -> None:
    import ultraep_compile

    done = run("--version", cwd=folder)
    assert (done.returncode, done.stdout) == (0, f"ultraep_compile {ultraep_compile.__version__}\n")


def test_unknown_option_is_bad_usage(folder: Path) -> None:
    assert run("explain", "targets.py:moe", "--jason", cwd=folder).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_demo(folder: Path, processes: int) -> None:
    done = run_alone("demo", "--steps", "12", "--processes", str(processes), "--out", "out", cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "report.html").stat().st_size > 1e5
    from ultraep_compile.demo import worst_where_reachable
    from ultraep_compile.telemetry import read_trace

    trace = read_trace(folder / "out" / "trace.npz")
    assert len(trace) == 36 and worst_where_reachable(trace) <= 1.02
