"""What the ops tell the telemetry. Nothing here is on the path of a result; all of it is off unless a trace is on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.telemetry.recorder import NOT_KEPT, Recorder


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
    if phase == "load":  # comes before the plan that opens the record
        watch.seconds = {phase: elapsed}
    else:
        watch.recorder.add(watch.record, seconds={phase: elapsed})


def planned(site: str, counts_RE: Tensor, slot_expert_RS: Tensor, shares_RP: Tensor, started: float) -> None:
    """Open a record for this microbatch."""
    watch = _watched.get(site)
    if watch is None or watch.recorder is None or in_backward():
        return
    seconds = {**watch.seconds, "plan": time.perf_counter() - started}
    watch.record = watch.recorder.record(watch.layer, counts_RE, slot_expert_RS, shares_RP, seconds=seconds)


def rerouted(site: str, physical_TK: Tensor, layout: ExpertLayout, started: float) -> None:
    """Add the realised loads of all ranks' physical experts."""
    watch = _watched.get(site)
    if watch is None or in_backward():
        return
    add_time(site, "reroute", started)
    realised = torch.bincount(physical_TK.flatten(), minlength=layout.physical)
    if watch.group:
        dist.all_reduce(realised, group=dist.distributed_c10d._resolve_process_group(watch.group))  # pyright: ignore
    if watch.recorder is not None:
        watch.recorder.add(watch.record, realised_P=realised)
