"""Symmetric memory of expert-parallel layers: a `Plane` for every kind of layer, a `Board` for counts.

A plane holds what all layers of one geometry share: one set of S slots, one set of buffers of static size. It is opened
by all ranks together, at the first call of the first such layer; its capacity is the largest that any rank asked for,
and grows when a plan shows that batches have become larger. Nothing that autograd keeps lies in it.

Buffers of N rows, as bytes: `rows` (tokens on their way to experts), `weights` (their routing weights), `grads`
(gradients of expert outputs), `results` (whatever goes back; peers read it), `result_weights`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.errors import TopologyError
from ultraep_compile.exchange import line_of
from ultraep_compile.ops.dispatch import buffer_rows
from ultraep_compile.ops.groups import is_alive, resolve
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.symmetric import Region, SymmetricPool, control, open_pool
from ultraep_compile.symmetric.open import shared_folder


@dataclass(frozen=True, slots=True)
class Geometry:
    """What layers must agree in to share a plane."""

    group: str
    device: torch.device
    layout: ExpertLayout
    row_bytes: int
    result_bytes: int
    """The widest of a token's row, its gradient and an expert's output."""
    weight_bytes: int
    """0 where the row function does not use routing weights."""
    parts: tuple[Part, ...]
    """Tensors of an expert that this rank holds for its own experts only."""
    choices: int
    deadline_s: int


def sends_once(geometry: Geometry) -> bool:
    """Does a token go once to each rank that computes several of its choices?"""
    return geometry.choices > 1 and geometry.layout.ranks <= 2 * geometry.choices


def bundles_of(geometry: Geometry) -> tuple[Bundle, Bundle]:
    """The weights in the slots, and their gradients."""
    layout, trained = geometry.layout, tuple(p for p in geometry.parts if p.dtype.is_floating_point)
    return (
        Bundle("slots", layout.ranks, layout.masters, layout.slots, geometry.parts),
        Bundle("slot_grads", layout.ranks, layout.masters, layout.slots, trained),
    )


def regions_of(geometry: Geometry, capacity: int) -> dict[str, Region]:
    """What a plane keeps on every rank."""
    g, rows = geometry, buffer_rows(capacity, geometry.layout, 1)
    widths = {
        "rows": g.row_bytes,
        "weights": g.weight_bytes,
        "grads": g.result_bytes,
        "results": g.result_bytes,
        "result_weights": g.weight_bytes,
    }
    regions = {name: Region((rows * width,), torch.uint8) for name, width in widths.items()}
    regions["references"] = Region((rows if sends_once(g) else 0,), torch.int32)
    if g.layout.slots and g.parts:
        slots, gradients = bundles_of(g)
        regions |= slots.replicate_regions() | gradients.reduce_regions()
    return regions


def free_bytes(device: torch.device, ranks: int) -> int:
    """Memory for planes that this process can count on: on the CPU its part of the folder of shared files."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return shutil.disk_usage(shared_folder()).free // ranks


def refuse_too_large(geometry: Geometry, capacity: int, free_R: Sequence[int]) -> None:
    """Raise TopologyError, before anything is allocated, where some rank has too little memory; all ranks know all `free_R`."""

    def needed(slots: int) -> int:
        layout = dataclasses.replace(geometry.layout, slots=slots)
        regions = regions_of(dataclasses.replace(geometry, layout=layout), capacity)
        return sum(region.nbytes for region in regions.values())

    slots, least = geometry.layout.slots, min(free_R)
    if needed(slots) <= least:
        return
    fits = next((s for s in range(slots - 1, -1, -1) if needed(s) <= least), None)
    rows = max(0, least - (needed(slots) - needed(0))) * capacity // max(1, needed(0))
    cure = f"redundant_experts={fits} fits, or" if fits is not None else "Without slots it does not fit either:"
    raise TopologyError(
        f"slots for {slots} copies and buffers for {capacity} rows need {needed(slots) / 2**20:.1f} MiB of symmetric memory on every rank, and "
        f"rank {list(free_R).index(least)} has {least / 2**20:.1f} MiB left. {cure} batches that bring a rank at most about {rows} rows "
        "(tokens times choices), or transport='collective', which keeps no buffers."
    )


class Plane:
    """The pool of one geometry; every method that opens memory must be called by all ranks alike."""

    def __init__(self, geometry: Geometry, group: dist.ProcessGroup, capacity: int) -> None:
        self.geometry, self._group, self.capacity = geometry, weakref.ref(group), capacity
        self._too_large: float = math.inf  # a capacity that some rank has no memory for
        self.bundle, self.grad_bundle = bundles_of(geometry)
        self.pool = self._open()

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks' group; held by its users alone, so that a plane ends with its group."""
        group = self._group()
        assert group is not None
        return group

    @property
    def rows(self) -> int:
        """Rows of every buffer."""
        return buffer_rows(self.capacity, self.geometry.layout, 1)

    @property
    def rank(self) -> int:
        return self.pool.rank

    @property
    def sends_once(self) -> bool:
        """A token goes once to each rank that computes several of its choices: worth it where that is common."""
        return sends_once(self.geometry)

    def references(self) -> Tensor | list[Tensor]:
        """On every rank: which row of `rows` each of its rows repeats."""
        if self.geometry.device.type == "cuda":
            return self.pool.addresses("references")
        return [self.pool.on_rank("references", rank) for rank in range(self.pool.ranks)]

    def _open(self) -> SymmetricPool:
        regions = regions_of(self.geometry, self.capacity)
        self._size = sum(region.nbytes for region in regions.values())
        return open_pool(regions, self.group, self.geometry.device, float(self.geometry.deadline_s))

    def grow(self, capacity: int) -> None:
        """Replace the memory by larger one; all ranks, at the same point of the program. Where some rank has too little for
        that, everything stays as it is, with one warning: larger batches go in several rounds.
        """
        device, ranks = self.geometry.device, self.geometry.layout.ranks
        if capacity >= self._too_large:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        mine = free_bytes(device, ranks) + self._size
        free = line_of(self.group).gather_objects(mine, "growing buffers")  # nobody reads the old memory any more
        try:
            refuse_too_large(self.geometry, capacity, free)
        except TopologyError as reason:
            self._too_large = capacity
            warnings.warn(f"ultraep: buffers do not grow to the batches, which go in several rounds: {reason}", stacklevel=2)
            return
        self.pool.close()
        self.capacity = capacity
        self.pool = self._open()

    def buffer(self, name: str, rows: int, like: Tensor, rank: int | None = None) -> Tensor:
        """The first `rows` rows of a rank's buffer, of the shape and dtype of `like`'s."""
        raw = self.pool.region(name) if rank is None else self.pool.on_rank(name, rank)
        width = like.shape[1:].numel() * like.element_size()
        return raw[: rows * width].view(like.dtype).view(rows, *like.shape[1:])

    def peers(self, name: str, rows: int, like: Tensor) -> Tensor | list[Tensor]:
        """The same buffer of every rank, as kernels (addresses) or plain torch (tensors) take it."""
        if like.is_cuda:
            return self.pool.addresses(name)
        return [self.buffer(name, rows, like, rank) for rank in range(self.pool.ranks)]

    @property
    def nbytes(self) -> int:
        """Symmetric memory on this rank."""
        return self._size

    def close(self) -> None:
        self.pool.close()


class Board:
    """Where every rank writes its counts for all to read; two pages, used in turn."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, experts: int, deadline_s: int) -> None:
        ranks = dist.get_world_size(group)
        regions = {"counts": Region((2, ranks, experts), torch.int32), "page": Region((1,), torch.int64)}
        self.pool = open_pool(regions, group, device, float(deadline_s))

    def exchange(self, counts_E: Tensor, layer: str) -> Tensor:
        """[E] on each rank -> int32 [R, E] on all.

        A rank that writes a page again has passed the barrier of the other page since, so all ranks have read it.
        """
        page, site = self.pool.region("page"), self.pool.site(layer)
        if counts_E.is_cuda:
            from ultraep_compile.codegen.count_kernels import post_counts, read_counts

            post_counts(counts_E, self.pool.addresses("counts"), page, self.pool.rank, self.pool.ranks)
            self.pool.barrier(site)
            return read_counts(self.pool.region("counts"), page, self.pool.region(control.CONTROL))
        turn = int(page) % 2
        for rank in range(self.pool.ranks):
            self.pool.on_rank("counts", rank)[turn, self.pool.rank] = counts_E
        self.pool.barrier(site)
        page += 1
        return self.pool.region("counts")[turn].clone()

    def close(self) -> None:
        self.pool.close()


_planes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Geometry, Plane]] = weakref.WeakKeyDictionary()
_boards: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[torch.device, int], Board]] = weakref.WeakKeyDictionary()


def plane_for(geometry: Geometry, pairs: int) -> Plane:
    """The plane of a geometry; opened on first use, when `pairs` is what this rank has to send."""
    group = resolve(geometry.group)
    of_group = _planes.setdefault(group, {})
    plane = of_group.get(geometry)
    if plane is None or plane.pool.outlived:
        close_planes_of_the_dead()
        ranks = geometry.layout.ranks
        asked = line_of(group).gather_objects((pairs, free_bytes(geometry.device, ranks)), "how large buffers must be")
        capacity = geometry.layout.capacity(max(wanted for wanted, _ in asked) * ranks)
        refuse_too_large(geometry, capacity, [free for _, free in asked])
        plane = of_group[geometry] = Plane(geometry, group, capacity)
    return plane


def board_for(group: dist.ProcessGroup, device: torch.device, width: int, deadline_s: int) -> Board:
    """The board of a group for rows of so many numbers."""
    boards = _boards.setdefault(group, {})
    board = boards.get((device, width))
    if board is None or board.pool.outlived:
        close_planes_of_the_dead()
        board = boards[device, width] = Board(group, device, width, deadline_s)
    return board


def planes() -> list[Plane]:
    """All that are open in this process."""
    return [plane for of_group in _planes.values() for plane in of_group.values()]


def reserved_bytes() -> int:
    """Symmetric memory that this process holds."""
    return sum(p.nbytes for p in planes())


def close_planes() -> None:
    """Give all symmetric memory back. The next call of a layer opens it again, on all ranks together."""
    for group in {*_planes, *_boards}:
        _close_planes_of(group)


def close_planes_of_the_dead() -> None:
    """Give back what groups hold that were destroyed while somebody still holds them."""
    for group in {*_planes, *_boards}:
        if not is_alive(group):
            _close_planes_of(group)


def _close_planes_of(group: dist.ProcessGroup) -> None:
    for held in (*_planes.pop(group, {}).values(), *_boards.pop(group, {}).values()):
        if held.pool.device.type == "cuda" and not held.pool.closed:
            torch.cuda.synchronize(held.pool.device)
        held.close()
