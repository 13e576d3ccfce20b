"""Exchanges of healthy ranks on a machine that is busy with other things: none may be ended before its deadline."""

from __future__ import annotations

import contextlib
import datetime
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from tests.multirank import fake_group, run_ranks
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.exchange import Line, line, line_of
from ultraep_compile.executor.channels import open_channels
from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.messages import Message


def _exchange(line: Line, kind: int, channel: str) -> None:
    """One exchange of a kind, its result checked."""
    rank, size = line.rank, line.size
    if kind == 0:
        total = torch.ones(3)
        line.all_reduce(total, "the sum")
        assert total.eq(size).all()
    elif kind == 1:
        assert line.gather_objects((rank, kind), "objects") == [(r, kind) for r in range(size)]
    elif kind == 2:
        assert line.guard(lambda: rank, "a call") == rank
    else:
        message, after, before = torch.empty(2), (rank + 1) % size, (rank - 1) % size
        works = [
            line.receive(message, before, 1, "a message", channel),
            line.send(torch.full((2,), float(rank)), after, 1, "a message", channel),
        ]
        for work in works:
            line.finish(work, "a message")
        assert message.eq(before).all()


@contextlib.contextmanager
def _beside(hogs: int, seconds: float) -> Iterator[None]:
    """Other processes compute while the block runs, and a thread of this one, which lets go of the interpreter as seldom as
    a loader's."""
    busy = f"import time; end = time.time() + {seconds}\nwhile time.time() < end: pass"  # also if nobody ends it
    others = [subprocess.Popen([sys.executable, "-S", "-c", busy]) for _ in range(hogs)]
    over = threading.Event()

    def load() -> None:
        while not over.wait(0.002):
            sum(range(100_000))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for other in others:
            other.kill()
            other.wait()


def _many(rank: int, hogs: int, seconds: float) -> int:
    """Exchange until the time is up, now earlier and now later than the peer; how often."""
    assert dist.group.WORLD is not None
    mine = line_of(dist.group.WORLD)
    for channel in ("data", "control", "other"):
        mine.open(channel, "connecting")
    line._SLICE_S = 0.001  # so that as many slices of waits end just when the work does as in days of training
    together, apart = random.Random(1), random.Random(rank)
    done = 0
    with _beside(hogs if rank == 0 else 0, seconds + 5):
        until = time.monotonic() + seconds
        while all(mine.gather_objects(time.monotonic() < until, "is there time left")):
            for _ in range(20):
                time.sleep(apart.choice([0.0, 0.0005, 0.001, 0.0015, 0.002]))
                _exchange(mine, together.randrange(4), together.choice(["data", "other"]))
                done += 1
    assert mine.watchdog.epoch == 0
    return done


@pytest.mark.parametrize(("ranks", "hogs", "seconds"), [(2, 2, 1.0), pytest.param(3, 20, 60.0, marks=pytest.mark.slow)])
def test_no_exchange_of_healthy_ranks_fails_under_load(ranks: int, hogs: int, seconds: float) -> None:
    assert min(run_ranks(ranks, _many, hogs, seconds)) > 0


class _EndsAfterTheSlice:
    """Work that ends between a wait whose slice ran out and the next look at it."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self, limit: datetime.timedelta) -> bool:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        return True

    def is_completed(self) -> bool:
        return self.waits > 0


class _ResultAfterTheSlice(Future):
    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result("late")
            raise FutureTimeout
        return super().result(timeout)


def test_work_that_ends_just_after_a_slice_has_not_failed() -> None:
    with fake_group(2) as group:
        mine, work = line_of(group), _EndsAfterTheSlice()
        mine._connections["data"] = connection = Mock()
        mine._run(lambda c: c is connection and work, "the sum")
        assert work.waits == 2
        assert mine._wait(_ResultAfterTheSlice(), "a call") == "late"
        mine._connections.clear()


class _OnDevice:
    """Work that has ended when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def wait(self) -> None:
        """Orders streams only."""

    def is_completed(self) -> bool:
        self.asked += 1
        return self.asked > 2


def test_the_listening_thread_may_look_at_work_on_a_device_at_any_time() -> None:
    with fake_group(2) as group:
        mine, over = line_of(group), threading.Event()

        def listen() -> None:
            while not over.is_set():
                mine.look_after()

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                works = [_OnDevice() for _ in range(5)]
                for work in works:
                    mine._launch(lambda work=work: work, "the sum")
                mine.settle()
                assert all(work.asked > 2 for work in works), "none is forgotten"
                assert not mine._on_device
        finally:
            over.set()
            thread.join()


DEADLINE = 2.0  # seconds


def _others_go_on(rank: int) -> list[str]:
    """Two of three ranks come to different exchanges, and raise; the third hears of it; then all meet again. Afterwards a
    message is taken later than the deadline after it was sent, while nobody waits for it."""
    world = dist.group.WORLD
    two: Any = dist.new_group([0, 1])
    assert world is not None
    everyone, said = line_of(world), []
    everyone.barrier("meeting")
    for turn in range(3):
        try:
            if rank < 2:
                line_of(two).barrier(f"evaluation {rank}")
            everyone.barrier(f"turn {turn}")  # the third rank waits here for those that come no more
        except PeerTimeoutError as error:
            said.append(str(error))
        assert everyone.gather_objects(turn, "meeting again") == [turn] * 3
    if rank < 2:
        channel = open_channels(line_of(two), torch.device("cpu"), ("features",))["features"]
        message = Message("features", 0, 1, Op("F", 0, 0), 0)
        line_of(two).deadline = DEADLINE
        value = torch.arange(3e6)
        if rank == 0:
            channel.send(message, value, 0)
            time.sleep(2 * DEADLINE)  # it computes
        else:
            channel.post(message)
            time.sleep(1.5 * DEADLINE)
            assert torch.equal(channel.take(message, 0, message.producer), value)
        channel.drain()
        channel.close()
        dist.destroy_process_group(two)
    again: Any = dist.new_group([0, 1, 2])
    line_of(again).barrier("over a new group")
    assert len(everyone.watchdog.lines) == 2, "that of the destroyed group is let go"
    return said


def test_ranks_outside_of_a_failed_group_meet_the_others_again_and_slow_receivers_are_waited_for() -> None:
    for said in run_ranks(3, _others_go_on):
        assert len(said) == 3
        assert all("rank 0 to evaluation 0; rank 1 to evaluation 1" in text for text in said)
