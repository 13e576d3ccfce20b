"""Signals and waits: in the interpreter, compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def _run(module: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ["exchange", "too_late", "handshake"])
def test_in_the_interpreter(case: str) -> None:
    _run("tests.symmetric.interpreted", case, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path) -> None:
    _run("tests.symmetric.ahead_of_time", str(capability), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
