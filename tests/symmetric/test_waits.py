"""Signals and waits: in the interpreter, compiled ahead of time."""

from __future__ import annotations

import pytest

from tests.interpreter import run_interpreted

pytest.importorskip("triton")
from tests.symmetric import ahead_of_time


@pytest.mark.parametrize("case", ["exchange", "too_late", "handshake"])
def test_in_the_interpreter(case: str) -> None:
    run_interpreted("tests.symmetric.interpreted", case)


@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead_of_time.main(capability)
