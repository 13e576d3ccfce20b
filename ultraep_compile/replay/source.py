"""Where the loads of a replay come from."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ultraep_compile.cost_model import Layer
from ultraep_compile.errors import OptionError, TraceError, nearest
from ultraep_compile.loads_file import read_loads
from ultraep_compile.planner.homes import in_order, spread_homes
from ultraep_compile.workloads import WORKLOADS, Setting, generate


@dataclass(frozen=True, slots=True)
class Sequence:
    """One MoE layer over time."""

    name: str
    counts_NRE: NDArray[np.int64]
    layer: Layer


@dataclass(frozen=True, slots=True)
class Source:
    """Layers whose loads are replayed; a step of the model goes through all of them."""

    title: str
    sequences: list[Sequence]


def read_source(name: str, setting: Setting, layer: Layer, limit: int | None = None) -> Source:
    """A workload by name, a trace that the option `trace` recorded, or an .npz of load matrices.

    Parameters:
        setting: what a workload is made for; files ignore it.
        layer: sizes that the source does not know.
        limit: read at most so many microbatches of a file.
    """
    if name in WORKLOADS:
        return Source(name, [Sequence(name, generate(name, setting), layer)])
    path = Path(name)
    if not path.exists() and path.suffix not in (".npz", ".npy"):
        raise OptionError(f"There is no workload and no file {name!r}. {nearest(name, WORKLOADS)}")
    sequences = _from_trace(path, layer) if _is_trace(path) else _from_loads(path, layer)
    cut = [Sequence(s.name, s.counts_NRE[:limit], s.layer) for s in sequences]
    return Source(path.name, cut)


def rehomed(source: Source, microbatches: int, domain: int | None) -> Source:
    """The source after its first microbatches, with experts dealt over domains and ranks as those suggest."""
    sequences = []
    for one in source.sequences:
        if not 0 < microbatches < len(one.counts_NRE):
            raise OptionError(
                f"{one.name}: {len(one.counts_NRE)} microbatches cannot spare {microbatches} to choose homes by. "
                f"Choose 1 to {len(one.counts_NRE) - 1}, or give more microbatches."
            )
        counts_NRE = torch.from_numpy(one.counts_NRE)
        order_E = spread_homes(counts_NRE[:microbatches], domain)
        sequences.append(Sequence(one.name, in_order(counts_NRE[microbatches:], order_E).numpy(), one.layer))
    return Source(f"{source.title}, experts rehomed after {microbatches} microbatches", sequences)


def _is_trace(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "meta.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _from_trace(path: Path, layer: Layer) -> list[Sequence]:
    from ultraep_compile.telemetry import read_trace

    found = [
        Sequence(one.name, one.counts_nRE, Layer.of_facts(one.facts, layer))
        for one in read_trace(path)
        if len(one.detail_n)
    ]
    if not found:
        raise TraceError(f"No record in {path} kept its full load matrix. Record it again with options={{'trace': ...}}.")
    return found


def _from_loads(path: Path, layer: Layer) -> list[Sequence]:
    """Matrices [microbatches, R, E] are layers; single matrices [R, E] of one shape are microbatches of one layer."""
    arrays = read_loads(path, dims=(2, 3))
    layers = [Sequence(name, array, layer) for name, array in arrays.items() if array.ndim == 3]
    shapes: dict[tuple[int, ...], list[NDArray]] = {}
    for array in arrays.values():
        if array.ndim == 2:
            shapes.setdefault(array.shape, []).append(array)
    layers += [
        Sequence(f"{ranks} ranks x {experts} experts", np.stack(matrices), layer)
        for (ranks, experts), matrices in shapes.items()
    ]
    return layers
