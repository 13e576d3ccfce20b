"""What the ops tell the telemetry. Nothing here is on the path of a result; all of it is off unless a trace is on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
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


@dataclass(slots=True)
class SiteWatch:
    """Recorder of one layer and the times of the microbatch in progress."""

    layer: str
    recorder: Recorder | None
    """None on all ranks of a group but the first, which writes for all."""
    group: str
    """Process group name, "" for virtual ranks."""
    record: int = NOT_KEPT
    seconds: dict[str, float] = field(default_factory=dict)
    plan: tuple[Tensor, Tensor, Tensor] | None = None
    """Counts, slots and shares of the microbatch in progress."""


_watched: dict[str, SiteWatch] = {}
_set_aside: dict[str, SiteWatch] = {}


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Record nothing inside the block: what runs there is a check, not the user's step."""
    _set_aside.update(_watched)
    _watched.clear()
    try:
        yield
    finally:
        _watched.update(_set_aside)
        _set_aside.clear()


def start(site: str, layer: str, recorder: Recorder | None, group: str) -> None:
    """Record what happens at `site` from now on, under the name `layer`."""
    _watched[site] = SiteWatch(layer, recorder, group)


def stop(site: str) -> None:
    _watched.pop(site, None)


def in_backward() -> bool:
    """True inside autograd's backward: a recomputation must not count loads twice."""
    return torch._C._current_graph_task_id() != -1


def add_time(site: str, phase: str, started: float) -> None:
    """Add the time since `started` (a perf_counter value) to a phase of the layer's newest record."""
    watch = _watched.get(site)
    if watch is None or watch.recorder is None:
        return
    elapsed = time.perf_counter() - started
    if phase == "load":  # comes before there is a record
        watch.seconds = {phase: elapsed}
    else:
        watch.recorder.add(watch.record, seconds={phase: elapsed})


def planned(site: str, counts_RE: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, started: float) -> None:
    """Keep this microbatch's plan until its rows are dealt out."""
    watch = _watched.get(site)
    if watch is None or in_backward():
        return
    watch.seconds = {**watch.seconds, "plan": time.perf_counter() - started}
    watch.plan = counts_RE, slot_expert_RS, shares_RP


def rerouted(site: str, physical_TK: Tensor, layout: ExpertLayout, transport: Transport, started: float) -> None:
    """Open a record for this microbatch: its plan, and the realised loads of all ranks' physical experts.

    Of both, what `real_tokens` calls padding is taken away.
    """
    watch = _watched.get(site)
    if watch is None or watch.plan is None or in_backward():
        return
    (counts_RE, slot_expert_RS, shares_RP), watch.plan = watch.plan, None
    if physical_TK.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # what is counted now would be the capture's numbers at every replay
    watch.seconds["reroute"] = time.perf_counter() - started
    realised = torch.bincount(physical_TK.flatten(), minlength=layout.physical)
    padding_RP = _padding(physical_TK, layout, transport)
    if watch.group:  # one exchange, whether this rank has padding or not: others may
        if padding_RP is None:
            padding_RP = realised.new_zeros(layout.ranks, layout.physical)
        both = torch.cat([realised.unsqueeze(0), padding_RP])
        line_named(watch.group).all_reduce(both, "the loads of a trace")
        realised, padding_RP = both[0], both[1:]
    if watch.recorder is None:
        return
    if padding_RP is not None:
        counts_RE = counts_RE - _by_expert(padding_RP, slot_expert_RS, layout)
        shares_RP, realised = shares_RP - padding_RP.to(shares_RP.dtype), realised - padding_RP.sum(0)
        if not realised.is_cuda and not realised.any():
            return  # a warm-up
    watch.record = watch.recorder.record(
        watch.layer, counts_RE, slot_expert_RS, shares_RP, realised_P=realised, seconds=watch.seconds
    )


def in_rounds(site: str, rounds: int) -> None:
    """How many times the buffers were filled for the layer's newest record."""
    watch = _watched.get(site)
    if watch is not None and watch.recorder is not None and not in_backward():
        watch.recorder.add(watch.record, rounds=rounds)


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
