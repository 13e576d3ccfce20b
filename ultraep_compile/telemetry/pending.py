"""One piece of a record on its way to the host: copies and timers that may still be running on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Seconds = float | tuple[Any, Any]  # a duration, or (start, end) torch.cuda.Event with timing


class Pending:
    """Values of record `number`, read with `arrays()` and `times()` once `ready()`."""

    __slots__ = ("_events", "_seconds", "_tensors", "number", "rounds")

    def __init__(
        self,
        number: int,
        tensors: dict[str, Tensor],
        seconds: Mapping[str, Seconds],
        rounds: int | None,
        events: list[Any],
    ) -> None:
        self.number, self.rounds = number, rounds
        self._tensors, self._seconds, self._events = tensors, seconds, events

    @classmethod
    def start(
        cls,
        number: int,
        values: Mapping[str, Tensor | None],
        seconds: Mapping[str, Seconds],
        rounds: int | None,
    ) -> Pending | None:
        """Copy CPU tensors, start copies of CUDA tensors; None while a CUDA graph is captured."""
        tensors: dict[str, Tensor] = {}
        streams: dict[int, torch.cuda.Stream] = {}
        for name, value in values.items():
            if value is None:
                continue
            value = value.detach()
            if value.is_cuda:
                if torch.cuda.is_current_stream_capturing():
                    return None
                host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                tensors[name] = host.copy_(value, non_blocking=True)
                streams[value.device.index] = torch.cuda.current_stream(value.device)
            else:
                tensors[name] = value.to("cpu", copy=True)
        events = [stream.record_event() for stream in streams.values()]
        events += [pair[1] for pair in seconds.values() if isinstance(pair, tuple)]
        return cls(number, tensors, dict(seconds), rounds, events)

    def ready(self, wait: bool = False) -> bool:
        """Whether all copies and timers have finished; with `wait`, after waiting for them."""
        if wait:
            for event in self._events:
                event.synchronize()
            self._events.clear()
        while self._events and self._events[-1].query():
            self._events.pop()
        return not self._events

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The copied tensors, no longer shared with anything."""
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}

    def times(self) -> dict[str, float]:
        """Durations in seconds."""
        return {
            phase: value[0].elapsed_time(value[1]) * 1e-3 if isinstance(value, tuple) else float(value)
            for phase, value in self._seconds.items()
        }
