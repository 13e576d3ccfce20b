"""Exchanges of a group whose ranks die, stop, raise, stay away or go elsewhere: they end in time and say who."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.multirank import fake_group, start_processes
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.exchange import Line, Place, at, failing, line_of
from ultraep_compile.exchange.processes import Process

RANKS, DEADLINE, SLACK = 3, 3.0, 5.0  # seconds


def _sum(line: Line) -> None:
    total = torch.ones(5)
    line.all_reduce(total, "the sum")
    assert total.eq(line.size).all()


def _right(line: Line) -> None:
    """Every kind of exchange carries what it should, odd sizes and types too."""
    rank, size = line.rank, line.size
    for dtype in (torch.bool, torch.bfloat16, torch.int16, torch.complex64):
        rows = torch.tensor([rank * 10 + r for r in range(size) for _ in range(r)]).to(dtype).unsqueeze(1)
        out = rows.new_empty(size * rank, 1)
        line.all_to_all(out, rows, [rank] * size, list(range(size)), "rows")  # r rows to rank r
        assert torch.equal(
            out, torch.tensor([s * 10 + rank for s in range(size) for _ in range(rank)]).to(dtype).unsqueeze(1)
        )
    parts = torch.empty(size, 2)
    line.all_gather(parts, torch.full((1, 2), float(rank)), "parts")
    assert parts[:, 0].tolist() == list(range(size))
    assert line.gather_objects({"rank": rank, "text": "x" * rank * 999}, "objects")[1]["text"] == "x" * 999
    value = torch.full((3,), float(rank))
    line.broadcast(value, 2, "a value")
    assert value.eq(2).all()
    message, after, before = torch.empty(4), (rank + 1) % size, (rank - 1) % size
    works = [
        line.receive(message, before, 1, "a message"),
        line.send(torch.full((4,), float(rank)), after, 1, "a message"),
    ]
    for work in works:
        line.finish(work, "a message")
    assert message.eq(before).all()


def _message(line: Line, action: Callable[[], Any]) -> str:
    """What an action raises, in time."""
    began = time.monotonic()
    try:
        action()
    except PeerTimeoutError as error:
        assert time.monotonic() - began < DEADLINE + SLACK
        return str(error)
    except ValueError:
        return "mine"
    raise AssertionError("no error")


def _raises(line: Line) -> None:
    with failing():
        if line.rank == 1:
            raise ValueError("out of luck")
        _sum(line)


def _ways(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    assert dist.group.WORLD is not None
    line = line_of(dist.group.WORLD)
    line.deadline = 60.0  # the first connection
    _right(line)
    line.deadline = DEADLINE
    said: dict[str, Any] = {}
    with at(layer="layers.1", phase="backward", microbatch=2):
        began = time.monotonic()
        said["raised"] = _message(line, lambda: _raises(line))
        said["seconds"] = time.monotonic() - began
        said["busy"] = _message(line, lambda: (time.sleep((rank == 1) * (DEADLINE + 2)), _sum(line)))
        said["alone"] = _message(line, lambda: line.barrier("evaluation") if rank == 1 else _sum(line))
        said["elsewhere"] = _message(line, lambda: line.barrier("evaluation" if rank == 1 else "training"))
        counts = []
        for _ in range(3):
            _right(line)
            said["raised"] = _message(line, lambda: _raises(line))
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        said["grown"] = [last - first for first, last in zip(counts[0], counts[-1], strict=True)]
        _right(line)  # and on it goes
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if folder.endswith("kill") else signal.SIGSTOP)
        began = time.monotonic()
        said["gone"] = _message(line, lambda: _sum(line))
        said["after"] = time.monotonic() - began
    torch.save(said, f"{folder}/said.{rank}")
    os._exit(0)


@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_every_exchange_ends_and_names_the_rank(how: str, tmp_path: Path) -> None:
    folder = tmp_path / how
    folder.mkdir()
    processes = start_processes(RANKS, _ways, str(folder))
    try:
        for rank in (0, 2):
            processes[rank].join(timeout=200)
            assert processes[rank].exitcode == 0, f"rank {rank} hangs or died"
    finally:
        for process in processes:
            process.kill()
    for rank in (0, 2):
        said = torch.load(folder / f"said.{rank}")
        place = f"layer layers.1, backward, microbatch 2: rank {rank} cannot go on"
        assert said["raised"].startswith(place) and "rank 1 raised ValueError: out of luck" in said["raised"]
        assert said["seconds"] < 2.0
        assert said["busy"].startswith(place) and "rank 1 has not come: it has been busy" in said["busy"]
        assert "rank 1 waits for evaluation" in said["alone"] and f"rank {rank} waits for the sum" in said["alone"]
        assert "rank 1 to evaluation" in said["elsewhere"]
        assert "rank 1 is missing: its process" in said["gone"]
        assert said["after"] < (2.0 if how == "kill" else DEADLINE + SLACK)
        assert said["grown"] == [0, 0], "descriptors, threads"


def test_a_group_of_one_exchanges_with_itself() -> None:
    with fake_group(1) as group:
        line, out = line_of(group), torch.empty(1, 2)
        line.all_gather(out, torch.ones(2), "parts")
        assert out.eq(1).all() and line.gather_objects(3, "objects") == [3]


def test_a_process_knows_how_another_is() -> None:
    mine = Process.this()
    assert mine.state() == "alive"
    assert Process(mine.host, mine.pid, "0").state() == "ended", "another process had that number before"
    assert Process("elsewhere", mine.pid, mine.started).state() == "unknown"
    pid = os.fork()
    if pid == 0:
        signal.pause()
    child = Process(mine.host, pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert child.state() == "stopped"
    os.kill(pid, signal.SIGKILL)
    while child.state() != "ended":  # its parent has not asked after it yet
        time.sleep(0.01)
    os.waitpid(pid, 0)


def test_a_place_reads_well() -> None:
    assert str(Place()) == "between steps"
    assert str(Place(phase="optimizer")) == "optimizer, microbatch 0"
