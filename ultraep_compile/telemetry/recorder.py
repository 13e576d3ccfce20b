"""Record what the router asked and what the plan made of it, without waiting for a device.

    recorder = get_recorder("run.npz")            # one per file, shared by everything in the process
    number = recorder.record("layers.0.mlp", counts_RE, slot_expert_RS, shares_RP)
    recorder.add(number, realised_P=rows_P, seconds={"load": 1e-4, "replicate": (start_event, end_event)})

Tensors on the CPU are copied; tensors on a GPU start an asynchronous copy to pinned memory that a later
call picks up. Nothing here blocks training: if copies fall behind, records are dropped and counted, and if
the file cannot be written there is one warning. Memory and file stay bounded: when `max_records` or
`max_bytes` is reached, every second recorded microbatch is thinned away and only every second new one is
kept, so the whole run stays covered.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ultraep_compile.telemetry.pending import Pending, Seconds
from ultraep_compile.telemetry.store import Store, build_trace
from ultraep_compile.telemetry.trace import Trace
from ultraep_compile.telemetry.trace_file import write_trace

NOT_KEPT = -1  # the number of a microbatch that is not recorded; `add` ignores it
WRITE_SHARE = 0.05  # of the run's time may go into writing the file in the background

_recorders: dict[str, Recorder] = {}
_registry_lock = threading.Lock()


class Recorder:
    """Collects records of any number of layers for one trace file.

    `max_records` and `max_bytes` bound what is held and written (of `max_bytes`, half for the matrices with
    source ranks, which are kept for fewer microbatches). The file is written every `flush_every` records by
    a thread, on `flush()`, `close()` and at exit. `queue` bounds the records whose copies from a GPU are
    still under way.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_records: int = 20_000,
        max_bytes: int = 128 << 20,
        flush_every: int = 500,
        queue: int = 256,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.closed = False
        self._flush_every, self._queue = flush_every, queue
        self._store = Store(max_records, max_bytes)
        self._pending: deque[Pending] = deque()
        self._lock = threading.RLock()
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._alike: Counter[str] = Counter()
        self._owner = os.getpid()
        self._unflushed = 0
        self._writer: threading.Thread | None = None
        self._write_seconds, self._written_at = 0.0, time.monotonic()
        self._fault: str | None = None
        self._warned = False
        self._store.info |= {"torch": torch.__version__, "started": time.time()}

    def record(
        self,
        layer: str,
        counts_RE: Tensor,
        slot_expert_RS: Tensor | None = None,
        shares_RP: Tensor | None = None,
        *,
        realised_P: Tensor | None = None,
        seconds: Mapping[str, Seconds] | None = None,
        rounds: int | Tensor | None = None,
    ) -> int:
        """Record one microbatch of `layer`; returns its number for `add`, or -1 if it is not kept.

        Without a plan every row goes to its expert's master. `seconds` maps a phase to its duration in
        seconds or to a pair of timed `torch.cuda.Event`s. `rounds` is how many times the dispatch buffer
        was filled.
        """
        if self.closed:
            return NOT_KEPT
        with self._lock:
            ranks, experts = counts_RE.shape
            slots = 0 if slot_expert_RS is None else slot_expert_RS.shape[1]
            assert experts % ranks == 0, (ranks, experts)
            assert slot_expert_RS is None or slot_expert_RS.shape[0] == ranks, slot_expert_RS.shape
            assert shares_RP is None or shares_RP.shape == (ranks, experts + ranks * slots), shares_RP.shape
            number = self._store.admit(layer, ranks, experts, slots)
            if number == NOT_KEPT:
                return NOT_KEPT
            tensors = {"counts_RE": counts_RE, "slot_expert_RS": slot_expert_RS, "shares_RP": shares_RP}
            if not self._stage(number, tensors, realised_P, seconds, rounds):
                self._store.forget(number)
                return NOT_KEPT
            self._unflushed += 1
            self._drain()
            if self._unflushed >= self._flush_every:
                self._write_in_background()
        self._warn_of_fault()
        return number

    def add(
        self,
        number: int,
        *,
        realised_P: Tensor | None = None,
        seconds: Mapping[str, Seconds] | None = None,
        rounds: int | Tensor | None = None,
    ) -> None:
        """Add what became known later. Times of a phase add up; records that are not kept are ignored."""
        if number == NOT_KEPT or self.closed:
            return
        with self._lock:
            if self._store.knows(number):
                self._stage(number, {}, realised_P, seconds, rounds)
                self._drain()

    def own_name(self, name: str, weight: Tensor) -> str:
        """The name of a layer among those that are called alike: `name`, `name#2`, ... in the order in which they first
        came, told apart by one of their weights (the object, not its values).
        """
        with self._lock:
            names: dict[str, str] = self._names.get(weight) or {}
            self._names[weight] = names
            if name not in names:
                self._alike[name] += 1
                names[name] = name if self._alike[name] == 1 else f"{name}#{self._alike[name]}"
            return names[name]

    def is_described(self, layer: str) -> bool:
        """Has `describe` been called for this layer?"""
        with self._lock:
            return self._store.is_described(layer)

    def describe(
        self,
        layer: str,
        *,
        top_k: int | None = None,
        expert_bytes: int | None = None,
        row_bytes: int | None = None,
        flops_per_row: int | None = None,
    ) -> None:
        """Facts that do not change: bytes of one expert's weights and of one row, FLOPs of one row."""
        facts = {
            "top_k": top_k,
            "expert_bytes": expert_bytes,
            "row_bytes": row_bytes,
            "flops_per_row": flops_per_row,
        }
        with self._lock:
            self._store.describe(layer, {key: int(fact) for key, fact in facts.items() if fact is not None})

    def annotate(self, **info: Any) -> None:
        """Keep JSON facts about the run in the trace, such as `title` or `notes`."""
        with self._lock:
            self._store.info |= info

    def trace(self) -> Trace:
        """All records so far, waiting for copies that are under way."""
        with self._lock:
            self._drain(wait=True)
            snapshot = self._store.snapshot()
        return build_trace(*snapshot)

    def flush(self) -> None:
        """Write the file now; a file that cannot be written gives one warning, never an error."""
        if self._owner != os.getpid():  # a forked child must not overwrite its parent's file
            return
        self._join_writer()
        self._write(self.trace())
        with self._lock:
            self._unflushed = 0
        self._warn_of_fault()

    def close(self) -> None:
        """Write the file and stop recording; a second close does nothing."""
        if not self.closed:
            self.flush()
            self.closed = True
            with _registry_lock:
                if _recorders.get(self.path) is self:
                    del _recorders[self.path]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _stage(
        self,
        number: int,
        tensors: Mapping[str, Tensor | None],
        realised_P: Tensor | None,
        seconds: Mapping[str, Seconds] | None,
        rounds: int | Tensor | None,
    ) -> bool:
        """Start the copies of one piece of a record; False if the queue is full or a graph is captured."""
        values = {**tensors, "realised_P": realised_P}
        if isinstance(rounds, Tensor):
            values["rounds"] = rounds
        piece = Pending.start(number, values, seconds or {}, rounds if isinstance(rounds, int) else None)
        if piece is None or (len(self._pending) >= self._queue and not self._drain()):
            self._store.dropped += bool(tensors)
            return False
        self._pending.append(piece)
        return True

    def _drain(self, wait: bool = False) -> int:
        """Move finished copies into the store, oldest first; returns how many."""
        done = 0
        while self._pending and self._pending[0].ready(wait):
            self._store.settle(self._pending.popleft())
            done += 1
        return done

    def _write_in_background(self) -> None:
        """Start a write unless one is running or writing has had its share of time."""
        busy = self._writer is not None and self._writer.is_alive()
        rested = time.monotonic() - self._written_at >= self._write_seconds / WRITE_SHARE
        if busy or not rested or self._owner != os.getpid():
            return
        self._unflushed = 0
        snapshot = self._store.snapshot()
        self._writer = threading.Thread(
            target=lambda: self._write(build_trace(*snapshot)), name="ultraep-trace", daemon=True
        )
        self._writer.start()

    def _write(self, trace: Trace) -> None:
        start = time.monotonic()
        try:
            write_trace(trace, self.path)
        except (OSError, ValueError) as error:
            self._fault = f"{type(error).__name__}: {error}"
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - start

    def _join_writer(self) -> None:
        writer = self._writer
        if writer is not None and writer is not threading.current_thread():
            writer.join()

    def _warn_of_fault(self) -> None:
        if self._fault is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the trace {self.path!r} could not be written ({self._fault}); training goes on and each "
                "later write is tried again. Point the option `trace` to a writable place with free space.",
                RuntimeWarning,
                stacklevel=3,
            )


def get_recorder(path: str | os.PathLike[str], **bounds: int) -> Recorder:
    """The process's recorder for a file, made with `bounds` (see `Recorder`) on first use."""
    key = os.path.abspath(os.fspath(path))
    with _registry_lock:
        if key not in _recorders:
            _recorders[key] = Recorder(key, **bounds)
        return _recorders[key]


@atexit.register
def close_all() -> None:
    """Write and close every recorder of the process."""
    for recorder in list(_recorders.values()):
        recorder.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_recorders.clear)
