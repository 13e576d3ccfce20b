"""What the ranks of a group exchange over, with a deadline on every wait.

Host tensors travel over gloo connections of our own: a wait that failed can close them, which ends all other waits here
and at the peers, and new ones can be made, while the user's group stays as it is. GPU tensors travel over the group's own
NCCL, whose work is watched from the listening thread.
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from ultraep_compile.exchange.place import here
from ultraep_compile.exchange.processes import Process
from ultraep_compile.exchange.watchdog import Failure, lost, store_of, watchdog

DEADLINE_S = 300.0
_SLICE_S = 0.05  # between two looks at what other ranks tell; also how long Ctrl-C may have to wait
_HEADER = 256  # bytes: what a rank has come for, and how much it brings
_CLOSING = 0x7FFFFFF1  # a tag that nothing is sent under
_GLOO_LATER_S = 30.0  # gloo's own limits come after ours, which speak better

T = TypeVar("T")


class Line:
    """The connections between the ranks of one group. All ranks make the same exchanges in the same order.

    `deadline`: seconds that a peer may take.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.deadline = group, DEADLINE_S
        self.ranks = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self.ranks)
        self.watchdog = watchdog()
        self.watchdog.lines.append(self)
        self.epoch = self.watchdog.epoch
        self._connections: dict[str, Any] = {}
        self._aside: _Aside | None = None
        self._on_device: list[tuple[Any, float, str]] = []  # NCCL work, when it is late, for what
        self._lock = threading.Lock()  # of that list, which the listening thread shortens
        nccl = "cuda:nccl" in str(dist.get_backend_config(group))
        self.uses_nccl = nccl

    # ---- exchanges of all ranks

    def all_gather(self, out: Tensor, part: Tensor, what: str) -> None:
        """Every rank's `part`, in rank order along dim 0 of `out`."""
        part = part.contiguous()
        if self.size == 1:
            out.copy_(part.view(out.shape))
        elif self._by_nccl(out):
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
            self._launch(lambda: gather(out, part, group=self.group, async_op=True), what)
        else:
            self._gather_bytes(_bytes(out), _bytes(part), what, "data")

    def all_to_all(self, out: Tensor, rows: Tensor, receive: list[int], send: list[int], what: str) -> None:
        """Rows grouped by destination -> `out`, rows grouped by source; `send` and `receive` count rows per peer."""
        if self.size == 1:
            out.copy_(rows)
        elif self._by_nccl(out):
            self._launch(
                lambda: dist.all_to_all_single(out, rows, receive, send, group=self.group, async_op=True), what
            )
        else:
            width = out.shape[1:].numel() * out.element_size()
            sizes = [n * width for n in receive], [n * width for n in send]
            self._run(
                lambda c: c.alltoall_base(_bytes(out), _bytes(rows), *sizes, self._limit(c10d.AllToAllOptions())), what
            )

    def all_reduce(self, tensor: Tensor, what: str, op: Any = dist.ReduceOp.SUM) -> None:
        """Every rank's tensor added up (or as `op` says), in place."""
        if self.size == 1:
            return
        if self._by_nccl(tensor):
            self._launch(lambda: dist.all_reduce(tensor, op, self.group, async_op=True), what)
            return
        options = self._limit(c10d.AllreduceOptions())
        options.reduceOp = op
        self._run(lambda c: c.allreduce([tensor], options), what)

    def broadcast(self, tensor: Tensor, source: int, what: str) -> None:
        """The tensor of rank `source` (of the group) on every rank, in place."""
        if self.size == 1:
            return
        if self._by_nccl(tensor):
            root = self.ranks[source]
            self._launch(lambda: dist.broadcast(tensor, root, self.group, async_op=True), what)
            return
        options = self._limit(c10d.BroadcastOptions())
        options.rootRank, options.rootTensor = source, 0
        self._run(lambda c: c.broadcast([tensor], options), what)

    def gather_objects(self, value: T, what: str) -> list[T]:
        """Every rank's value, of whatever kind and size, by rank. Raises PeerTimeoutError on every rank where some came
        for something else."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        head = len(data).to_bytes(8, "little") + what.encode()[: _HEADER - 8]
        header = torch.frombuffer(bytearray(head.ljust(_HEADER, b"\0")), dtype=torch.uint8)
        headers = header.new_empty(self.size, _HEADER)
        self._gather_bytes(headers.view(-1), header, what, "control")
        wanted = [bytes(h[8:].tolist()).rstrip(b"\0").decode(errors="replace") for h in headers]
        if len(set(wanted)) > 1:
            places = "; ".join(f"rank {self.ranks[r]} to {w}" for r, w in enumerate(wanted[:8]))
            text = f"the ranks have come to different exchanges: {places}"
            self.fail(what, 0.0, Failure(tuple(self.ranks), text))
        sizes = [int.from_bytes(bytes(h[:8].tolist()), "little") for h in headers]
        rows = data.new_zeros(self.size, max(sizes))
        self._gather_bytes(rows.view(-1), torch.cat([data, data.new_zeros(max(sizes) - len(data))]), what, "control")
        return [pickle.loads(bytes(row[:n].numpy())) for row, n in zip(rows, sizes, strict=True)]

    def barrier(self, what: str) -> None:
        """Return once all ranks have come."""
        self.gather_objects(None, what)

    def _gather_bytes(self, out: Tensor, mine: Tensor, what: str, channel: str) -> None:
        """Every rank's bytes behind one another; both tensors have one dim."""
        if len(mine):
            options = self._limit(c10d.AllgatherOptions())  # pyright: ignore[reportPrivateImportUsage]
            self._run(lambda c: c._allgather_base(out, mine, options), what, channel)

    def guard(self, call: Callable[[], T], what: str) -> T:
        """The result of a call in which torch itself exchanges over the group (a `DTensor`'s `full_tensor`): made by another
        thread, which a rank that is gone may hold up until the group's own limit, but not this one."""
        if self.size == 1:
            return call()
        self._check(what)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def on_this_device() -> T:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(graded):
                return call()

        graded = torch.is_grad_enabled()
        return self._wait(self._elsewhere(on_this_device), what)

    # ---- messages from rank to rank

    def send(self, tensor: Tensor, target: int, tag: int, what: str, channel: str = "data") -> Any:
        """Begin to send; the work, to be given to `finish` or waited for on another thread."""
        return self._message(lambda c: c.send([tensor], target, tag), what, channel)

    def receive(self, tensor: Tensor, source: int, tag: int, what: str, channel: str = "data") -> Any:
        """Begin to receive; the work, to be given to `finish`."""
        return self._message(lambda c: c.recv([tensor], source, tag), what, channel)

    def finish(self, work: Any, what: str) -> None:
        """Wait for a message. gloo's wait cannot be interrupted, and a short one would end the connection, so that
        another thread makes it."""
        limit = self._gloo_limit()
        self._wait(self._elsewhere(lambda: work.wait(limit)), what)

    def pass_on(self, tensor: Tensor, peer: int, sends: bool, what: str) -> None:
        """Send to, or receive from, one rank; done on return, on a GPU in the order of its stream."""
        if self._by_nccl(tensor):
            start = dist.isend if sends else dist.irecv
            self._launch(lambda: start(tensor, self.ranks[peer], self.group), what)
        else:
            self.finish((self.send if sends else self.receive)(tensor, peer, 0, what), what)

    # ---- connections

    def open(self, channel: str, what: str) -> Any:
        """The connections of a channel; all ranks together make them at its first use after a failure."""
        self._check(what)
        connection = self._connections.get(channel)
        if connection is None:
            store = store_of(self.group, f"ultraep/{channel}/{self.epoch}")
            limit = self._gloo_limit()
            made = self._elsewhere(lambda: dist.ProcessGroupGloo(store, self.rank, self.size, limit))
            connection = self._wait(made, f"{what}: connecting {channel!r}")
            self._look(what, time.monotonic())  # another thread may have failed meanwhile: peers make new ones, too
            self._connections[channel] = connection
            if len(self._connections) == 1:
                self._introduce()
        return connection

    def _introduce(self) -> None:
        """Every rank's process, so that those on one machine see one another end."""
        for rank, fields in zip(
            self.ranks, self.gather_objects(asdict(Process.this()), "getting to know the ranks"), strict=True
        ):
            self.watchdog.processes[rank] = Process(**fields)

    def close(self) -> None:
        """Close all connections: whatever waits on them, here or at a peer, ends now. They are made again when needed."""
        connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            for peer in range(self.size):
                if peer != self.rank:  # gloo has no other way to close: after a wait that was too long it does
                    with contextlib.suppress(RuntimeError):
                        connection.recv([torch.empty(1)], peer, _CLOSING).wait(datetime.timedelta(milliseconds=1))
        self._abort()
        if self._aside is not None:
            self._aside.end()
            self._aside = None

    def let_go(self) -> None:
        """Close all connections for good: the group was destroyed."""
        with contextlib.suppress(ValueError):  # a watchdog that has ended knows no lines
            self.watchdog.lines.remove(self)
        self.close()

    # ---- waits

    def _run(self, start: Callable[[Any], Any], what: str, channel: str = "data") -> None:
        """One exchange of host tensors: begin, and wait in slices."""
        work, began = start(self.open(channel, what)), time.monotonic()
        with self.watchdog.waits(what):
            while True:
                ended = work.is_completed()  # asked before: work may end just when the slice of a wait does
                try:
                    work.wait(datetime.timedelta(seconds=_SLICE_S))
                    return
                except RuntimeError as error:
                    if ended:
                        self.fail(what, time.monotonic() - began, cause=error)
                self._look(what, began)

    def _message(self, start: Callable[[Any], Any], what: str, channel: str) -> Any:
        connection = self.open(channel, what)
        try:
            return start(connection)
        except RuntimeError as error:
            self.fail(what, 0.0, cause=error)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for what another thread or a device brings about."""
        began, pause = time.monotonic(), 2e-5
        with self.watchdog.waits(what):
            while not done():
                time.sleep(pause)
                pause = min(2 * pause, _SLICE_S / 10)
                self._look(what, began)

    def _wait(self, result: Future[T], what: str) -> T:
        """What another thread is to bring."""
        began = time.monotonic()
        with self.watchdog.waits(what):
            while True:
                ended = result.done()
                try:
                    return result.result(_SLICE_S)
                except (FutureTimeout, RuntimeError) as error:
                    if ended:
                        self.fail(what, time.monotonic() - began, cause=error)
                self._look(what, began)

    def _look(self, what: str, began: float) -> None:
        """End a wait that has no use any more."""
        waited = time.monotonic() - began
        if self.watchdog.heard is not None or self.epoch != self.watchdog.epoch or waited > self.deadline:
            self.fail(what, waited)

    def _check(self, what: str) -> None:
        """Raise what this process has heard since its last exchange."""
        self.epoch = self.watchdog.epoch
        if self.watchdog.heard is not None:
            self.fail(what, 0.0)

    def fail(
        self, what: str, waited: float, failure: Failure | None = None, cause: BaseException | None = None
    ) -> NoReturn:
        """Raise `PeerTimeoutError` for a wait that failed, once it is known who is missing; connections are closed."""
        epoch = self.epoch if self.watchdog.heard is None else self.watchdog.epoch
        if failure is None:
            failure = self.watchdog.report(self.ranks, epoch, waited)
        else:
            self.watchdog.announce(failure, epoch)
        self.watchdog.give_up(epoch)
        raise lost(failure, what, waited, self.deadline) from cause

    def _elsewhere(self, call: Callable[[], T]) -> Future[T]:
        if self._aside is None:
            self._aside = _Aside()
        return self._aside.do(call)

    def _gloo_limit(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.deadline + _GLOO_LATER_S)

    def _limit(self, options: Any) -> Any:
        options.timeout = self._gloo_limit()
        return options

    # ---- NCCL

    def _by_nccl(self, tensor: Tensor) -> bool:
        return tensor.is_cuda and self.uses_nccl

    def _launch(self, start: Callable[[], Any], what: str) -> None:
        """An exchange on the device: what is launched from now on comes after it, and the host goes on."""
        self._check(what)
        work = start()
        work.wait()
        with self._lock:
            self._on_device.append((work, time.monotonic() + self.deadline, f"{what} ({here()})"))

    def settle(self) -> None:
        """Wait on the host for what was launched on the device; before it reads there what came from other ranks."""
        for work, _, what in self._under_way():
            self.until(work.is_completed, what)
        self._under_way()

    def look_after(self) -> None:
        """From the listening thread: end work on the device that is late, or that a failed rank holds up."""
        now = time.monotonic()
        for _, late, _ in self._under_way():
            if now > late and self.watchdog.heard is None:
                self.watchdog.heard = self.watchdog.report(self.ranks, self.epoch, self.deadline)
        if self.watchdog.heard is not None:
            self._abort()

    def _under_way(self) -> tuple[tuple[Any, float, str], ...]:
        """What has not ended on the device; the rest is let go."""
        with self._lock:
            self._on_device = [entry for entry in self._on_device if not entry[0].is_completed()]
            return tuple(self._on_device)

    def _abort(self) -> None:
        """End what is under way on the device."""
        with self._lock:
            ended, self._on_device = self._on_device, []
        if ended:
            self.group.abort()


class _Aside:
    """A thread that makes the waits that Python cannot interrupt, one after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="ultraep wait").start()

    def do(self, call: Callable[[], T]) -> Future[T]:
        result: Future[T] = Future()
        self._calls.put((call, result))
        return result

    def end(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (job := self._calls.get()) is not None:
            call, result = job
            try:
                result.set_result(call())
            except BaseException as error:  # the thread that asked raises it
                result.set_exception(error)
            del job, call, result


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes: gloo copies only some types."""
    return tensor.reshape(-1).view(torch.uint8)


def line_named(group: str) -> Line:
    """The line of the group of that name."""
    return line_of(c10d._resolve_process_group(group))  # pyright: ignore


_lines: dict[dist.ProcessGroup, Line] = {}


def line_of(group: dist.ProcessGroup) -> Line:
    """The line of a group, the same for all that exchange over it."""
    line, current = _lines.get(group), watchdog()
    if line is None or line.watchdog is not current:
        for known in [g for g, made in _lines.items() if made.watchdog is not current or _destroyed(g)]:
            _lines.pop(known).let_go()
        line = _lines[group] = Line(group)
    return line


def _destroyed(group: dist.ProcessGroup) -> bool:
    try:
        return not dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return True
