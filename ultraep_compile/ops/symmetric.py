"""`ultraep::experts` over symmetric memory: the same steps as over collectives, without a host read on their way.

    push rows to their experts' ranks | replicate hot experts     then all ranks meet (first barrier)
    row function over masters and slots
    outputs into the `results` buffer                             then all ranks meet (second barrier)
    pull every pair's output

Why two meetings are enough: `rows`, `weights` and `grads` are written by peers before the first meeting and read by their
owner between the two; `results` is written by its owner between the two and read by peers between the second meeting and
the next first one. So whoever writes has met everyone since the last read. Slots have their own handshake
(`codegen.replicate`, `codegen.reduce`).

Rounds: every rank's load is in the plan, so all ranks make the same number of rounds, ceil(largest load / capacity). The
host learns that number from pinned memory after it has queued the first round: it never keeps the device waiting, and
makes further rounds only where the plan exceeds the capacity. While a CUDA graph is captured nothing can be read, and
as many rounds are recorded as any plan can need; those that a plan does not need find empty windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ultraep_compile.codegen import dispatch as wire
from ultraep_compile.codegen.bundle import Part
from ultraep_compile.codegen.reroute import Routing, Window, place, window
from ultraep_compile.errors import OptionError
from ultraep_compile.ops.dispatch import buffer_rows
from ultraep_compile.ops.gradients import (
    SUMMED,
    Gradients,
    accumulate,
    adds_on_arrival,
    or_zero,
    sum_over_choices,
    unshared,
)
from ultraep_compile.ops.plane import Geometry, Plane, plane_for
from ultraep_compile.ops.transport import VirtualTransport, add_in_order

if TYPE_CHECKING:
    from ultraep_compile.ops.experts import ExpertSite

CAPACITY, ROUNDS, KEPT = range(3)
"""What backward must know of forward, in the op's second output."""


@dataclass(slots=True)
class _Call:
    """One forward or backward of one layer."""

    site: ExpertSite
    plane: Plane
    params: list[Tensor]
    slot_expert_RS: Tensor
    shares_RP: Tensor
    routing: Routing
    capacity: int
    token: int
    """Names this layer in errors."""

    @classmethod
    def of(
        cls, site: ExpertSite, hidden: Tensor, weight: Tensor | None, physical_TK: Tensor, slot_expert_RS: Tensor,
        shares_RP: Tensor, params: list[Tensor], capacity: int | None = None,
    ) -> _Call:  # fmt: skip
        """`capacity`: that of the forward, in backward."""
        plane = plane_for(_geometry(site, hidden, weight, params, physical_TK.shape[1]), physical_TK.numel())
        layout, pool = site.layout, plane.pool
        pool.check()
        capacity = plane.capacity if capacity is None else capacity
        routing = place(
            physical_TK, shares_RP.contiguous(), layout, pool.rank, capacity, once_per_rank=plane.sends_once
        )
        return cls(site, plane, params, slot_expert_RS, shares_RP, routing, capacity, pool.site(site.name))

    @property
    def rows(self) -> int:
        """Rows of the buffers: as many as in the forward, also where they have grown since."""
        return buffer_rows(self.capacity, self.site.layout, 1)

    def window(self, index: int) -> Window:
        if index == 0:
            return self.routing.window
        shares = self.shares_RP.contiguous()
        at = torch.full((1,), index, dtype=torch.int32, device=shares.device) if shares.is_cuda else index
        return window(shares, self.site.layout, self.plane.rank, self.capacity, at)

    def push(self, source: Tensor, name: str, trip: Window, *, gradient: bool = False, once: bool = False) -> Tensor:
        """Rows to their experts; returns what arrives here, complete once all ranks have met."""
        source = source.contiguous()
        wire.push_rows(
            source, self.routing, self.plane.peers(name, self.rows, source), self.rows, self.site.layout, window=trip,
            gradient=gradient, references=self.plane.references() if once else None,
        )  # fmt: skip
        buffer = self.plane.buffer(name, self.rows, source)
        wire.clear_rows(buffer, trip)
        return buffer

    def meet(self) -> None:
        self.plane.pool.barrier(self.token)

    def pull(self, out: Tensor, trip: Window, name: str = "results") -> None:
        wire.pull_rows(
            out, self.routing, self.plane.peers(name, self.rows, out), self.rows, self.site.layout, window=trip
        )

    def pull_sum(self, out: Tensor, trip: Window) -> None:
        """The sum of every token's rows; of a round that carries all."""
        wire.pull_sum(
            out, self.routing, self.plane.peers("results", self.rows, out), self.rows, self.site.layout, window=trip
        )

    def refuse(self, rows: Tensor, physical_TK: Tensor | None = None) -> Tensor:
        """NaN where a missing rank or a wrong id left nothing to compute with; the error comes when the host looks."""
        if not rows.is_cuda or not rows.dtype.is_floating_point:
            return rows
        from ultraep_compile.codegen.guard_kernels import refuse

        return refuse(rows, self.plane.pool, physical_TK)

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Masters in place and slots that are being filled; complete once `filled` and all ranks' meeting are passed."""
        layout, rank = self.site.layout, self.plane.rank
        here = slice(rank * layout.masters, (rank + 1) * layout.masters)
        own_slots = self.slot_expert_RS[rank : rank + 1]
        masters, slots, travelling = [], [], []
        for param in self.params:
            whole = is_whole(self.site, param)
            masters.append(param.detach()[here] if whole else param.detach())
            if whole:
                slots.append(VirtualTransport(1).fill_slots(param, own_slots, layout))
            elif layout.slots:
                slots.append(self.plane.pool.region(self.plane.bundle.region_of(len(travelling))))
                travelling.append(param.detach().contiguous())
            else:
                slots.append(param.new_empty(0, *param.shape[1:]))
        self._replicate(travelling)
        return masters, slots

    def _replicate(self, travelling: list[Tensor]) -> None:
        if not travelling:
            return
        pool, bundle = self.plane.pool, self.plane.bundle
        if pool.device.type == "cuda":
            from ultraep_compile.codegen.replicate import await_slots, replicate_to_slots

            replicate_to_slots(pool, bundle, travelling, self.slot_expert_RS.contiguous(), site=self.token)
            await_slots(pool, bundle, self.slot_expert_RS.contiguous(), site=self.token)
            return
        first = pool.rank * bundle.masters
        for rank, row in enumerate(self.slot_expert_RS.tolist()):
            for slot, expert in enumerate(row):
                if first <= expert < first + bundle.masters:
                    for i, tensor in enumerate(travelling):
                        pool.on_rank(bundle.region_of(i), rank)[slot] = tensor[expert - first]

    def release_slots(self) -> None:
        """The last use of the slots is queued."""
        if self.plane.geometry.parts and self.site.layout.slots and self.plane.pool.device.type == "cuda":
            from ultraep_compile.codegen.replicate import free_slots

            free_slots(self.plane.pool, self.plane.bundle)

    def inputs(
        self, trip: Window, hidden: Tensor, weight: Tensor | None, masters: list[Tensor], slots: list[Tensor],
        consts: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        """Inputs of the row program, complete once `arrive` is called."""
        rows = [self.push(hidden, "rows", trip, once=self.plane.sends_once)]
        if weight is not None:
            rows.append(self.push(weight.reshape(-1, 1), "weights", trip))
        return [*rows, *masters, *slots, *consts, trip.offsets]

    def arrive(self, inputs: list[Tensor], trip: Window) -> None:
        """All ranks have pushed their rows."""
        self.meet()
        if self.plane.sends_once:
            wire.spread_rows(inputs[0], self.plane.pool.region("references"), trip)


def is_whole(site: ExpertSite, param: Tensor) -> bool:
    """Does this process hold all experts' part of a tensor?"""
    return param.shape[0] == site.layout.experts and site.layout.ranks > 1


def _geometry(
    site: ExpertSite, hidden: Tensor, weight: Tensor | None, params: list[Tensor], choices: int
) -> Geometry:
    row = hidden.shape[1:].numel() * hidden.element_size()
    return Geometry(
        group=site.group,
        device=hidden.device,
        layout=site.layout,
        row_bytes=row,
        result_bytes=max(row, site.program.out_bytes_per_row),
        weight_bytes=0 if weight is None else weight.element_size(),
        parts=tuple(Part(tuple(p.shape[1:]), p.dtype) for p in params if not is_whole(site, p)),
        choices=choices,
        deadline_s=site.deadline_s,
    )


class _Loads:
    """The ranks' loads on their way to the host."""

    def __init__(self, loads_R: Tensor) -> None:
        self.event = None
        if loads_R.is_cuda:
            self.host = torch.empty(loads_R.shape, dtype=loads_R.dtype, pin_memory=True)
            self.host.copy_(loads_R, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = loads_R

    def read(self) -> list[int]:
        """Waits until the plan is made, while the device works on what is queued behind it."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def forward(
    site: ExpertSite, hidden: Tensor, weight: Tensor | None, physical_TK: Tensor, slot_expert_RS: Tensor,
    shares_RP: Tensor, params: list[Tensor], consts: list[Tensor], static_rows: int,
) -> list[Tensor]:  # fmt: skip
    """[y, facts, *kept] of `ultraep::experts`; `static_rows`: leading dim that the op has promised for what is kept."""
    call = _Call.of(site, hidden, weight, physical_TK, slot_expert_RS, shares_RP, params)
    capturing = _capturing(hidden)
    loads = None if capturing else _Loads(call.routing.window.loads_R)
    masters, slots = call.weights()
    y, kept = _forward_round(call, 0, hidden, weight, masters, slots, consts, None)
    rounds = _most_rounds(call, physical_TK) if loads is None else max(1, -(-max(loads.read()) // call.capacity))
    fits = call.rows <= static_rows
    kept = [_resized(k, static_rows, fits) for k in kept]
    for index in range(1, rounds):
        _forward_round(call, index, hidden, weight, masters, slots, consts, y)
    call.release_slots()
    call.refuse(y, physical_TK)
    if loads is not None:
        call.plane.pool.check()
        _grow(call, loads.read())
    return [y, torch.tensor([call.capacity, rounds, int(fits)]), *kept]


def _forward_round(
    call: _Call, index: int, hidden: Tensor, weight: Tensor | None, masters: list[Tensor], slots: list[Tensor],
    consts: list[Tensor], y: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    trip = call.window(index)
    inputs = call.inputs(trip, hidden, weight, masters, slots, consts)
    call.arrive(inputs, trip)
    program = call.site.program
    if y is None:
        y = hidden.new_empty(call.routing.physical_TK.numel(), *program.result.shape, dtype=program.result.dtype)
    kept = program.forward_into(inputs, call.plane.buffer("results", call.rows, y))
    call.meet()
    call.pull(y, trip)
    return y, kept


def _resized(kept: Tensor, rows: int, fits: bool) -> Tensor:
    """What is kept, with as many rows as the op has promised; without content where it has no room."""
    if kept.shape[0] == rows:
        return kept.contiguous()
    out = kept.new_empty(rows, *kept.shape[1:])
    if fits:
        out[: kept.shape[0]] = kept
    return out


def _most_rounds(call: _Call, physical_TK: Tensor) -> int:
    """As many as any plan of batches of this size needs."""
    layout, pairs = call.site.layout, physical_TK.numel()
    if layout.capacity(pairs * layout.ranks) > call.capacity:
        raise OptionError(
            f"{call.site.name}: A CUDA graph of {physical_TK.shape[0]} tokens is captured, but the buffers were made for "
            "smaller batches. Run a step of the captured size once before the capture."
        )
    return max(1, -(-pairs * layout.ranks // call.capacity))


def _grow(call: _Call, loads: list[int]) -> None:
    """All ranks know all loads, so all see alike that batches have become larger than the buffers were made for."""
    wanted = call.site.layout.capacity(sum(loads))
    if wanted > call.plane.capacity:
        call.plane.grow(wanted)


def backward(
    site: ExpertSite, grad_y: Tensor, hidden: Tensor, weight: Tensor | None, physical_TK: Tensor,
    slot_expert_RS: Tensor, shares_RP: Tensor, params: list[Tensor], consts: list[Tensor], facts: Tensor,
    kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients [hidden, weight (if given), *params, *consts]."""
    capacity, rounds, is_kept = facts.tolist()
    call = _Call.of(site, hidden, weight, physical_TK, slot_expert_RS, shares_RP, params, capacity)
    masters, slots = call.weights()
    adds = rounds == 1 and hidden.dim() == 2 and adds_on_arrival(hidden)
    grad_hidden = hidden.new_empty(hidden.shape if adds else (physical_TK.numel(), *hidden.shape[1:]))
    pair_weight = None if weight is None else weight.new_empty(physical_TK.numel(), 1)
    rest: Gradients = []
    for index in range(rounds):
        trip = call.window(index)
        inputs = call.inputs(trip, hidden, weight, masters, slots, consts)
        grad_rows = call.push(grad_y, "grads", trip, gradient=True)
        call.arrive(inputs, trip)
        if index == 0 and is_kept:
            held = [k[: call.rows] for k in kept]
        else:
            held = site.program.forward(inputs)[1]
        grads = site.program.backward_into(inputs, held, grad_rows, call.plane.buffer("results", call.rows, hidden))
        if pair_weight is not None:
            call.plane.buffer("result_weights", call.rows, pair_weight).copy_(or_zero(grads[0], inputs[1]))
        call.meet()
        (call.pull_sum if adds else call.pull)(grad_hidden, trip)
        if pair_weight is not None:
            call.pull(pair_weight, trip, "result_weights")
        rest = accumulate(rest, grads[0 if weight is None else 1 :])
    count = len(params)
    grad_masters = unshared([or_zero(g, like) for g, like in zip(rest[:count], masters, strict=True)])
    grad_slots = [or_zero(g, like) for g, like in zip(rest[count : 2 * count], slots, strict=True)]
    call.release_slots()
    grad_params = _to_owners(call, grad_masters, grad_slots)
    call.refuse(grad_hidden, physical_TK)
    out = [grad_hidden if adds else sum_over_choices(grad_hidden, physical_TK.shape[1])]
    if weight is not None and pair_weight is not None:
        out.append(call.refuse(pair_weight, physical_TK).view(weight.shape))
    grad_consts = [or_zero(g, c) for g, c in zip(rest[2 * count :], consts, strict=True)]
    return [*out, *grad_params, *(call.refuse(g.contiguous()) if g.dim() else g for g in grad_consts)]


def _to_owners(call: _Call, grad_masters: list[Tensor], grad_slots: list[Tensor]) -> list[Tensor]:
    """Gradients of the parameters; see `experts._to_owner`."""
    out: list[Tensor] = [torch.empty(0)] * len(call.params)
    travelling: list[int] = []
    for i, param in enumerate(call.params):
        if is_whole(call.site, param):
            out[i] = _in_place(call, grad_masters[i], grad_slots[i])
        elif call.site.layout.slots and param.dtype.is_floating_point:
            travelling.append(i)
        else:
            out[i] = grad_masters[i]
    for i, grad in zip(travelling, _reduce(call, travelling, grad_masters, grad_slots), strict=True):
        out[i] = grad
    scaled = [
        g if is_whole(call.site, p) or not g.dtype.is_floating_point else g.div_(call.site.mean_over)
        for g, p in zip(out, call.params, strict=True)
    ]
    return [call.refuse(g.contiguous()) for g in scaled]


def _in_place(call: _Call, grad_masters: Tensor, grad_slots: Tensor) -> Tensor:
    """This process's own part of the gradient of a tensor of all experts."""
    layout, rank = call.site.layout, call.plane.rank
    grad = grad_masters.new_zeros(layout.experts, *grad_masters.shape[1:])
    grad[rank * layout.masters : (rank + 1) * layout.masters] = grad_masters
    if layout.slots:
        expert = call.slot_expert_RS[rank].long()
        used = (expert >= 0).view(-1, *[1] * (grad.dim() - 1))
        # at most one copy of an expert on a rank, never beside its master; an empty slot adds zero somewhere
        grad.index_add_(0, expert.clamp(min=0), torch.where(used, grad_slots, 0))
    return grad


def _reduce(call: _Call, which: list[int], grad_masters: list[Tensor], grad_slots: list[Tensor]) -> list[Tensor]:
    """Owners' gradients with those of all copies added, own first, then by (host rank, slot), in fp32 or wider."""
    if not which:
        return []
    pool, bundle = call.plane.pool, call.plane.grad_bundle
    on_gpu = pool.device.type == "cuda" and all(p.dtype in SUMMED for p in bundle.parts)
    if on_gpu:
        from ultraep_compile.codegen import reduce

        reduce.await_read(pool, bundle, call.token)
        for i, at in enumerate(which):
            pool.region(bundle.region_of(i)).copy_(grad_slots[at])
        reduce.announce_gradients(pool, bundle)
        own = [grad_masters[at].contiguous() for at in which]
        return reduce.reduce_from_slots(pool, bundle, own, call.slot_expert_RS.contiguous(), site=call.token)
    for i, at in enumerate(which):
        pool.region(bundle.region_of(i)).copy_(grad_slots[at])
    call.meet()
    first, out = pool.rank * bundle.masters, []
    table = [(r, s, e - first) for r, row in enumerate(call.slot_expert_RS.tolist()) for s, e in enumerate(row)]
    mine = [(r, s, e) for r, s, e in table if 0 <= e < bundle.masters]
    for i, at in enumerate(which):
        parts = [pool.on_rank(bundle.region_of(i), r)[s] for r, s, _ in mine]
        out.append(add_in_order(grad_masters[at], parts, [e for _, _, e in mine]))
    call.meet()  # all copies have been read
    return out
