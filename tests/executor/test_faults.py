"""A rank that dies or stops in the middle of a step: the others say who, what and where, in time."""

from __future__ import annotations

import datetime
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.executor import toys
from tests.multirank import start_processes
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings

DEADLINE = 6.0
RANKS = 3


class _Faulty(torch.nn.Module):
    """A stage that sends its own process a signal at its third forward."""

    def __init__(self, inner: torch.nn.Module, number: int) -> None:
        super().__init__()
        self.inner, self.number, self.calls = inner, number, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), self.number)
        return self.inner(*args)


def _process(rank: int, folder: str, number: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    model = toys.parts(RANKS)
    model.stages[1].module = _Faulty(model.stages[1].module, number)
    pipe = Pipeline(None, model, init_device_mesh("cpu", (RANKS,)), Settings(6, deadline=DEADLINE))
    batch = {"microbatches": toys.microbatches(6, 0)}
    began = time.monotonic()
    try:
        pipe.step(batch)
        text = "no error"
    except PeerTimeoutError as error:
        text = f"{time.monotonic() - began:.1f}\n{error}"
    Path(folder, f"result.{rank}").write_text(text)
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_lost_rank_is_named(number: int, tmp_path: Path) -> None:
    processes = start_processes(RANKS, _process, str(tmp_path), int(number))
    try:
        for rank in (0, 2):
            processes[rank].join(timeout=240)
            assert processes[rank].exitcode == 0, "a survivor hangs or died"
    finally:
        for p in processes:
            p.kill()
    for rank in (0, 2):
        seconds, text = (tmp_path / f"result.{rank}").read_text().split("\n", 1)
        assert float(seconds) < DEADLINE + 30  # a loaded machine
        assert f"rank {rank} cannot go on" in text and "microbatch" in text
        assert "rank 1 is missing: its process" in text, text
