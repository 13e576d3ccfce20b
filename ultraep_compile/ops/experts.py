"""`ultraep::experts`: all that happens between routing and the weighted sum, forward and backward, as one opaque op.

Forward: fill the slots, bring rows to their physical experts, run the row function, bring the results back in pair
order. Backward: fill the slots again (they belong to whichever layer runs, so none is ever saved), run the row
function's traced backward, return slot gradients to the masters and row gradients to the tokens.

When every rank's load fits its buffer (the planner sees to that), there is one round and the products' outputs are kept
for backward. Otherwise the rows travel in several rounds over buffers of the same size and backward recomputes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ultraep_compile.exchange import at
from ultraep_compile.ops import watch
from ultraep_compile.ops.alike import weights_must_be_alike
from ultraep_compile.ops.derivatives import only_first_derivatives
from ultraep_compile.ops.dispatch import EVERYTHING, Positions, Round, buffer_rows
from ultraep_compile.ops.gradients import Gradients, accumulate, or_zero, sum_over_choices
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.routing import begin_backward
from ultraep_compile.ops.transport import CollectiveTransport, SymmetricTransport, Transport, deadline_of, transport_for

if TYPE_CHECKING:
    from ultraep_compile.codegen.row_function import RowProgram


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """What the op knows of one MoE layer beyond its tensors. Registered under a key that names its whole content."""

    name: str
    layout: ExpertLayout
    group: str
    """Process group name, "" for virtual ranks."""
    sharded: bool
    """At least one parameter holds this rank's experts only (with a group)."""
    program: RowProgram
    summed: bool = False
    """Gradients of sharded parameters are those of the sum of the ranks' losses, as all-to-all gives them, not of their mean."""

    @property
    def mean_over(self) -> int:
        """What the summed gradient of a sharded parameter is divided by."""
        return 1 if self.summed else self.layout.ranks

    @property
    def transport(self) -> Transport:
        return transport_for(self.layout.ranks, self.group)

    @property
    def deadline_s(self) -> int:
        """Seconds after which a wait for another rank is an error."""
        return deadline_of(self.group)

    def static_capacity(self, tokens: int, choices: int) -> int:
        """Rows of one rank in the common, single round: from this process's own token count, ints or SymInts."""
        pairs = tokens * choices
        return self.layout.capacity(pairs * self.layout.ranks if self.group else pairs)


_sites: dict[str, ExpertSite] = {}


def register_site(key: str, site: ExpertSite) -> None:
    """Make a site known to the op. The key must name the content: compiled graphs outlive the process that made them."""
    _sites[key] = site


def site_of(key: str) -> ExpertSite:
    return _sites[key]


@dataclass(slots=True)
class _Call:
    """The parts of one call that forward and backward share."""

    site: ExpertSite
    positions: Positions
    rounds: int
    capacity: int
    rows: int
    keep: bool
    """One round that fits the static buffer: its intermediates are kept."""

    @classmethod
    def of(cls, site: ExpertSite, physical_TK: Tensor, shares_RP: Tensor) -> _Call:
        transport, layout = site.transport, site.layout
        positions = Positions.of(physical_TK, shares_RP, layout, transport)
        loads = positions.rank_loads()
        sources = shares_RP.sum(1, dtype=torch.int64).tolist()
        hosted = len(transport.hosted)
        if site.group:
            fits = all(n <= layout.capacity(s * layout.ranks) for n, s in zip(loads, sources, strict=True))
        else:
            fits = max(loads) <= layout.capacity(sum(sources))
        if fits:
            static = site.static_capacity(physical_TK.shape[0], physical_TK.shape[1])
            return cls(site, positions, 1, EVERYTHING, buffer_rows(static, layout, hosted), True)
        capacity = layout.capacity(sum(sources))
        return cls(site, positions, -(-max(loads) // capacity), capacity, buffer_rows(capacity, layout, hosted), False)

    def each_round(self) -> Iterator[Round]:
        for index in range(self.rounds):
            yield self.positions.round(index, self.capacity, self.rows)


def _weights(key: str, params: list[Tensor], slot_expert_RS: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Masters computed here, read in place, and freshly filled slots."""
    site, started = _sites[key], time.perf_counter()
    slots = [site.transport.fill_slots(p, slot_expert_RS, site.layout) for p in params]
    if site.group:
        here = site.transport.hosted.start * site.layout.masters
        params = [p[here : here + site.layout.masters] if _is_whole(site, p) else p for p in params]
    watch.add_time(key, "replicate", started)
    return params, slots


def _is_whole(site: ExpertSite, param: Tensor) -> bool:
    """Does this process hold all experts' part of a tensor?"""
    return param.shape[0] == site.layout.experts


def _row_inputs(
    trip: Round,
    hidden: Tensor,
    weight: Tensor | None,
    choices: int,
    masters: list[Tensor],
    slots: list[Tensor],
    consts: list[Tensor],
) -> list[Tensor]:
    rows = trip.to_experts(hidden, choices)
    weights = [] if weight is None else [trip.to_experts(weight.reshape(-1, 1), 1)]
    return [rows, *weights, *masters, *slots, *consts, trip.offsets]


@torch.library.custom_op("ultraep::experts", mutates_args=())
def experts(
    hidden: Tensor,
    weight: Tensor | None,
    physical_TK: Tensor,
    slot_expert_RS: Tensor,
    shares_RP: Tensor,
    params: list[Tensor],
    consts: list[Tensor],
    site_key: str,
) -> list[Tensor]:
    """Expert outputs in pair order.

    Args:
        hidden: [T, D]; weight: routing weights [T, K] if the row function uses them, else None.
        physical_TK, slot_expert_RS, shares_RP: from `reroute` and `plan`.
        params: per-expert tensors [E, ...], or [M, ...] where sharded; consts: shared tensors.
    Returns: [y [T*K, D_out], facts, *kept] where all but y is for backward only; facts is int64 [3] on the CPU, what the
        symmetric transport notes of its rounds.
    """
    site = _sites[site_key]
    with at(site.name, "recomputation" if watch.in_backward() else "forward"):
        return _forward(
            site, site_key, hidden, weight, (physical_TK, slot_expert_RS, shares_RP), params, consts
        )


def _forward(
    site: ExpertSite, site_key: str, hidden: Tensor, weight: Tensor | None, plan: tuple[Tensor, Tensor, Tensor],
    params: list[Tensor], consts: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    physical_TK, slot_expert_RS, shares_RP = plan
    watch.computing(site_key, params)
    if site.group and not site.sharded:
        weights_must_be_alike(site.name, site.group, params)
    if isinstance(site.transport, SymmetricTransport):
        from ultraep_compile.ops import symmetric

        return symmetric.forward(site, hidden, weight, *plan, params, consts, _static_rows(site, physical_TK))
    call = _Call.of(site, physical_TK, shares_RP)
    watch.in_rounds(site_key, call.rounds)
    masters, slots = _weights(site_key, params, slot_expert_RS)
    y, kept = None, []
    for trip in call.each_round():
        out, kept = site.program.forward(
            _row_inputs(trip, hidden, weight, physical_TK.shape[1], masters, slots, consts)
        )
        if y is None:
            y = out.new_empty(physical_TK.numel(), *out.shape[1:])
        trip.to_tokens(out, y)
        del out
    assert y is not None
    if not call.keep:
        rows = _static_rows(site, physical_TK)
        kept = [k.new_empty(rows, *k.shape[1:]) for k in kept]
    return [y, torch.zeros(3, dtype=torch.int64), *(k.contiguous() for k in kept)]


def _static_rows(site: ExpertSite, physical_TK: Tensor) -> int:
    static = site.static_capacity(physical_TK.shape[0], physical_TK.shape[1])
    return buffer_rows(static, site.layout, 1 if site.group else site.layout.ranks)


@experts.register_fake
def _(hidden, weight, physical_TK, slot_expert_RS, shares_RP, params, consts, site_key):
    site = _sites[site_key]
    rows = _static_rows(site, physical_TK)
    layout, hosted = site.layout, 1 if site.group else site.layout.ranks
    masters = [p.new_empty(hosted * layout.masters, *p.shape[1:]) for p in params]
    slots = [p.new_empty(hosted * layout.slots, *p.shape[1:]) for p in params]
    offsets = hidden.new_empty(hosted * layout.physical_per_rank + 1, dtype=torch.int32)
    weights = [] if weight is None else [weight.new_empty(rows, 1)]
    buffer = hidden.new_empty(rows, *hidden.shape[1:])
    y, kept = site.program.forward([buffer, *weights, *masters, *slots, *consts, offsets])
    pairs = physical_TK.shape[0] * physical_TK.shape[1]
    facts = torch.empty(3, dtype=torch.int64)
    return [y.new_empty(pairs, *y.shape[1:]), facts, *(k.new_empty(k.shape) for k in kept)]


@torch.library.custom_op("ultraep::experts_backward", mutates_args=())
def experts_backward(
    grad_y: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    physical_TK: Tensor,
    slot_expert_RS: Tensor,
    shares_RP: Tensor,
    params: list[Tensor],
    consts: list[Tensor],
    facts: Tensor,
    kept: list[Tensor],
    site_key: str,
) -> list[Tensor]:
    """Gradients [hidden, weight (if given), *params, *consts] of `experts`."""
    site, plan = _sites[site_key], (physical_TK, slot_expert_RS, shares_RP)
    with at(site.name, "backward"):
        return _gradients(site, site_key, grad_y, hidden, weight, plan, params, consts, facts, kept)


def _gradients(
    site: ExpertSite, site_key: str, grad_y: Tensor, hidden: Tensor, weight: Tensor | None,
    plan: tuple[Tensor, Tensor, Tensor], params: list[Tensor], consts: list[Tensor], facts: Tensor, kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    physical_TK, slot_expert_RS, shares_RP = plan
    watch.computing(site_key, params)
    if site.group:
        begin_backward(site.transport, f"layer {site.name}", site.name, grad_y.is_cuda)
    if isinstance(site.transport, SymmetricTransport):
        from ultraep_compile.ops import symmetric

        return symmetric.backward(site, grad_y, hidden, weight, *plan, params, consts, facts, kept)
    choices = physical_TK.shape[1]
    call = _Call.of(site, physical_TK, shares_RP)
    masters, slots = _weights(site_key, params, slot_expert_RS)
    pair_hidden = hidden.new_empty(physical_TK.numel(), *hidden.shape[1:])
    pair_weight = None if weight is None else weight.new_empty(physical_TK.numel(), 1)
    total: Gradients = []
    for trip in call.each_round():
        inputs = _row_inputs(trip, hidden, weight, choices, masters, slots, consts)
        if not call.keep:
            kept = site.program.forward(inputs)[1]
        grads = site.program.backward(inputs, kept, trip.to_experts(grad_y, 1, is_gradient=True))
        trip.to_tokens(or_zero(grads[0], inputs[0]), pair_hidden)
        if pair_weight is not None:
            trip.to_tokens(or_zero(grads[1], inputs[1]), pair_weight)
        rest = grads[1 if weight is None else 2 :]
        total = accumulate(total, rest)
    count = len(params)
    grad_params = [
        _to_owner(site_key, _is_whole(site, p), or_zero(m, like_m), or_zero(s, like_s), slot_expert_RS)
        for p, m, s, like_m, like_s in zip(
            params, total[:count], total[count : 2 * count], masters, slots, strict=True
        )
    ]
    out = [sum_over_choices(pair_hidden, choices)]
    if weight is not None and pair_weight is not None:
        out.append(pair_weight.view(weight.shape))
    return [*out, *grad_params, *(or_zero(g, c) for g, c in zip(total[2 * count :], consts, strict=True))]


@experts_backward.register_fake
def _(grad_y, hidden, weight, physical_TK, slot_expert_RS, shares_RP, params, consts, facts, kept, site_key):
    like = [hidden, *([] if weight is None else [weight]), *params, *consts]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _to_owner(
    key: str, is_whole: bool, grad_masters: Tensor, grad_slots: Tensor, slot_expert_RS: Tensor
) -> Tensor:
    """Gradient of one parameter from the gradients of its masters and slots.

    Sharded: the owner's share of the gradient of the mean (or sum) of the ranks' losses. Not sharded: this process's own part,
    which averaging over the ranks (DDP) turns into the same.
    """
    site, started = _sites[key], time.perf_counter()
    transport, layout = site.transport, site.layout
    if not isinstance(transport, CollectiveTransport):
        grad = transport.reduce_slots(grad_masters, grad_slots, slot_expert_RS, layout)
    elif not is_whole or layout.ranks == 1:
        grad = transport.reduce_slots(grad_masters, grad_slots, slot_expert_RS, layout) / site.mean_over
    else:
        grad = grad_masters.new_zeros(layout.experts, *grad_masters.shape[1:])
        here = transport.rank * layout.masters
        grad[here : here + layout.masters] = grad_masters
        expert = slot_expert_RS[transport.rank].to(torch.int64)
        used = torch.nonzero(expert >= 0).flatten()
        grad[expert[used]] = grad_slots[used]  # at most one copy of an expert on a rank, never beside its master
    watch.add_time(key, "grad_reduce", started)
    return grad.contiguous()


def _setup(ctx, inputs, output):
    hidden, weight, physical_TK, slot_expert_RS, shares_RP, params, consts, ctx.site_key = inputs
    ctx.params, ctx.consts, ctx.weighted = len(params), len(consts), weight is not None
    weights = [] if weight is None else [weight]
    ctx.save_for_backward(hidden, *weights, physical_TK, slot_expert_RS, shares_RP, *params, *consts, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    hidden, *rest = ctx.saved_tensors
    weight = rest.pop(0) if ctx.weighted else None
    plan, rest = rest[:3], rest[3:]
    params, rest = rest[: ctx.params], rest[ctx.params :]
    consts, (facts, *kept) = rest[: ctx.consts], rest[ctx.consts :]
    if grads[0] is None:
        return None, None, None, None, None, [None] * ctx.params, [None] * ctx.consts, None
    out = experts_backward(grads[0].contiguous(), hidden, weight, *plan, params, consts, facts, kept, ctx.site_key)
    d_hidden, d_weight, rest = out[0], (out[1] if ctx.weighted else None), out[2 if ctx.weighted else 1 :]
    return d_hidden, d_weight, None, None, None, rest[: ctx.params], rest[ctx.params :], None


experts.register_autograd(_backward, setup_context=_setup)
only_first_derivatives(experts, experts_backward)
