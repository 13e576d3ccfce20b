"""Symmetric memory of expert-parallel layers: a `Plane` for every kind of layer, a `Board` for counts.

A plane holds what all layers of one geometry share: one set of S slots, one set of buffers of static size. It is opened
by all ranks together, at the first call of the first such layer; its capacity is the largest that any rank asked for,
and grows when a plan shows that batches have become larger. Nothing that autograd keeps lies in it.

Buffers of N rows, as bytes: `rows` (tokens on their way to experts), `weights` (their routing weights), `grads`
(gradients of expert outputs), `results` (whatever goes back; peers read it), `result_weights`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.exchange import line_of
from ultraep_compile.ops.dispatch import buffer_rows
from ultraep_compile.ops.groups import is_alive, resolve
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.symmetric import Region, SymmetricPool, control, open_pool


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


class Plane:
    """The pool of one geometry; every method that opens memory must be called by all ranks alike."""

    def __init__(self, geometry: Geometry, group: dist.ProcessGroup, capacity: int) -> None:
        self.geometry, self._group, self.capacity = geometry, weakref.ref(group), capacity
        layout, parts = geometry.layout, geometry.parts
        self.bundle = Bundle("slots", layout.ranks, layout.masters, layout.slots, parts)
        trained = tuple(p for p in parts if p.dtype.is_floating_point)
        self.grad_bundle = Bundle("slot_grads", layout.ranks, layout.masters, layout.slots, trained)
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
        return self.geometry.choices > 1 and self.geometry.layout.ranks <= 2 * self.geometry.choices

    def references(self) -> Tensor | list[Tensor]:
        """On every rank: which row of `rows` each of its rows repeats."""
        if self.geometry.device.type == "cuda":
            return self.pool.addresses("references")
        return [self.pool.on_rank("references", rank) for rank in range(self.pool.ranks)]

    def _open(self) -> SymmetricPool:
        g, rows = self.geometry, self.rows
        widths = {
            "rows": g.row_bytes,
            "weights": g.weight_bytes,
            "grads": g.result_bytes,
            "results": g.result_bytes,
            "result_weights": g.weight_bytes,
        }
        regions = {name: Region((rows * width,), torch.uint8) for name, width in widths.items()}
        regions["references"] = Region((rows if self.sends_once else 0,), torch.int32)
        if g.layout.slots and g.parts:
            regions |= self.bundle.replicate_regions() | self.grad_bundle.reduce_regions()
        self._size = sum(region.nbytes for region in regions.values())
        return open_pool(regions, self.group, g.device, float(g.deadline_s))

    def grow(self, capacity: int) -> None:
        """Replace the memory by larger one; all ranks, at the same point of the program."""
        if self.geometry.device.type == "cuda":
            torch.cuda.synchronize(self.geometry.device)
        line_of(self.group).barrier("growing buffers")  # nobody reads the old memory any more
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
        asked = line_of(group).gather_objects(pairs, "how large buffers must be")
        plane = of_group[geometry] = Plane(geometry, group, geometry.layout.capacity(max(asked) * geometry.layout.ranks))
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
