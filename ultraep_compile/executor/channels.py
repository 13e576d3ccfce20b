"""Communicators of a pipeline, one per channel, so that none holds up another.

A header (shapes and which message it is) goes over gloo even where the payload goes over NCCL: the sender knows the
shapes when it has *launched* its operation, so a receiver on a GPU needs not wait for the device to learn them, and a
peer that is gone shows on the host, where a wait can end."""

from __future__ import annotations

import datetime
import json
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.errors import PipelineError
from ultraep_compile.exchange import Line, line_of
from ultraep_compile.executor import wire
from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.messages import CHANNELS, Message

HEADER_BYTES = 1024
_HEADER, _MORE, _PAYLOAD = 1, 2, 3  # tags
_UNTIL_CLOSED = datetime.timedelta(days=365)  # no rank waits for a send but at the end of a step, which has its deadline


@dataclass(slots=True)
class _Posted:
    """A receive whose header is awaited."""

    message: Message
    buffer: Tensor
    work: Any


@dataclass(slots=True)
class _Started:
    """A transfer under way, and the tensor that must live until it ends."""

    work: Any
    tensor: Tensor
    on_host: bool  # gloo; else NCCL


class _Outbox:
    """Sends under way. A thread waits for them in turn and lets go of their tensors: gloo tells nobody that a send has
    ended, and a whole step's features must not stay in memory until its end."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.left: queue.Queue[tuple[Message, _Started] | None] = queue.Queue()
        self.failed: Message | None = None
        self.thread: threading.Thread | None = None

    def add(self, message: Message, started: _Started) -> None:
        self.left.put((message, started))
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True, name=f"ultraep send {self.channel.name}")
            self.thread.start()

    def _run(self) -> None:
        while (job := self.left.get()) is not None:
            message, started = job
            try:
                if started.on_host:
                    started.work.wait(_UNTIL_CLOSED)
                else:  # NCCL's own wait would only order streams
                    while not started.work.is_completed():
                        time.sleep(0.0005)
            except RuntimeError:
                self.failed = self.failed or message
            del started, job
            self.left.task_done()

    def drain(self) -> None:
        """Wait until every send has ended."""
        line = self.channel.line
        line.until(lambda: self.failed is not None or not self.left.unfinished_tasks, f"sending on {self.channel.name}")
        if self.failed is not None:
            line.fail(self.channel.doing(self.failed), 0.0)

    def end(self) -> None:
        """End the thread, once what is under way has ended."""
        self.left.put(None)


@dataclass(slots=True)
class Channel:
    """One channel of one pipeline; its messages have the channel's own connections of the line.

    `ordered`: payloads start in the order in which the plan has them, sends behind earlier receives. NCCL runs what it is
    given on one stream, so a send before an earlier receive could wait for ever; gloo needs no order between the two."""

    name: str
    line: Line
    device: torch.device
    payloads: dist.ProcessGroup | None = None  # NCCL; None: over the line
    ordered: bool = False
    posted: dict[Message, _Posted] = field(default_factory=dict)
    line_up: deque[tuple[Message, Tensor | None]] = field(
        default_factory=deque
    )  # of payloads, if ordered; None: a receive
    arriving: list[tuple[Message, Any]] = field(default_factory=list)  # work on the device, in this step
    outbox: _Outbox = field(init=False)

    def __post_init__(self) -> None:
        self.outbox = _Outbox(self)

    def post(self, message: Message) -> None:
        """Begin to receive a message. Each pair of ranks must post in the order in which the other sends."""
        buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self.posted[message] = _Posted(message, buffer, self._receive_on_host(message, buffer, _HEADER))
        if self.ordered:
            self.line_up.append((message, None))

    def take(self, message: Message, step: int, waiting: Op) -> Any:
        """Wait for a posted message and return its value. `waiting`: the operation that needs it."""
        posted, what = self.posted.pop(message), self.doing(message, waiting)
        self.line.finish(posted.work, what)
        fields, more = wire.decode(posted.buffer)
        if fields is None:
            rest = torch.empty(more, dtype=torch.uint8)
            self.line.finish(self._receive_on_host(message, rest, _MORE), what)
            fields = json.loads(bytes(rest.numpy()))
        self._check(message, step, fields)
        entries = wire.shapes(fields["value"])
        buffer = torch.empty(wire.buffer_size(entries), dtype=torch.uint8, device=self.device)
        self._receive(message, buffer, what)
        return wire.unpack(fields["value"], wire.from_bytes(buffer, entries))

    def _receive_on_host(self, message: Message, buffer: Tensor, tag: int) -> Any:
        return self.line.receive(buffer, message.source, tag, self.doing(message), self.name)

    def _receive(self, message: Message, buffer: Tensor, what: str) -> None:
        """Get a payload: on the host it is there on return; on a GPU, what is launched from now on comes after it."""
        if buffer.numel() and self.payloads is not None:
            work = dist.irecv(buffer, self.line.ranks[message.source], group=self.payloads, tag=_PAYLOAD)
            assert work is not None
            work.wait()
            self.arriving.append((message, work))
        elif buffer.numel():
            self.line.finish(self._receive_on_host(message, buffer, _PAYLOAD), what)
        if self.ordered:
            first = self.line_up.popleft()
            assert first == (message, None), "receives are taken in the order in which they were posted"
            self._advance()

    def send(self, message: Message, value: Any, step: int) -> None:
        """Begin to send; returns at once."""
        try:
            description, tensors = wire.pack(value)
        except TypeError as error:
            raise PipelineError(f"{message.producer} on rank {message.source}: {error}.") from error
        fields = {"step": step, "message": identity(message), "value": description}
        head, rest = wire.encode(fields, HEADER_BYTES)
        self._start(message, head, _HEADER)
        if rest is not None:
            self._start(message, rest, _MORE)
        payload = wire.to_bytes([t.to(self.device) for t in tensors])
        if not payload.numel():
            return
        if self.ordered:
            self.line_up.append((message, payload))
            self._advance()
        else:
            self._start(message, payload, _PAYLOAD)

    def _advance(self) -> None:
        """Start the payloads that are sent before the next receive."""
        while self.line_up and (payload := self.line_up[0][1]) is not None:
            self._start(self.line_up.popleft()[0], payload, _PAYLOAD)

    def _start(self, message: Message, tensor: Tensor, tag: int) -> None:
        if self.payloads is not None and tag == _PAYLOAD:
            work = dist.isend(tensor, self.line.ranks[message.target], group=self.payloads, tag=tag)
        else:
            work = self.line.send(tensor, message.target, tag, self.doing(message), self.name)
        self.outbox.add(message, _Started(work, tensor, tensor.device.type == "cpu"))

    def drain(self) -> None:
        """Wait until every send has ended, and on a GPU every receive."""
        assert not self.line_up, "every message of the plan was started"
        self.outbox.drain()
        for message, work in self.arriving:
            self.line.until(work.is_completed, self.doing(message))
        self.arriving.clear()

    def close(self) -> None:
        """End the thread, and on a GPU what is under way."""
        self.outbox.end()
        if self.payloads is not None:
            self.payloads.abort()
            dist.destroy_process_group(self.payloads)

    def _check(self, message: Message, step: int, fields: dict[str, Any]) -> None:
        expected = {"step": step, "message": identity(message)}
        found = {key: fields[key] for key in expected}
        if found != expected:
            raise PipelineError(
                f"Rank {message.target} expected {expected['message']} of step {step} and got {found['message']} of step "
                f"{found['step']}: the ranks do not run the same schedule. Give every rank the same batch and options."
            )

    def doing(self, message: Message, waiting: Op | None = None) -> str:
        """What a rank wants of another, for messages of errors."""
        mine = self.line.rank == message.source
        peer, verb = (message.target, "sending") if mine else (message.source, "receiving")
        for_whom = f" for {waiting}" if waiting else ""
        return (
            f"{verb} the output of {message.producer}, microbatch {message.microbatch}, {'to' if mine else 'from'} rank "
            f"{self.line.ranks[peer]} on channel {message.channel}{for_whom}"
        )


def identity(message: Message) -> str:
    """A message's name on the wire."""
    return f"{message.channel} {message.producer} {message.microbatch} {message.source}>{message.target}"


@dataclass(slots=True)
class Communicators:
    """Everything that the ranks of one pipeline talk over."""

    line: Line
    device: torch.device
    channels: dict[str, Channel]
    epoch: int  # of the line's watchdog: after a failure all is made anew

    def close(self) -> None:
        """A step failed in the middle: what is under way would be taken for another step's."""
        for channel in self.channels.values():
            channel.close()


_opened: list[Communicators] = []


def communicators(group: dist.ProcessGroup, device: torch.device, deadline: float) -> Communicators:
    """Those of a pipeline's group, made at the first request and after a failure: later pipelines over the same ranks use
    them, too, since a step leaves nothing under way. Collective over the group."""
    line = line_of(group)
    line.deadline = deadline
    for made in tuple(_opened):
        if made.line.watchdog is not line.watchdog or made.epoch != line.watchdog.epoch:
            _opened.remove(made)
            made.close()
    for made in _opened:
        if made.line is line and made.device == device:
            return made
    epoch = line.watchdog.epoch
    made = Communicators(line, device, open_channels(line, device), epoch)
    _opened.append(made)
    return made


def open_channels(line: Line, device: torch.device, names: tuple[str, ...] = CHANNELS) -> dict[str, Channel]:
    """One channel per name between the ranks of a pipeline's group. Collective over that group."""
    if line.size == 1:
        return {name: Channel(name, line, device) for name in names}
    for name in ("data", *names):  # now, and by all: messages go between two ranks only
        line.open(name, "opening the channels of a pipeline")
    if device.type != "cuda":
        return {name: Channel(name, line, device) for name in names}
    made = {}
    for name in names:  # NCCL's own watchdog ends the process without a word; ours speaks first
        limit = datetime.timedelta(seconds=2 * line.deadline + 60)
        payloads = line.guard(
            lambda limit=limit: dist.new_group(line.ranks, limit, "nccl", use_local_synchronization=True),
            "opening the channels of a pipeline",
        )
        assert isinstance(payloads, dist.ProcessGroup)
        made[name] = Channel(name, line, device, payloads, ordered=True)
    connect(made, line.rank)
    return made


def connect(channels: dict[str, Channel], rank: int) -> None:
    """Open every pair's connection in one order, before any schedule runs. NCCL connects at the first message of a pair
    and holds up the host meanwhile, which a schedule does not allow for."""
    for channel in channels.values():
        ranks = channel.line.ranks
        token = torch.zeros(1, device=channel.device)
        ends = range(len(ranks))
        for low, high in ((a, b) for a in ends for b in ends if a < b):
            for source, target in ((low, high), (high, low)):
                if rank == source:
                    dist.send(token, ranks[target], group=channel.payloads)
                elif rank == target:
                    dist.recv(token, ranks[source], group=channel.payloads)
    if any(c.device.type == "cuda" for c in channels.values()):
        torch.cuda.synchronize()
