"""What the ops tell the telemetry. Nothing here is on the path of a result; all of it is off unless a trace is on.

One compiled graph may serve several layers (blocks of one class that are compiled one by one), on several threads, and its
backward runs in another order than its forward. So what is in progress is kept for each thread, and backward finds its
record by the weights that it is given.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ultraep_compile.exchange import line_named
from ultraep_compile.ops.layout import ExpertLayout, physical_to_logical
from ultraep_compile.ops.padding import real_among
from ultraep_compile.telemetry.recorder import NOT_KEPT, Recorder

if TYPE_CHECKING:
    from ultraep_compile.ops.transport import Transport


@dataclass(frozen=True, slots=True)
class SiteWatch:
    """What is recorded at one site."""

    layer: str
    recorder: Recorder | None
    """None on all ranks of a group but the one that writes for all."""
    group: str
    """Process group name, "" for virtual ranks, or where this rank records what it knows by itself."""


@dataclass(slots=True)
class _Progress:
    """One microbatch of one layer, while it is in progress."""

    layer: str = ""
    record: int = NOT_KEPT
    seconds: dict[str, float] = field(default_factory=dict)
    plan: tuple[Tensor, Tensor, Tensor] | None = None
    """Counts, slots and shares."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.paused = False
        self.names: Mapping[str, str] = {}
        self.progress: dict[str, _Progress] = {}
        self.records: dict[tuple[str, int], int] = {}


_watched: dict[str, SiteWatch] = {}
_here = _OfThread()
_records: dict[tuple[str, int], int] = {}
"""Newest record by site and weights, of whatever thread: backward may run on one of autograd's own."""


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Record nothing of this thread inside the block: what runs there is a check, not the user's step."""
    before, _here.paused = _here.paused, True
    try:
        yield
    finally:
        _here.paused = before


@contextlib.contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Call the layers at these sites so, inside the block and on this thread."""
    before, _here.names = _here.names, names
    try:
        yield
    finally:
        _here.names = before


def start(site: str, layer: str, recorder: Recorder | None, group: str) -> None:
    """Record what happens at `site` from now on, under the name `layer`."""
    _watched[site] = SiteWatch(layer, recorder, group)


def stop(site: str) -> None:
    """Record nothing more at `site`."""
    _watched.pop(site, None)


def in_backward() -> bool:
    """True inside autograd's backward: a recomputation must not count loads twice."""
    return torch._C._current_graph_task_id() != -1


def _watch_of(site: str) -> SiteWatch | None:
    return None if _here.paused else _watched.get(site)


def _progress_of(site: str) -> _Progress:
    return _here.progress.setdefault(site, _Progress())


def add_time(site: str, phase: str, started: float) -> None:
    """Add the time since `started` (a perf_counter value) to a phase of the record in progress."""
    watch = _watch_of(site)
    if watch is None or watch.recorder is None:
        return
    elapsed, now = time.perf_counter() - started, _progress_of(site)
    if phase == "load":  # comes before there is a record
        now.seconds = {phase: elapsed}
    else:
        watch.recorder.add(now.record, seconds={phase: elapsed})


def planned(site: str, counts_RE: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, started: float) -> None:
    """Keep this microbatch's plan until its rows are dealt out."""
    watch = _watch_of(site)
    if watch is None or in_backward():
        return
    now = _progress_of(site)
    now.seconds = {**now.seconds, "plan": time.perf_counter() - started}
    now.plan = counts_RE, slot_expert_RS, shares_RP


def rerouted(site: str, physical_TK: Tensor, layout: ExpertLayout, transport: Transport, started: float) -> None:
    """Open a record for this microbatch: its plan, and the realised loads of all ranks' physical experts.

    Of both, what `real_tokens` calls padding is taken away. A rank that records what the others do not has no realised loads.
    """
    watch, now = _watch_of(site), _progress_of(site)
    if watch is None or now.plan is None or in_backward():
        return
    (counts_RE, slot_expert_RS, shares_RP), now.plan = now.plan, None
    if physical_TK.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # what is counted now would be the capture's numbers at every replay
    now.seconds["reroute"] = time.perf_counter() - started
    realised: Tensor | None = torch.bincount(physical_TK.flatten(), minlength=layout.physical)
    padding_RP = _padding(physical_TK, layout, transport)
    if watch.group:  # one exchange, whether this rank has padding or not: others may
        if padding_RP is None:
            padding_RP = realised.new_zeros(layout.ranks, layout.physical)
        both = torch.cat([realised.unsqueeze(0), padding_RP])
        line_named(watch.group).all_reduce(both, "the loads of a trace")
        realised, padding_RP = both[0], both[1:]
    elif len(transport.hosted) < layout.ranks:
        realised = padding_RP = None
    if watch.recorder is None:
        return
    if padding_RP is not None and realised is not None:
        counts_RE = counts_RE - _by_expert(padding_RP, slot_expert_RS, layout)
        shares_RP, realised = shares_RP - padding_RP.to(shares_RP.dtype), realised - padding_RP.sum(0)
        if not realised.is_cuda and not realised.any():
            now.record = NOT_KEPT
            return  # a warm-up
    now.layer = _here.names.get(site, watch.layer)
    now.record = watch.recorder.record(
        now.layer, counts_RE, slot_expert_RS, shares_RP, realised_P=realised, seconds=now.seconds
    )


def computing(site: str, params: list[Tensor]) -> None:
    """The experts of a site begin: in forward, of the record in progress; in backward, of that with the same weights."""
    watch = _watch_of(site)
    if watch is None or watch.recorder is None or not params:
        return
    key, now = (site, params[0].data_ptr()), _progress_of(site)
    if in_backward():
        now.record = _here.records.get(key, _records.get(key, NOT_KEPT))
    else:
        _here.records[key] = _records[key] = now.record


def in_rounds(site: str, rounds: int) -> None:
    """How many times the buffers were filled for the record in progress."""
    watch = _watch_of(site)
    if watch is not None and watch.recorder is not None and not in_backward():
        watch.recorder.add(_progress_of(site).record, rounds=rounds)


def _padding(physical_TK: Tensor, layout: ExpertLayout, transport: Transport) -> Tensor | None:
    """Rows of padding, by source rank and physical expert, int64 [R, P]; None where there is none."""
    real = real_among(physical_TK.shape[0], physical_TK.device)
    if real is None:
        return None
    source = transport.source_of_token(physical_TK.shape[0], physical_TK.device)
    cell = (source.unsqueeze(1) * layout.physical + physical_TK)[~real].flatten()
    return torch.bincount(cell, minlength=layout.ranks * layout.physical).view(layout.ranks, layout.physical)


def _by_expert(rows_RP: Tensor, slot_expert_RS: Tensor, layout: ExpertLayout) -> Tensor:
    """Rows of logical experts, int32 [R, E], from those of their copies; no row is in an empty slot."""
    logical = physical_to_logical(slot_expert_RS, layout.experts).clamp(min=0)
    return rows_RP.new_zeros(layout.ranks, layout.experts).index_add_(1, logical, rows_RP).to(torch.int32)
