"""Where ranks live. All transports offer the same few exchanges, so the ops above them are one program.

`VirtualTransport`: all R ranks are slices of this process's tokens. `CollectiveTransport`: one rank per process of a
`torch.distributed` group (gloo or NCCL). `SymmetricTransport`: the same processes, where they can address each other's
memory. Every exchange is deterministic in content and order.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from ultraep_compile.exchange import DEADLINE_S as DEADLINE
from ultraep_compile.exchange import Line, line_of
from ultraep_compile.ops.groups import resolve
from ultraep_compile.ops.layout import ExpertLayout, source_ranks


@dataclass(frozen=True, slots=True)
class VirtualTransport:
    """R ranks inside one process."""

    ranks: int

    @property
    def hosted(self) -> range:
        """Ranks whose experts this process computes."""
        return range(self.ranks)

    def source_of_token(self, tokens: int, device: torch.device) -> Tensor:
        return source_ranks(tokens, self.ranks, device)

    def gather_counts(self, counts_HE: Tensor) -> Tensor:
        return counts_HE

    def fill_slots(self, masters: Tensor, slot_expert_RS: Tensor, layout: ExpertLayout) -> Tensor:
        """Copies of the hot experts, [R*S, ...]. Empty slots keep whatever the memory held: nothing reads them."""
        expert = slot_expert_RS.flatten().to(torch.int64)
        if masters.device.type == "cuda":  # a static gather avoids a host read
            return masters.detach()[expert.clamp(min=0)]
        slots = masters.new_empty(expert.numel(), *masters.shape[1:])
        used = torch.nonzero(expert >= 0).flatten()
        slots[used] = masters.detach()[expert[used]]
        return slots

    def reduce_slots(
        self, grad_masters: Tensor, grad_slots: Tensor, slot_expert_RS: Tensor, layout: ExpertLayout
    ) -> Tensor:
        """Masters' gradient plus their copies' gradients, in slot order, accumulated in fp32 or wider."""
        expert = slot_expert_RS.flatten().to(torch.int64)
        used = torch.nonzero(expert >= 0).flatten()
        return add_in_order(grad_masters, grad_slots[used], expert[used].tolist())


@dataclass(frozen=True, slots=True)
class CollectiveTransport:
    """One rank per process."""

    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def hosted(self) -> range:
        return range(self.rank, self.rank + 1)

    @property
    def line(self) -> Line:
        """What rows, weights and counts travel over, under the group's deadline."""
        return line_of(self.group)

    def source_of_token(self, tokens: int, device: torch.device) -> Tensor:
        return torch.full((tokens,), self.rank, device=device, dtype=torch.int64)

    def gather_counts(self, counts_HE: Tensor) -> Tensor:
        """All ranks' rows: [1, E] on each -> [R, E] on all."""
        out = counts_HE.new_empty(self.ranks, *counts_HE.shape[1:])
        self.all_gather(out, counts_HE, "all ranks' counts")
        self.line.settle()
        return out

    def exchange_row(self, row: Tensor, layer: str) -> Tensor:
        """All ranks' int32 rows [W] as [R, W], by the way that counts take."""
        return self.gather_counts(row.unsqueeze(0))

    def all_gather(self, out: Tensor, part: Tensor, what: str) -> None:
        """Every rank's `part`, in rank order along dim 0 of `out`."""
        self.line.all_gather(out, part, what)

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int], what: str) -> Tensor:
        """Rows grouped by destination -> rows grouped by source; `send` and `receive` count rows per peer."""
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        if rows.shape[1:].numel():
            self.line.all_to_all(out, rows.contiguous(), receive, send, what)
        return out

    def _slot_traffic(self, slot_expert_RS: Tensor, layout: ExpertLayout) -> tuple[list[list[int]], list[list[int]]]:
        """Local master indices to send to each rank, and own slot indices to fill from each rank, both in slot order."""
        table = slot_expert_RS.tolist()
        send = [
            [e - self.rank * layout.masters for e in row if e >= 0 and e // layout.masters == self.rank]
            for row in table
        ]
        own = table[self.rank]
        receive = [[s for s, e in enumerate(own) if e >= 0 and e // layout.masters == r] for r in range(self.ranks)]
        return send, receive

    def fill_slots(self, masters: Tensor, slot_expert_RS: Tensor, layout: ExpertLayout) -> Tensor:
        """Copies of hot experts in this rank's slots, [S, ...].

        `masters` holds this rank's experts [M, ...], or all [E, ...] where the model is not sharded: then every copy is
        at hand already and nothing travels.
        """
        if masters.shape[0] == layout.experts and layout.ranks > 1:
            local = VirtualTransport(1)
            return local.fill_slots(masters, slot_expert_RS[self.rank : self.rank + 1], layout)
        send, receive = self._slot_traffic(slot_expert_RS, layout)
        index = torch.tensor([e for row in send for e in row], dtype=torch.int64, device=masters.device)
        counts = [len(r) for r in send], [len(r) for r in receive]
        arrived = self.all_to_all(masters.detach()[index], *counts, "copies of hot experts' weights")
        slots = masters.new_empty(layout.slots, *masters.shape[1:])
        slots[torch.tensor([s for row in receive for s in row], dtype=torch.int64, device=masters.device)] = arrived
        return slots

    def reduce_slots(
        self, grad_masters: Tensor, grad_slots: Tensor, slot_expert_RS: Tensor, layout: ExpertLayout
    ) -> Tensor:
        """Owners' gradients: own part first, then the copies by (host rank, slot), accumulated in fp32 or wider."""
        send, receive = self._slot_traffic(slot_expert_RS, layout)
        index = torch.tensor([s for row in receive for s in row], dtype=torch.int64, device=grad_slots.device)
        counts = [len(r) for r in receive], [len(r) for r in send]
        arrived = self.all_to_all(grad_slots[index], *counts, "gradients of copied experts")
        owner = torch.tensor([e for row in send for e in row], dtype=torch.int64, device=grad_slots.device)
        return add_in_order(grad_masters, arrived, owner.tolist())


@dataclass(frozen=True, slots=True)
class SymmetricTransport(CollectiveTransport):
    """One rank per process, all of whose memory the others can address: `ops.symmetric` moves rows and weights.

    Single exchanges outside of `ultraep::experts` and the counts are still made by collectives.
    """

    def exchange_row(self, row: Tensor, layer: str) -> Tensor:
        """All ranks' int32 rows [W] as [R, W], without a collective."""
        from ultraep_compile.ops.plane import board_for

        board = board_for(self.group, row.device, row.shape[0], deadline_of(self.group.group_name))
        return board.exchange(row, layer)


Transport = VirtualTransport | CollectiveTransport


TRANSPORTS = ("auto", "collective", "symmetric")
DEADLINE_S = int(DEADLINE)
_chosen: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[str, int]] = weakref.WeakKeyDictionary()
_shared: weakref.WeakKeyDictionary[dist.ProcessGroup, bool] = weakref.WeakKeyDictionary()


def choose_transport(group: str, transport: str, deadline_s: int = DEADLINE_S) -> None:
    """How the ranks of a group exchange from now on; all of them must choose alike, before the first exchange."""
    members = resolve(group)
    _chosen[members] = (transport, deadline_s)
    line_of(members).deadline = float(deadline_s)


def deadline_of(group: str) -> int:
    """Seconds after which a wait for another rank of the group is an error."""
    return _chosen.get(resolve(group), ("", DEADLINE_S))[1] if group else DEADLINE_S


def transport_for(ranks: int, group: str) -> Transport:
    """The transport of a group name ("" = virtual ranks). Nothing is kept of a group but by the group itself: one that is
    made again under the same name is another one.
    """
    if not group:
        return VirtualTransport(ranks)
    members = resolve(group)
    wanted = _chosen.get(members, ("collective", 0))[0]
    if wanted == "symmetric" or (wanted == "auto" and memory_is_shared(members)):
        return SymmetricTransport(members)
    return CollectiveTransport(members)


def memory_is_shared(group: dist.ProcessGroup) -> bool:
    """Can every rank's GPU address the memory of every other's? Every rank must ask, and all get the same answer."""
    if group not in _shared:  # a rank that asked again would wait for the others
        _shared[group] = _ask_for_shared_memory(group)
    return _shared[group]


def _ask_for_shared_memory(group: dist.ProcessGroup) -> bool:
    mine = _reach()
    all_of = line_of(group).gather_objects(mine, "which memory every rank reaches")
    reach = [r for r in all_of if r is not None]
    if len(reach) < len(all_of) or len({r["host"] for r in reach}) > 1:
        return False
    used = [r["device"] for r in reach]
    doubled = len(set(used)) < len(used)
    return all((not doubled or r["overlap"]) and set(used) <= set(r["reaches"]) for r in reach)


def _reach() -> dict | None:
    """This process's host, its current GPU, and the GPUs whose memory that one reaches; None without."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return None
    device = torch.cuda.current_device()
    known = {i: str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())}
    reaches = [u for i, u in known.items() if i == device or torch.cuda.can_device_access_peer(device, i)]
    return {
        "host": socket.gethostname(),
        "device": known[device],
        "reaches": reaches,
        "overlap": os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0") == "1",
    }


def add_in_order(base: Tensor, parts: Sequence[Tensor] | Tensor, index: list[int]) -> Tensor:
    """base[index[i]] += parts[i] for i = 0, 1, ... in a wide type: the same bits for the same plan on every run."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    for i, e in enumerate(index):
        wide[e] += parts[i]
    return wide.to(base.dtype)
