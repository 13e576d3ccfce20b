"""Making pools: torch symmetric memory on CUDA, shared files on the CPU, or all ranks inside this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.errors import PoolError
from ultraep_compile.exchange import Line, line_of
from ultraep_compile.symmetric.pool import SymmetricPool, with_own_regions
from ultraep_compile.symmetric.regions import ALIGNMENT, Region, compare, describe, lay_out

DEADLINE_S = 60.0


def open_pool(
    regions: Mapping[str, Region],
    group: dist.ProcessGroup,
    device: torch.device | str,
    deadline_s: float = DEADLINE_S,
) -> SymmetricPool:
    """Reserve the same regions on every rank of `group` and make each addressable by all; every rank must call it.

    On CUDA the memory is torch symmetric memory; several ranks may share one GPU when the environment has
    TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1. On the CPU it is a shared file per rank, unlinked before this returns.
    All memory is zero at first. Raises `PoolError` on every rank if the ranks ask for different regions.
    """
    device = torch.device(device)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    named = with_own_regions(regions, ranks)
    line = line_of(group)
    compare(line.gather_objects(describe(named, device=device.type), "opening symmetric memory"))
    places, size = lay_out(named)
    if device.type == "cuda":
        memory, keep = _symmetric_memory(size, group, device)
    elif device.type == "cpu":
        memory, keep = _shared_files(size, line), None
    else:
        raise PoolError(f"No symmetric memory on {device.type!r} devices: use 'cuda' or 'cpu'.")
    pool = SymmetricPool(rank, memory, places, deadline_s, keep, line=line)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    line.barrier("opening symmetric memory")  # nobody writes to a peer before its control block is in place
    return pool


def open_virtual_pools(
    regions: Mapping[str, Region], ranks: int, device: torch.device | str, deadline_s: float = DEADLINE_S
) -> list[SymmetricPool]:
    """All ranks' pools inside this process, for one GPU or the interpreter."""
    if ranks < 1:
        raise PoolError(f"A pool needs at least one rank, not {ranks}.")
    places, size = lay_out(with_own_regions(regions, ranks))
    storage = torch.zeros(ranks * size + ALIGNMENT, dtype=torch.uint8, device=device)
    first = -storage.data_ptr() % ALIGNMENT  # allocators on the CPU align to less
    memory = list(storage[first : first + ranks * size].view(ranks, size).unbind())
    return [SymmetricPool(rank, memory, places, deadline_s, virtual=True) for rank in range(ranks)]


def _symmetric_memory(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[list[Tensor], tuple]:
    import torch.distributed._symmetric_memory as symmetric_memory

    mine = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    mine.zero_()
    handle = symmetric_memory.rendezvous(mine, group.group_name)
    memory = [
        mine if rank == dist.get_rank(group) else handle.get_buffer(rank, (size,), torch.uint8)
        for rank in range(dist.get_world_size(group))
    ]
    return memory, (mine, handle)


def shared_folder() -> str:
    """Where the files of pools on the CPU lie."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def _shared_files(size: int, line: Line) -> list[Tensor]:
    """A file per rank, mapped by all and unlinked at once: nothing stays behind, even after a kill."""
    folder = shared_folder()
    descriptor, path = tempfile.mkstemp(prefix="ultraep-pool-", dir=folder)
    try:
        os.ftruncate(descriptor, size)
        os.close(descriptor)
        paths = line.gather_objects(path, "the files of shared memory")
        unseen = [rank for rank, p in enumerate(paths) if not os.path.exists(p)]
        if not unseen:
            memory = [torch.from_file(p, shared=True, size=size, dtype=torch.uint8) for p in paths]
        line.barrier("mapping shared memory")
    finally:
        os.unlink(path)
    if unseen:
        raise PoolError(f"Ranks {unseen} are on another machine; a pool on the CPU needs all ranks on one.")
    return memory
