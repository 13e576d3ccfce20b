"""Who has failed, told from rank to rank: one thread of each process listens, beside whatever the process computes.

Failures of a job are numbered. The first rank to notice number n leaves a mark under n in the job's store; every process
looks there a few times a second, raises at its next exchange, closes its connections and goes on to n + 1, where all
that are still there meet again. A mark says either what a rank raised, or that somebody waited in vain: then all that
hear it answer where they are, and who made the mark names those that are missing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.exchange.place import here
from ultraep_compile.exchange.processes import Process

if TYPE_CHECKING:
    from ultraep_compile.exchange.line import Line

POLL_S = 0.2
ROLL_CALL_S = 2.0
"""Seconds that a process has to answer: its listening thread may have to wait for the interpreter."""
_SHOWN = 8  # ranks in one message

T = TypeVar("T")
Error = TypeVar("Error", bound=BaseException)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why exchanges cannot go on, the same on every rank."""

    ranks: tuple[int, ...]
    """Of the job: those that failed or are missing."""
    text: str
    """A clause that names them and what is known of each."""

    def message(self, what: str, waited: float, deadline: float) -> str:
        """For the rank that wanted `what`."""
        after = f" after {waited:.1f} s" if waited >= 0.1 else ""
        return (
            f"{here()}: rank {dist.get_rank() if dist.is_initialized() else '?'} cannot go on with {what}{after}: {self.text}. "
            "Nothing that depended on it was used. Look at that rank's own error or log; if it was only slow, raise the "
            f"deadline of {deadline:g} s (deadline_s of the backend, deadline of a pipeline)."
        )


class Watchdog:
    """This process's ear in a job, for as long as its default process group lives."""

    def __init__(self) -> None:
        self.world = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.lines: list[Line] = []
        self.processes: dict[int, Process] = {self.rank: Process.this()}
        self.heard: Failure | None = None  # of the number that is open now
        self.epoch = 0
        self._waiting: tuple[str, float] | None = None  # what the main thread waits for, since when
        self._free = time.monotonic()  # when its last wait ended
        self._lock, self._reporting = threading.RLock(), threading.Lock()
        self._reported: tuple[int, Failure] = (-1, Failure((), ""))  # number, and what came out
        self._ended = threading.Event()
        if dist.get_backend() == "fake":  # torch's group without peers: nobody to hear, and a store that has every key
            return
        self.store = store_of(self.world, "ultraep/watchdog")
        while self.store.check([f"mark/{self.epoch}"]):  # of a time before this process came
            self.epoch += 1
        self.store.set(f"process/{self.rank}", json.dumps(asdict(self.processes[self.rank])))
        threading.Thread(target=self._listen, daemon=True, name="ultraep watchdog").start()

    @contextlib.contextmanager
    def waits(self, what: str) -> Iterator[None]:
        """The main thread waits while the block runs."""
        self._waiting = f"{what} ({here()})", time.monotonic()
        try:
            yield
        finally:
            self._waiting, self._free = None, time.monotonic()

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._ended.set()
        for line in self.lines:
            line.close()
        self.lines.clear()

    # ---- a failure that this process notices

    def tell(self, error: BaseException) -> None:
        """This process raises `error`: whoever waits for it shall know. Does nothing for what others told it."""
        if getattr(error, "_told", False):
            return
        epoch = self.epoch
        words = " ".join(str(error).split())[:300]
        text = f"rank {self.rank} raised {type(error).__name__}{': ' * bool(words)}{words} ({here()})"
        self.announce(Failure((self.rank,), text), epoch)
        told(error)
        self.give_up(epoch)

    def announce(self, failure: Failure, epoch: int) -> None:
        """Leave a mark of a failure whose cause is known, for all ranks of the job: also those outside of the group in
        which it was noticed go on to the next number."""
        mark = json.dumps({"by": self.rank, "ranks": failure.ranks, "text": failure.text})
        with contextlib.suppress(RuntimeError, TimeoutError):  # without a store, closed connections must do
            _within(ROLL_CALL_S, lambda: self.store.compare_set(f"mark/{epoch}", "", mark))

    def report(self, ranks: Sequence[int], epoch: int, waited: float) -> Failure:
        """A wait for other ranks out of `ranks` failed; the cause, after asking around."""
        with self._reporting:  # several threads of this process may wait for the same rank
            if self._reported[0] != epoch:
                self._reported = epoch, self.heard or self._ask(ranks, epoch, waited)
            return self._reported[1]

    def _ask(self, ranks: Sequence[int], epoch: int, waited: float) -> Failure:
        mark = json.dumps({"by": self.rank})
        found: Failure | None = None
        with contextlib.suppress(RuntimeError, TimeoutError):  # the store is gone with a rank, or stopped with it
            first = _within(1.0, lambda: self.store.compare_set(f"mark/{epoch}", "", mark)).decode()
            if first != mark:
                return _within(ROLL_CALL_S + 1.5, lambda: self._verdict(epoch, json.loads(first)))
            found = _within(ROLL_CALL_S + 1.0, lambda: self._call_roll(ranks, epoch, waited))
            verdict = json.dumps({"ranks": found.ranks, "text": found.text})
            _within(1.0, lambda: self.store.set(f"verdict/{epoch}", verdict))
        return found or self._judge(ranks, None, waited)

    def give_up(self, epoch: int) -> None:
        """This process has raised for failure number `epoch`."""
        with self._lock:
            if self.epoch != epoch:
                return
            self.epoch, self.heard = epoch + 1, None
            for line in self.lines:
                line.close()

    def _verdict(self, epoch: int, mark: dict[str, Any]) -> Failure:
        """What another rank's mark says; of a roll call, once it is over."""
        until = time.monotonic() + ROLL_CALL_S + 1.2
        while "text" not in mark:
            if self.store.check([f"verdict/{epoch}"]):
                mark = json.loads(self.store.get(f"verdict/{epoch}"))
            elif time.monotonic() > until:
                return self._judge([mark["by"]], None, 0.0)
            else:
                time.sleep(POLL_S / 4)
        return Failure(tuple(mark["ranks"]), mark["text"])

    def _call_roll(self, ranks: Sequence[int], epoch: int, waited: float) -> Failure:
        """Wait for every rank's answer; those that are known to have ended or stopped give none."""
        answers: dict[int, dict[str, Any]] = {}
        for rank in range(self.size):  # ranks that never exchanged anything have nothing to answer
            if rank not in self.processes and self.store.check([f"process/{rank}"]):
                self.processes[rank] = Process(**json.loads(self.store.get(f"process/{rank}")))
        asked = sorted({*ranks, *self.processes} - {self.rank})
        until = time.monotonic() + ROLL_CALL_S
        while open_ := [r for r in asked if r not in answers and self._state(r) in ("alive", "unknown")]:
            for rank in open_:
                if self.store.check([f"answer/{epoch}/{rank}"]):
                    answers[rank] = json.loads(self.store.get(f"answer/{epoch}/{rank}"))
            if time.monotonic() > until:
                break
            time.sleep(POLL_S / 4)
        return self._judge(ranks, answers, waited)

    def _judge(self, ranks: Sequence[int], answers: dict[int, dict[str, Any]] | None, waited: float) -> Failure:
        """Who is missing: ranks that are gone; else those that do not answer; else those that did not come.

        `answers`: by rank; None where nobody could be asked.
        """
        others = sorted({*ranks} - {self.rank})
        for group in (others, sorted({*self.processes} - {*others, self.rank})):
            gone = {r: s for r in group if (s := self._state(r)) in _STATES}
            far = [r for r in group if self._state(r) == "unknown"]
            silent = [r for r in (far if gone or answers is None else group) if r not in (answers or ())]
            told = {r: "it does not answer" for r in silent if group is others or answers is not None}
            told |= {r: f"its process (pid {self.processes[r].pid}) {_STATES[s]}" for r, s in gone.items()}
            if told:
                return _missing(told)
        if answers is None:
            return Failure(
                tuple(others), "the job's store does not answer: whoever hosts it (rank 0 or the launcher) is gone"
            )
        busy = {r: a["since"] for r, a in answers.items() if a["waits"] is None and r in others}
        long = {r: s for r, s in busy.items() if s >= waited / 2} or busy
        if long:
            at = {r: f"it has been busy for {s:.0f} s ({answers[r]['at']})" for r, s in long.items()}
            return _missing(at, "has not come")
        places = {r: answers[r]["waits"] for r in others} | {self.rank: (self._waiting or ("",))[0]}
        usual = Counter(places.values()).most_common(1)[0][0]
        odd = tuple(r for r in sorted(places) if places[r] != usual)
        if not odd:
            return Failure(
                tuple(others), f"all ranks are there and wait for {usual}, but a connection between them broke"
            )
        text = "; ".join(f"rank {r} waits for {places[r]}" for r in sorted(places)[:_SHOWN])
        return Failure(odd, f"the ranks wait at different places: {text}")

    def _state(self, rank: int) -> str:
        known = self.processes.get(rank)
        return "unknown" if known is None else known.state()

    # ---- a failure that others notice

    def _listen(self) -> None:
        """Look for a mark, a few times a second; the thread's whole life."""
        answered = -1
        while not self._ended.wait(POLL_S):
            if dist.group.WORLD is not self.world:
                self.close()
                break
            for line in tuple(self.lines):
                line.look_after()
            epoch = self.epoch
            try:
                if self.heard is not None or not self.store.check([f"mark/{epoch}"]):
                    continue
                mark = json.loads(self.store.get(f"mark/{epoch}"))
                if "text" not in mark and mark["by"] == self.rank:
                    continue
                if "text" not in mark and answered != epoch:
                    self.store.set(f"answer/{epoch}/{self.rank}", json.dumps(self._answer()))
                    answered = epoch
                failure = self._verdict(epoch, mark)
            except RuntimeError:  # the store is gone; waits end by their deadlines
                continue
            with self._lock:
                if self.epoch == epoch:
                    self.heard = failure
        self.world = None

    def _answer(self) -> dict[str, Any]:
        waiting = self._waiting
        since = time.monotonic() - (waiting[1] if waiting else self._free)
        return {"waits": waiting[0] if waiting else None, "since": since, "at": str(here())}


_STATES = {"ended": "has ended", "stopped": "is stopped"}


def _missing(told: dict[int, str], verb: str = "is missing") -> Failure:
    named = [f"rank {r} {verb}: {why}" for r, why in sorted(told.items())]
    more = f"; and {len(named) - _SHOWN} more ranks" if len(named) > _SHOWN else ""
    return Failure(tuple(sorted(told)), "; ".join(named[:_SHOWN]) + more)


def store_of(group: dist.ProcessGroup | None, prefix: str) -> Any:
    """A connection of its own to the store that a group was made with: a thread that waits on one holds up its users."""
    get = getattr(group, "get_group_store", None)
    store: Any = get() if get is not None else dist.distributed_c10d._get_default_store()  # pyright: ignore
    if hasattr(store, "clone"):
        store = store.clone()
    return dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may never return, or TimeoutError."""
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ultraep store")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError
    return found[0]


_watchdog: Watchdog | None = None


def watchdog() -> Watchdog:
    """That of the default process group; from the first request on, this process hears what others tell."""
    global _watchdog
    if _watchdog is None or _watchdog.world is not dist.group.WORLD:
        if _watchdog is not None:
            _watchdog.close()
        else:
            _tell_what_ends_the_process()
        _watchdog = Watchdog()
    return _watchdog


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """The block tells all other ranks of whatever is raised in it, and raises it.

    For loops that catch exceptions themselves: what is raised in a pipeline's step, or ends the program, is told anyway.
    The others raise `PeerTimeoutError` with its words within 2 s, or at their next exchange; connections are made anew at
    the next exchange of all ranks.

    Example:
        try:
            with ultraep_compile.exchange.failing():
                train_step(next(batches))
        except (BadSample, PeerTimeoutError):
            optimizer.zero_grad()  # on all ranks: the step is left out
    """
    try:
        yield
    except BaseException as error:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # the store is gone: the user's own error is the one to see
                watchdog().tell(error)
        raise


def _tell_what_ends_the_process() -> None:
    """An exception that nobody caught is told, too; and a thread that waits must not outlive the program."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if _watchdog is not None and _watchdog.world is dist.group.WORLD and dist.group.WORLD is not None:
            with contextlib.suppress(RuntimeError, TimeoutError):
                _watchdog.tell(error)
        before(kind, error, trace)

    sys.excepthook = hook
    atexit.register(lambda: _watchdog.close() if _watchdog is not None else None)


def lost(failure: Failure, what: str, waited: float, deadline: float) -> PeerTimeoutError:
    """The error that a rank raises for a failure."""
    return told(PeerTimeoutError(failure.message(what, waited, deadline)))


def told(error: Error) -> Error:
    """The error, marked as one that other ranks know of already: it may pass several places that tell."""
    error._told = True  # pyright: ignore[reportAttributeAccessIssue]
    return error
