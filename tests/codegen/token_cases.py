"""Problems for reroute, dispatch and combine, and their comparison with the plain torch ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ultraep_compile.codegen.dispatch import (
    clear_rows,
    pack_rows,
    pull_rows,
    pull_sum,
    push_rows,
    spread_rows,
    sum_choices,
    unpack_rows,
)
from ultraep_compile.codegen.reroute import EVERYTHING, Routing, place, reroute_and_place, window, window_reference
from ultraep_compile.codegen.wire import SCALED, pack_rows_reference, packed_bytes, scales_at, unpack_rows_reference
from ultraep_compile.ops.dispatch import Positions, Round, buffer_rows
from ultraep_compile.ops.layout import ExpertLayout, physical_to_logical
from ultraep_compile.ops.transport import CollectiveTransport, VirtualTransport
from ultraep_compile.planner import make_plan


@dataclass(slots=True)
class TokenCase:
    """All ranks' choices and the plan for them. Ranks have different numbers of tokens."""

    layout: ExpertLayout
    ids_RTK: list[Tensor]
    slot_expert_RS: Tensor
    shares_RP: Tensor

    @classmethod
    def draw(
        cls, ranks: int, masters: int, slots: int, tokens: list[int], choices: int, skew: float, seed: int, *,
        padding: float = 0.0, repeats: bool = False,
    ) -> TokenCase:  # fmt: skip
        """Random choices, hotter experts first; a share `padding` of ids is -1."""
        g = torch.Generator().manual_seed(seed)
        layout, ids_RTK = ExpertLayout(ranks * masters, ranks, slots), []
        for r in range(ranks):
            scores = torch.randn(tokens[r % len(tokens)], layout.experts, generator=g)
            ids = (scores + skew * torch.linspace(1, 0, layout.experts)).topk(choices)[1]
            if repeats:
                ids = torch.where(torch.rand(ids.shape, generator=g) < 0.4, ids[:, :1], ids)
            ids_RTK.append(torch.where(torch.rand(ids.shape, generator=g) < padding, -1, ids))
        counts = torch.stack([torch.bincount(i[i >= 0].flatten(), minlength=layout.experts) for i in ids_RTK])
        if slots:
            plan = make_plan(counts.int(), slots)
            return cls(layout, ids_RTK, plan.slot_expert_RS, plan.shares_RP)
        return cls(layout, ids_RTK, counts.new_empty(ranks, 0).int(), counts.int())


def small_token_cases() -> dict[str, TokenCase]:
    """Each takes another way through the kernels; few and small, for the interpreter is slow."""
    draw = TokenCase.draw
    return {
        "the example": TokenCase(
            ExpertLayout(2, 2, 1),
            [torch.tensor([[0], [1], [0], [0]]), torch.empty(0, 1, dtype=torch.int64)],
            torch.tensor([[-1], [0]], dtype=torch.int32),
            torch.tensor([[2, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.int32),
        ),
        "one rank": draw(1, 5, 0, [70], 2, 1.0, 0),
        "every expert chosen": draw(2, 2, 1, [65, 3], 4, 0.0, 1),
        "no slots, odd sizes": draw(3, 5, 0, [33, 0, 131], 3, 1.0, 2),
        "one hot expert": draw(4, 2, 2, [97, 12], 1, 60.0, 3),
        "many copies": draw(8, 2, 3, [40], 3, 8.0, 4),
        "padding": draw(4, 4, 2, [61, 7], 4, 3.0, 5, padding=0.3),
        "no tokens at all": draw(2, 2, 1, [0], 2, 0.0, 6),
        "repeated choices": draw(4, 2, 1, [50], 3, 4.0, 7, repeats=True),
    }


def rerouted(case: TokenCase, rank: int, device: str, capacity: int = EVERYTHING, **more: bool) -> Routing:
    ids = case.ids_RTK[rank].to(device)
    plan = case.slot_expert_RS.to(device), case.shares_RP.to(device)
    distinct = more.pop("distinct", not has_repeats(case))
    return reroute_and_place(ids, *plan, case.layout, rank, capacity, distinct=distinct, **more)


def has_repeats(case: TokenCase) -> bool:
    return any(
        bool(((ids.unsqueeze(1) == ids.unsqueeze(2)) & (ids >= 0).unsqueeze(1)).sum() > (ids >= 0).sum())
        for ids in case.ids_RTK
    )


def check_reroute(case: TokenCase, device: str, ranks: list[int], capacity: int = EVERYTHING) -> None:
    """Against the definition: right experts, exact shares, the positions of `ops.dispatch`, the first like choice."""
    layout = case.layout
    for rank in ranks:
        routing = rerouted(case, rank, device, capacity, once_per_rank=True)
        made = Routing(*(t.cpu() for t in routing[:3]), type(routing.window)(*(t.cpu() for t in routing.window)))
        ids, live = case.ids_RTK[rank], case.ids_RTK[rank] >= 0
        physical = made.physical_TK.long()
        assert torch.equal(physical >= 0, live) and torch.equal(made.position_TK >= 0, live)
        logical = physical_to_logical(case.slot_expert_RS, layout.experts)
        assert torch.equal(logical[physical[live]], ids[live].long())
        assert torch.equal(torch.bincount(physical[live], minlength=layout.physical), case.shares_RP[rank].long())
        # the op itself, of all ranks' tokens with their padding taken out: tokens of one choice
        every = torch.cat([i[i >= 0] for i in case.ids_RTK]).unsqueeze(1)
        source = torch.cat([torch.full((int((i >= 0).sum()),), r) for r, i in enumerate(case.ids_RTK)])
        transport = _Sources(layout.ranks, source)
        right = _op_physical(every, case, transport)
        assert torch.equal(physical[live], right[source == rank])
        positions = Positions.of(right.unsqueeze(1), case.shares_RP, layout, transport).position
        assert torch.equal(made.position_TK[live].long(), positions[source == rank])
        for expected, got in zip(window_reference(case.shares_RP, layout, rank, capacity), made.window, strict=True):
            assert torch.equal(expected, got)
        for index in (0, 1, torch.tensor([2], device=device)) if capacity < EVERYTHING else ():
            expected = window_reference(case.shares_RP, layout, rank, capacity, int(index))
            got = window(case.shares_RP.to(device), layout, rank, capacity, index)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))
        check_leads(made, layout, capacity)
        again = place(routing.physical_TK, case.shares_RP.to(device), layout, rank, capacity, once_per_rank=True)
        for expected, got in zip((*routing[:3], *routing.window), (*again[:3], *again.window), strict=True):
            assert torch.equal(expected, got)


def check_leads(made: Routing, layout: ExpertLayout, capacity: int) -> None:
    assert made.lead_TK is not None
    for t, row in enumerate(made.physical_TK.tolist()):
        trips = [
            (p // layout.physical_per_rank, int(made.position_TK[t, k]) // capacity) if p >= 0 else ("none", k)
            for k, p in enumerate(row)
        ]
        assert made.lead_TK[t].tolist() == [trips.index(trip) for trip in trips]


class _Sources(VirtualTransport):
    """Virtual ranks with given numbers of tokens."""

    def __init__(self, ranks: int, source: Tensor) -> None:
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "source", source)

    def source_of_token(self, tokens: int, device: torch.device) -> Tensor:
        return self.source


def _op_physical(ids: Tensor, case: TokenCase, transport: _Sources) -> Tensor:
    """`ultraep::reroute` for ranks with different numbers of tokens."""
    from unittest import mock

    from ultraep_compile.ops import routing

    with mock.patch.object(routing, "transport_for", lambda ranks, group: transport):
        return routing.reroute(ids, case.slot_expert_RS, case.shares_RP, case.layout.experts, "", "x").flatten().long()


@dataclass(frozen=True, slots=True)
class _Rank(CollectiveTransport):
    """One rank of a group whose exchanges the test plays itself."""

    number: int
    size: int

    @property
    def rank(self) -> int:
        return self.number

    @property
    def ranks(self) -> int:
        return self.size


def expected_rounds(case: TokenCase, routings: list[Routing], capacity: int, index: int, rows: int) -> list[Round]:
    """The trips of `ops.dispatch` over a group, one of every rank."""
    trips = []
    for r, routing in enumerate(routings):
        transport = _Rank(None, r, case.layout.ranks)  # type: ignore[arg-type]
        live = routing.physical_TK.cpu().flatten() >= 0
        physical = routing.physical_TK.cpu().flatten()[live].unsqueeze(1)
        trip = Positions.of(physical, case.shares_RP, case.layout, transport).round(index, capacity, rows)
        trip.own_pairs = torch.nonzero(live).flatten()[trip.own_pairs]  # of all pairs, those without an expert included
        trips.append(trip)
    return trips


def expected_buffers(
    trips: list[Round], sources: list[Tensor], divisor: int, rows: int, gradient: bool
) -> list[Tensor]:
    """Every rank's buffer after `Round.to_experts`."""
    sent = [source[t.own_pairs // divisor].split(t.send) for t, source in zip(trips, sources, strict=True)]
    buffers = []
    for d, trip in enumerate(trips):
        arrived = torch.cat([pieces[d] for pieces in sent])
        buffer = arrived.new_zeros(rows, *arrived.shape[1:])
        buffer[trip.arrived_rows] = arrived
        if not gradient:
            buffer[trip.padding_rows] = buffer[trip.repeated_rows]
        buffers.append(buffer)
    return buffers


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """What no kernel may read or leave where a row belongs: NaN, or the byte 0x5a."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, 0x5A, dtype=dtype, device=device)


def random_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(rows, width, generator=g).to(dtype)
    return torch.randint(0, 255, (rows, width), generator=g).to(dtype)


def check_dispatch(
    case: TokenCase, device: str, width: int, dtype: torch.dtype, capacity: int = EVERYTHING, programs: int | None = None
) -> None:  # fmt: skip
    """Buffers, and what comes back, bit for bit as `ops.dispatch` has them, for tokens and for gradients."""
    layout, ranks = case.layout, case.layout.ranks
    most = int(case.shares_RP.sum(0).view(ranks, -1).sum(1).max())
    rounds = 1 if capacity >= EVERYTHING else max(1, -(-most // capacity))
    rows = buffer_rows(min(capacity, most), layout, 1)
    routings = [rerouted(case, r, device, capacity, once_per_rank=True) for r in range(ranks)]
    choices = case.ids_RTK[0].shape[1]
    tokens = [random_rows(len(i), width, dtype, r) for r, i in enumerate(case.ids_RTK)]
    pairs = [random_rows(i.numel(), width, dtype, 50 + r) for r, i in enumerate(case.ids_RTK)]
    out = [poison((i.numel(), width), dtype, device) for i in case.ids_RTK]
    for index in range(rounds):
        windows = [window(case.shares_RP.to(device), layout, r, capacity, index) for r in range(ranks)]
        trips = expected_rounds(case, routings, capacity, index, rows)
        for kind in ("tokens", "tokens once", "pairs"):
            sources, divisor = (pairs, 1) if kind == "pairs" else (tokens, choices)
            gradient, once = kind == "pairs", kind == "tokens once"
            buffers = [poison((rows, width), dtype, device) for _ in range(ranks)]
            references = [poison((rows,), torch.int32, device) for _ in range(ranks)] if once else None
            for r in range(ranks):
                push_rows(
                    sources[r].to(device), routings[r], buffers, rows, layout, references=references,
                    window=windows[r], gradient=gradient, programs=programs,
                )  # fmt: skip
            for r in range(ranks):
                if references is not None:
                    spread_rows(buffers[r], references[r], windows[r], programs)
                assert torch.equal(windows[r].offsets.cpu(), trips[r].offsets)
                used = int(windows[r].offsets[-1])
                behind = poison((rows - used, width), dtype, "cpu")
                assert torch.equal(as_bytes(buffers[r][used:]), as_bytes(behind))
                clear_rows(buffers[r], windows[r], programs)
            right = expected_buffers(trips, sources, divisor, rows, gradient)
            for got, expected in zip(buffers, right, strict=True):
                assert torch.equal(as_bytes(got), as_bytes(expected)), kind
        for r in range(ranks):  # the buffers of `pairs` come back
            pull_rows(out[r], routings[r], buffers, rows, layout, window=windows[r], programs=programs)
            alone = poison(tuple(out[r].shape), dtype, device)
            pull_rows(alone, routings[r], buffers, rows, layout, window=windows[r], zero_rest=True, programs=programs)
            travelled = torch.zeros(len(pairs[r]), 1, dtype=torch.bool)
            travelled[trips[r].own_pairs] = True
            assert torch.equal(as_bytes(alone), as_bytes(torch.where(travelled, pairs[r], torch.zeros_like(pairs[r]))))
    for r, got in enumerate(out):
        live = case.ids_RTK[r].flatten() >= 0
        untouched = poison(tuple(got.shape), dtype, "cpu")
        assert torch.equal(as_bytes(got), as_bytes(torch.where(live.unsqueeze(1), pairs[r], untouched)))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def check_wire(device: str, rows: int, width: int, dtype: torch.dtype, seed: int, programs: int | None = None) -> None:
    """Packing bit for bit as the reference, errors within what `wire` promises, all of it there and back."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=g) * 2.0 ** torch.randint(-20, 12, (rows, 1), generator=g)).to(dtype)
    x[:, : width // 3] *= 1e-5
    x[0] = 0
    if rows > 2:
        x[1, 0], x[2, width - 1] = float("inf"), float("nan")
    wire = pack_rows(x.to(device), programs)
    expected = pack_rows_reference(x)
    blocks = -(-width // SCALED)
    for part in (slice(0, width), slice(scales_at(width), scales_at(width) + 4 * blocks)):
        same = wire[:, part].cpu() == expected[:, part]
        assert bool(
            (same | ((wire[:, part].cpu() & 127) == 127) & ((expected[:, part] & 127) == 127)).all()
        )  # NaN: any sign
    back = unpack_rows(wire, poison(tuple(x.shape), dtype, device), None, programs).cpu()
    assert torch.equal(back.isfinite(), x.isfinite()) and back.dtype == dtype
    scale = expected[:, scales_at(width) :][:, : 4 * blocks].contiguous().view(torch.float32)
    scale = scale.repeat_interleave(SCALED, 1)[:, :width]
    error = (unpack_rows_reference(expected, width, torch.float32) - x.float()).abs()
    bound = torch.maximum(x.float().abs() * 2**-4, scale * 2**-10)
    assert bool((error <= bound)[x.isfinite()].all())
    assert torch.equal(back[x.isfinite()], unpack_rows_reference(expected, width, dtype)[x.isfinite()])


def check_packed_trip(case: TokenCase, device: str, width: int, capacity: int = EVERYTHING) -> None:
    """Rows packed, pushed, unpacked into buffers; results packed and pulled: as rows that never left."""
    layout, ranks = case.layout, case.layout.ranks
    rows = buffer_rows(int(case.shares_RP.sum(0).view(ranks, -1).sum(1).max()), layout, 1)
    routings = [rerouted(case, r, device) for r in range(ranks)]
    packed = [poison((rows, packed_bytes(width)), torch.uint8, device) for _ in range(ranks)]
    tokens = [random_rows(len(i), width, torch.bfloat16, r) for r, i in enumerate(case.ids_RTK)]
    for r in range(ranks):
        push_rows(pack_rows(tokens[r].to(device)), routings[r], packed, rows, layout)
    for r in range(ranks):
        window_ = routings[r].window
        buffer = unpack_rows(packed[r], poison((rows, width), torch.bfloat16, device), window_)
        used = int(window_.offsets[-1])
        assert bool(buffer[:used].isfinite().all()) and bool(buffer[used:].isnan().all())
    for r in range(ranks):
        live = case.ids_RTK[r].flatten() >= 0
        out = poison((live.numel(), width), torch.bfloat16, device)
        pull_rows(out, routings[r], packed, rows, layout, packed=True, zero_rest=True)
        right = unpack_rows_reference(pack_rows_reference(tokens[r]), width, torch.bfloat16)
        right = right.repeat_interleave(case.ids_RTK[r].shape[1], 0)
        assert torch.equal(out.cpu(), torch.where(live.unsqueeze(1), right, 0))


def check_sum(case: TokenCase, device: str, width: int, dtype: torch.dtype) -> None:
    """The fused sum, bit for bit as the products and sums one after the other."""
    layout, ranks = case.layout, case.layout.ranks
    rows = buffer_rows(int(case.shares_RP.sum(0).view(ranks, -1).sum(1).max()), layout, 1)
    routings = [rerouted(case, r, device) for r in range(ranks)]
    buffers = [poison((rows, width), dtype, device) for _ in range(ranks)]
    pairs = [random_rows(i.numel(), width, dtype, 9 + r) for r, i in enumerate(case.ids_RTK)]
    for r in range(ranks):
        push_rows(pairs[r].to(device), routings[r], buffers, rows, layout)
    for r, ids in enumerate(case.ids_RTK):
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(r))
        row = torch.where((ids >= 0).unsqueeze(2), pairs[r].view(*ids.shape, width), 0).float()
        for weight in (weights, None):
            out = poison((len(ids), width), dtype, device)
            pull_sum(out, routings[r], buffers, rows, layout, None if weight is None else weight.to(device))
            right = torch.zeros(len(ids), width)
            for k in range(ids.shape[1]):
                right += row[:, k] if weight is None else row[:, k] * weight[:, k : k + 1]
            assert torch.equal(out.cpu(), right.to(dtype))
        arrived = row.to(dtype).to(device).flatten(0, 1)
        assert torch.equal(sum_choices(arrived, ids.shape[1]).cpu(), right.to(dtype))
