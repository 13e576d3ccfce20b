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

from ultraep_compile.errors import PeerTimeoutError, PipelineError
from ultraep_compile.executor import wire
from ultraep_compile.schedules.actions import Op
from ultraep_compile.schedules.messages import CHANNELS, Message

HEADER_BYTES = 1024
_HEADER, _MORE, _PAYLOAD = 1, 2, 3  # tags


@dataclass(slots=True)
class _Posted:
    """A receive whose header is awaited."""

    message: Message
    buffer: Tensor
    work: dist.Work


@dataclass(slots=True)
class _Started:
    """A transfer under way, and the tensor that must live until it ends."""

    work: dist.Work
    tensor: Tensor
    on_host: bool  # gloo; else NCCL

    def finish(self, deadline: float) -> None:
        """Wait on the host. NCCL's own wait would only order streams, so its state is looked at."""
        if self.on_host:
            _wait(self.work, deadline)
            return
        until = time.monotonic() + deadline
        while not self.work.is_completed():
            if time.monotonic() > until:
                raise RuntimeError(f"not finished after {deadline:g} s")
            time.sleep(0.0005)


class _Outbox:
    """Sends under way. A thread waits for them in turn and lets go of their tensors: gloo tells nobody that a send has
    ended, and a whole step's features must not stay in memory until its end."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.left: queue.Queue[tuple[Message, _Started]] = queue.Queue()
        self.failed: Exception | None = None
        self.thread: threading.Thread | None = None

    def add(self, message: Message, started: _Started) -> None:
        self.left.put((message, started))
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True, name=f"ultraep send {self.channel.name}")
            self.thread.start()

    def _run(self) -> None:
        while True:
            message, started = self.left.get()
            try:
                started.finish(self.channel.deadline)
            except RuntimeError as error:
                self.failed = self.failed or self.channel.failure(message, message.target, error)
            del started
            self.left.task_done()

    def drain(self) -> None:
        """Wait until every send has ended; each has its deadline, so this ends."""
        self.left.join()
        if self.failed is not None:
            raise self.failed


@dataclass(slots=True)
class Channel:
    """One channel of one pipeline.

    `ordered`: payloads start in the order in which the plan has them, sends behind earlier receives. NCCL runs what it is
    given on one stream, so a send before an earlier receive could wait for ever; gloo needs no order between the two."""

    name: str
    headers: dist.ProcessGroup
    payloads: dist.ProcessGroup
    ranks: list[int]  # global rank of each pipeline rank
    device: torch.device
    deadline: float  # seconds that a peer may take
    ordered: bool = False
    posted: dict[Message, _Posted] = field(default_factory=dict)
    line: deque[tuple[Message, Tensor | None]] = field(
        default_factory=deque
    )  # of payloads, if ordered; None: a receive
    arriving: list[tuple[Message, _Started]] = field(default_factory=list)  # on the device, in this step
    outbox: _Outbox = field(init=False)

    def __post_init__(self) -> None:
        self.outbox = _Outbox(self)

    def post(self, message: Message) -> None:
        """Begin to receive a message. Each pair of ranks must post in the order in which the other sends."""
        buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        try:
            work = dist.irecv(buffer, self.ranks[message.source], group=self.headers, tag=_HEADER)
        except RuntimeError as error:
            raise self.failure(message, message.source, error) from error
        assert work is not None
        self.posted[message] = _Posted(message, buffer, work)
        if self.ordered:
            self.line.append((message, None))

    def take(self, message: Message, step: int, waiting: Op) -> Any:
        """Wait for a posted message and return its value. `waiting`: the operation that needs it."""
        posted = self.posted.pop(message)
        source = self.ranks[message.source]
        try:
            _wait(posted.work, self.deadline)
            fields, more = wire.decode(posted.buffer)
            if fields is None:
                rest = torch.empty(more, dtype=torch.uint8)
                _wait(dist.irecv(rest, source, group=self.headers, tag=_MORE), self.deadline)
                fields = json.loads(bytes(rest.numpy()))
            self._check(message, step, fields)
            entries = wire.shapes(fields["value"])
            buffer = torch.empty(wire.buffer_size(entries), dtype=torch.uint8, device=self.device)
            self._receive(message, buffer)
        except RuntimeError as error:
            raise self.failure(message, message.source, error, waiting) from error
        return wire.unpack(fields["value"], wire.from_bytes(buffer, entries))

    def _receive(self, message: Message, buffer: Tensor) -> None:
        """Get a payload: on the host it is there on return; on a GPU, what is launched from now on comes after it."""
        if buffer.numel():
            work = dist.irecv(buffer, self.ranks[message.source], group=self.payloads, tag=_PAYLOAD)
            if self.device.type == "cuda":
                assert work is not None
                work.wait()
                self.arriving.append((message, _Started(work, buffer[:0], False)))
            else:
                _wait(work, self.deadline)
        if self.ordered:
            first = self.line.popleft()
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
        self._start(message, head, self.headers, _HEADER)
        if rest is not None:
            self._start(message, rest, self.headers, _MORE)
        payload = wire.to_bytes([t.to(self.device) for t in tensors])
        if not payload.numel():
            return
        if self.ordered:
            self.line.append((message, payload))
            self._advance()
        else:
            self._start(message, payload, self.payloads, _PAYLOAD)

    def _advance(self) -> None:
        """Start the payloads that are sent before the next receive."""
        while self.line and (payload := self.line[0][1]) is not None:
            self._start(self.line.popleft()[0], payload, self.payloads, _PAYLOAD)

    def _start(self, message: Message, tensor: Tensor, group: dist.ProcessGroup, tag: int) -> None:
        try:
            work = dist.isend(tensor, self.ranks[message.target], group=group, tag=tag)
        except RuntimeError as error:
            raise self.failure(message, message.target, error) from error
        assert work is not None
        self.outbox.add(message, _Started(work, tensor, tensor.device.type == "cpu"))

    def drain(self) -> None:
        """Wait until every send has ended, and on a GPU every receive."""
        assert not self.line, "every message of the plan was started"
        self.outbox.drain()
        for message, started in self.arriving:
            try:
                started.finish(self.deadline)
            except RuntimeError as error:
                raise self.failure(message, message.source, error) from error
        self.arriving.clear()

    def _check(self, message: Message, step: int, fields: dict[str, Any]) -> None:
        expected = {"step": step, "message": identity(message)}
        found = {key: fields[key] for key in expected}
        if found != expected:
            raise PipelineError(
                f"Rank {message.target} expected {expected['message']} of step {step} and got {found['message']} of step "
                f"{found['step']}: the ranks do not run the same schedule. Give every rank the same batch and options."
            )

    def failure(self, message: Message, peer: int, error: Exception, waiting: Op | None = None) -> PeerTimeoutError:
        doing = f"{waiting} waits to receive" if waiting else "sending" if peer == message.target else "receiving"
        rank = message.target if peer == message.source else message.source
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return PeerTimeoutError(
            f"Rank {rank} (global {self.ranks[rank]}) cannot go on: {doing} the output of {message.producer} for "
            f"microbatch {message.microbatch} on channel {message.channel}, peer rank {peer} (global {self.ranks[peer]}), "
            f"deadline {self.deadline:g} s. That peer is dead, stopped, or waits for another one: its own message is the one "
            f"to read first. ({text})"
        )


def identity(message: Message) -> str:
    """A message's name on the wire."""
    return f"{message.channel} {message.producer} {message.microbatch} {message.source}>{message.target}"


def _wait(work: dist.Work | None, deadline: float) -> None:
    """Wait on the host for at most `deadline` seconds; RuntimeError if it takes longer or the peer is gone."""
    assert work is not None
    work.wait(datetime.timedelta(seconds=deadline))


@dataclass(slots=True)
class Communicators:
    """Everything that the ranks of one pipeline talk over."""

    control: dist.ProcessGroup  # gloo
    channels: dict[str, Channel]


_opened: list[
    tuple[object, dist.ProcessGroup, float, Communicators]
] = []  # (default group, group, deadline, what was made)


def communicators(group: dist.ProcessGroup, device: torch.device, deadline: float) -> Communicators:
    """Those of a pipeline's group, made at the first request: later pipelines over the same ranks use them, too, since a step
    leaves nothing under way. Collective over the group."""
    world = dist.group.WORLD
    _opened[:] = [entry for entry in _opened if entry[0] is world]
    for _, known, seconds, made in _opened:
        if known is group and seconds == deadline:
            return made
    control = new_group(dist.get_process_group_ranks(group), "gloo", deadline)
    made = Communicators(control, open_channels(group, device, deadline))
    connect(made.channels, dist.get_rank(group))
    _opened.append((world, group, deadline, made))
    return made


def forget(made: Communicators) -> None:
    """A step failed in the middle: what is under way would be taken for another step's."""
    _opened[:] = [entry for entry in _opened if entry[3] is not made]


def open_channels(
    group: dist.ProcessGroup, device: torch.device, deadline: float, names: tuple[str, ...] = CHANNELS
) -> dict[str, Channel]:
    """One channel per name between the ranks of a pipeline's group. Collective over that group."""
    ranks = dist.get_process_group_ranks(group)
    channels = {}
    for name in names:
        headers = new_group(ranks, "gloo", deadline)
        if device.type == "cuda":  # its own watchdog ends the process without a word; ours speaks first
            payloads = new_group(ranks, "nccl", 2 * deadline + 60)
        else:
            payloads = headers
        channels[name] = Channel(name, headers, payloads, ranks, device, deadline, device.type == "cuda")
    return channels


def new_group(ranks: list[int], backend: str, deadline: float) -> dist.ProcessGroup:
    """A group of these ranks, made by them alone."""
    made = dist.new_group(ranks, datetime.timedelta(seconds=deadline), backend, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def connect(channels: dict[str, Channel], rank: int) -> None:
    """Open every pair's connection in one order, before any schedule runs. NCCL connects at the first message of a pair
    and holds up the host meanwhile, which a schedule does not allow for."""
    for channel in channels.values():
        if channel.payloads is channel.headers:
            continue
        token = torch.zeros(1, device=channel.device)
        ends = range(len(channel.ranks))
        for low, high in ((a, b) for a in ends for b in ends if a < b):
            for source, target in ((low, high), (high, low)):
                if rank == source:
                    dist.send(token, channel.ranks[target], group=channel.payloads)
                elif rank == target:
                    dist.recv(token, channel.ranks[source], group=channel.payloads)
    if any(c.device.type == "cuda" for c in channels.values()):
        torch.cuda.synchronize()
