"""One rank's view of a pool: its own regions, the peers' regions, address tables, the barrier, failures, close."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ultraep_compile.errors import PeerTimeoutError, PoolError, nearest
from ultraep_compile.exchange import Failure, Line
from ultraep_compile.exchange.watchdog import told
from ultraep_compile.symmetric import control
from ultraep_compile.symmetric.regions import Place, Region, counters

_LOOK_S = 0.02  # between two looks at what other ranks tell and whether they live


def with_own_regions(regions: Mapping[str, Region], ranks: int) -> dict[str, Region]:
    """The caller's regions and the pool's own."""
    reserved = [name for name in regions if name.startswith("pool.")]
    if reserved:
        raise PoolError(f"Regions {reserved} start with 'pool.', which is kept for the pool itself: rename them.")
    own = {control.CONTROL: Region((control.CONTROL_WORDS,), torch.int64), control.BARRIER: counters(ranks)}
    return {**regions, **own}


class SymmetricPool:
    """Named regions of memory that all ranks of a group can address; made by `open_pool` or `open_virtual_pools`.

    `bases` (int64 [R], on the device) holds where each rank's memory starts; a region starts `offset(name)` bytes later
    on every rank.
    """

    def __init__(
        self,
        rank: int,
        memory: Sequence[Tensor],
        places: dict[str, Place],
        deadline_s: float,
        keep: Any = None,
        virtual: bool = False,
        line: Line | None = None,
    ) -> None:
        """`memory`: every rank's bytes as this process addresses them, zeroed; `keep`: whatever must live as long;
        `virtual`: all ranks are in this process, one after the other on its stream; `line`: over which the ranks tell one
        another of failures."""
        self.rank, self.ranks, self.device = rank, len(memory), memory[rank].device
        self.deadline_s, self.virtual, self._line = deadline_s, virtual, line
        self._epoch = line.watchdog.epoch if line is not None else 0
        self._asked: Failure | None = None  # about this rank's failed wait
        self._places, self._memory, self._keep = places, list(memory), keep
        self._tables: dict[str, Tensor] = {}
        self._layers: list[str] = []
        self._closed = False
        on_gpu = self.device.type == "cuda"
        self.bases = torch.tensor([m.data_ptr() for m in memory], dtype=torch.int64, device=self.device)
        self._record = torch.zeros(control.SEEN_BY_RANK + self.ranks, dtype=torch.int64, pin_memory=on_gpu)
        words = [0] * control.CONTROL_WORDS
        words[control.LIMIT] = int(deadline_s * 1e9)
        words[control.RECORD] = self._record.data_ptr()
        words[control.RANK] = rank
        self.region(control.CONTROL).copy_(torch.tensor(words))

    def _place(self, name: str) -> Place:
        if self._closed:
            raise PoolError(f"Region {name!r} was asked of a closed pool: open a new one.")
        if name not in self._places:
            own = [n for n in self._places if not n.startswith("pool.")]
            raise PoolError(f"The pool has no region {name!r}. {nearest(name, own)}")
        return self._places[name]

    def offset(self, name: str) -> int:
        """Where a region starts in every rank's memory, in bytes."""
        return self._place(name).offset

    def region(self, name: str) -> Tensor:
        """This rank's own memory, of the region's shape and dtype."""
        return self.on_rank(name, self.rank)

    def on_rank(self, name: str, rank: int) -> Tensor:
        """A peer's region as a tensor: for tests, debugging and plain-torch references; nothing orders the accesses."""
        place = self._place(name)
        if not 0 <= rank < self.ranks:
            raise PoolError(f"Rank {rank} is outside the pool's ranks 0..{self.ranks - 1} (region {name!r}).")
        part = self._memory[rank][place.offset : place.offset + place.region.nbytes]
        return part.view(place.region.dtype).view(place.region.shape)

    def addresses(self, name: str) -> Tensor:
        """int64 [R] on the device: where the region starts on each rank."""
        place = self._place(name)
        if name not in self._tables:
            self._tables[name] = self.bases + place.offset
        return self._tables[name]

    def site(self, layer: str, microbatch: int = 0) -> int:
        """A number for kernels that makes an error name this layer and microbatch."""
        if layer not in self._layers:
            self._layers.append(layer)
        kept = microbatch & ((1 << control.MICROBATCH_BITS) - 1)
        return (self._layers.index(layer) + 1) << control.MICROBATCH_BITS | kept

    def barrier(self, site: int = 0) -> None:
        """No rank passes before all have come; virtual ranks are in step anyway.

        Stream ordered on CUDA: a failure is raised by a later call or by `check`.
        """
        self.check()
        if self.virtual:
            return
        if self.device.type == "cuda":
            from ultraep_compile.codegen.handshake import meet

            meet(self, control.BARRIER, "barrier", site)
        else:
            self._host_barrier(site)

    def _host_barrier(self, site: int) -> None:
        mine = self.region(control.BARRIER)
        turn = int(mine[self.ranks]) + 1
        mine[self.ranks :] = turn
        for peer in range(self.ranks):
            self.on_rank(control.BARRIER, peer)[self.rank] = turn
        began = time.monotonic()
        end, look = began + self.deadline_s, began + _LOOK_S
        while int((missing := mine[: self.ranks] < turn).sum()):
            now = time.monotonic()
            gone = False
            if now > look:
                gone, look = self._someone_is_gone(missing), now + _LOOK_S
            if now > end or gone:
                seen = mine[: self.ranks].tolist()
                first = missing.nonzero()[0].item()
                self._record[: control.SEEN_BY_RANK] = torch.tensor(
                    [1, control.phase_code("barrier"), first, turn, seen[int(first)], site, 0, int(missing.sum())]
                )
                self._record[control.SEEN_BY_RANK :] = torch.tensor(seen)
                self.check()
            time.sleep(0)

    def check(self, synchronize: bool = False) -> None:
        """Raise `PeerTimeoutError` if a wait of this rank has failed. Reads host memory only, unless `synchronize`.

        After a failure the pool stays failed: kernels return at once and every check raises.
        """
        if self._closed:
            raise PoolError("The pool is closed: open a new one.")
        if synchronize and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._record[control.VALID]:
            raise self._lost()
        if self._line is not None and self.outlived:
            raise PoolError("The pool's ranks have failed since it was opened, and stand at different places: open a new one.")

    @property
    def outlived(self) -> bool:
        """Whether the ranks have failed together since it was opened: their counts do not match any more."""
        return self._line is not None and self._line.watchdog.epoch != self._epoch

    def _someone_is_gone(self, missing: Tensor) -> bool:
        """Whether a wait has no use any more: a rank that is missing has ended, or some rank has told of a failure."""
        if self._line is None:
            return False
        watchdog = self._line.watchdog
        if watchdog.heard is not None:
            self._line.fail("a meeting in symmetric memory", 0.0)
        ranks = [self._line.ranks[r] for r in missing.nonzero().flatten().tolist()]
        return any(r in watchdog.processes and watchdog.processes[r].state() == "ended" for r in ranks)

    def _lost(self) -> PeerTimeoutError:
        """The error of this rank's failed wait, with what the other ranks know of who is missing."""
        if self._line is None:
            return PeerTimeoutError(self._failure(self._record.tolist()))
        if self._asked is None:
            watchdog = self._line.watchdog
            self._asked = watchdog.report(self._line.ranks, self._epoch, self.deadline_s)
            watchdog.give_up(self._epoch)
        return told(PeerTimeoutError(f"{self._failure(self._record.tolist())} ({self._asked.text}.)"))

    def _failure(self, record: list[int]) -> str:
        phase, peer, expected = record[control.PHASE], record[control.PEER], record[control.EXPECTED]
        site = record[control.SITE]
        layer, microbatch = site >> control.MICROBATCH_BITS, site & ((1 << control.MICROBATCH_BITS) - 1)
        where = f"layer {self._layers[layer - 1]}, microbatch {microbatch}: " if 0 < layer <= len(self._layers) else ""
        what = control.PHASES[phase] if 0 <= phase < len(control.PHASES) else f"phase {phase}"
        if record[control.MISSING]:
            seen = record[control.SEEN_BY_RANK :]
            late = [f"{r} (count {n})" for r, n in enumerate(seen) if n - expected < 0]
            who = f"rank{'s' * (len(late) > 1)} {', '.join(late)}"
        else:
            who = f"rank {peer} (count {record[control.SEEN]}, position {record[control.INDEX]})"
        return (
            f"{where}rank {self.rank} waited {self.deadline_s:g} s for {who} to reach count {expected} of "
            f"{what!r}. Results that depended on it were not used. Look at that rank's own error or log; if it was only "
            f"slow, raise the deadline."
        )

    def close(self) -> None:
        """Give the memory back; calling it again does nothing. No kernel that uses the pool may be running."""
        self._closed = True
        self._memory.clear()
        self._tables.clear()
        self._keep = None

    @property
    def closed(self) -> bool:
        return self._closed
