"""What one recorded forward says of its experts: their regions, row function, slots and routing, and where weights are used."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ultraep_compile.ladder.recording import Recording
from ultraep_compile.ladder.regions import ALL, Parts, Region, code_of, ends_of, region_to, row_count
from ultraep_compile.ladder.routing import Missed, Routing, Slots, Unbalanceable, judge, measure
from ultraep_compile.ladder.rows import RowFunction, ends_of_groups, row_function
from ultraep_compile.ladder.together import Ranks
from ultraep_compile.passes.lift.nodes import op_name
from ultraep_compile.passes.lift.values import Refusal


@dataclass(slots=True)
class Analysis:
    """One way to understand a recording."""

    parts: Parts
    routing: Routing
    slots: Slots
    rows: RowFunction
    scaled: bool
    weights: Tensor
    static: bool = True
    """Counts that the forward makes of ids may be written in a size that does not depend on the data."""
    position: int = 0
    """Which of the tensors that all of an expert passes through is taken for its end."""


def analyse(recording: Recording, parts: Parts, tokens: int, ranks: Ranks) -> list[Analysis]:
    """Regions, the cut where the experts' output stands, slots, tokens and factors."""
    present = sorted(parts.present)

    def ends_of_all() -> dict[int, list[list[fx.Node]]]:
        if not present or (ALL not in present and len(present) < 2 and ranks.size == 1):
            raise Refusal(f"{len(present)} experts ran on the probe batch, expected several")
        return {e: ends_of(recording, parts, e) for e in present}

    ends = ranks.agreed(ends_of_all)
    problem = Refusal("its experts' computations end in no common tensor")
    for position in range(min(ranks.every(min(map(len, itertools.chain(*ends.values())))))):
        try:
            found = _cut_at(recording, parts, tokens, _at(ends, position), ranks)
            return [dataclasses.replace(f, position=position) for f in found]
        except Unbalanceable:
            raise
        except Refusal as reason:
            if position == 0 or (isinstance(reason, Missed) and not isinstance(problem, Missed)):
                problem = reason
    counts = {sum(row_count(recording.raw[call[0]]) for call in calls) for calls in ends.values() if all(calls)}
    raise problem if max(ranks.every(len(counts))) < 2 else Missed(str(problem))  # uneven numbers of rows: they are routed


def _at(ends: dict[int, list[list[fx.Node]]], position: int) -> list[tuple[int, fx.Node]]:
    """(expert, the tensor that ends it) of every call of every expert."""
    return [(expert, call[position]) for expert, calls in ends.items() for call in calls]


def _cut_at(
    recording: Recording, parts: Parts, tokens: int, ends: list[tuple[int, fx.Node]], ranks: Ranks
) -> list[Analysis]:
    regions, plain, slots = ranks.agreed(lambda: _cut(recording, parts, ends, ranks))
    slots = slots.of_all(ranks, parts.experts)
    experts = parts.experts * ranks.size
    try:
        routings = measure(recording, parts, tokens, slots, experts, ranks)
    except Unbalanceable:
        raise
    except Refusal as reason:
        raise reason if slots.fixed else Missed(str(reason)) from reason  # uneven numbers of rows: they are routed
    ranks.agreed(lambda: judge(recording, routings[0]))
    found = [_weighed(recording, parts, regions[0], plain[0], slots, r, ranks) for r in routings]
    if len(set(ranks.every(found[0].rows.module.code))) > 1:
        raise Missed("experts of different ranks do not compute the same with their weights")
    return found


def _cut(
    recording: Recording, parts: Parts, ends: list[tuple[int, fx.Node]], ranks: Ranks
) -> tuple[list[Region], list[RowFunction], Slots]:
    regions = [region_to(recording, parts, e, end) for e, end in ends]
    codes = [code_of(recording, parts, r, row_count(recording.raw[r.end])) for r in regions]
    if len(set(codes)) > 1:
        other = next(r for r, code in zip(regions, codes, strict=True) if code != codes[0])
        raise Refusal(f"experts {regions[0].expert} and {other.expert} do not compute the same with their weights")
    plain = [row_function(recording, parts, r, scaled=False) for r in regions]
    return regions, plain, _slots(recording, parts, regions, plain, ranks)


def is_full(slots: Slots) -> bool:
    """Every expert has equally many rows, and all of them hold something."""
    return slots.fixed and bool((slots.inputs != 0).any(1).all())


def stays_full(recording: Recording, parts: Parts, position: int) -> bool:
    """The same of a recording whose tokens all go the same way: a capacity that any usual batch fills shows itself here."""
    if ALL not in parts.present and len(parts.present) != parts.experts:
        return False
    try:
        ends = {e: ends_of(recording, parts, e) for e in parts.present}
        return is_full(_cut(recording, parts, _at(ends, position), Ranks())[2])
    except (Refusal, IndexError):
        return False


def _weighed(
    recording: Recording, parts: Parts, region: Region, rows: RowFunction, slots: Slots, routing: Routing, ranks: Ranks
) -> Analysis:
    """Where the routing weights are used: on rows before the experts, inside, or on what comes out."""
    before, after, sent = routing.before, routing.after, routing.sent
    weighs_before = any(ranks.every(bool(((before[sent] - 1).abs() > 1e-4).any())))
    weighs_after = any(ranks.every(bool(((after[sent] - 1).abs() > 1e-4).any())))
    if weighs_before + weighs_after + (rows.weight is not None) > 1:
        raise Refusal("rows are weighted twice, before and after the experts")
    if weighs_before:
        return Analysis(parts, routing, slots, row_function(recording, parts, region, scaled=True), True, before)
    if rows.weight is not None:
        assert slots.inner is not None
        inner, live = torch.zeros_like(before), routing.owner >= 0
        inner[routing.owner[live], slots.expert[live]] = slots.inner.double()[live]
        return Analysis(parts, routing, slots, rows, True, inner)
    return Analysis(parts, routing, slots, rows, False, after)


def _slots(
    recording: Recording, parts: Parts, regions: list[Region], functions: list[RowFunction], ranks: Ranks
) -> Slots:
    inputs, outputs, experts, inner = [], [], [], []
    counts: Counter[int] = Counter()
    for region, function in zip(regions, functions, strict=True):
        x, y = recording.values[function.rows], recording.values[region.end]
        n = row_count(y)
        ends = ends_of_groups(region)
        if ends:
            last = recording.values[next(iter(ends))].long()
            n = int(last[-1])  # what is behind belongs to no expert
            number = torch.searchsorted(last, torch.arange(n), right=True)
        elif region.expert == ALL:
            depth = len(parts.lead)
            axis = [d for d in range(x.dim() - depth) if tuple(x.shape[d : d + depth]) == parts.lead]
            if not axis:
                raise Refusal(f"the experts' input {list(x.shape)} has no dims of {' x '.join(map(str, parts.lead))} experts")
            shape = [1] * (x.dim() - 1)
            shape[axis[0] : axis[0] + depth] = parts.lead
            number = torch.arange(parts.experts).view(shape).expand(x.shape[:-1]).reshape(-1)
        else:
            number = torch.full((n,), region.expert)
        counts[region.expert] += n
        if function.weight is not None:
            inner.append(recording.values[function.weight].reshape(-1)[:n])
        inputs.append(x.reshape(-1, x.shape[-1])[:n])
        outputs.append(y.reshape(-1, y.shape[-1])[:n])
        experts.append(number)
    fixed = ALL in counts or (len(set(counts.values())) == 1 and len(counts) == parts.experts)
    fixed = fixed and not any(map(ends_of_groups, regions))
    mixed = ranks.size == 1 and _mixes_tokens(recording, recording.raw[functions[0].rows])
    return Slots(torch.cat(inputs), torch.cat(outputs), torch.cat(experts), torch.cat(inner) if inner else None, fixed, mixed)


def _mixes_tokens(recording: Recording, rows: Tensor) -> bool:
    """Does one row of the experts' input depend on several tokens, however they were routed?"""
    states = next((recording.raw[n] for n in recording.inputs if recording.raw[n].is_floating_point()), None)
    if states is None or not rows.numel() or not rows.requires_grad or not states.requires_grad:
        return False
    row = rows.reshape(row_count(rows), -1)[0]
    direction = torch.randn(row.shape, generator=torch.Generator().manual_seed(0)).to(row)
    (grad,) = torch.autograd.grad((row * direction).sum(), states, allow_unused=True, retain_graph=True)
    return grad is not None and int((grad.reshape(row_count(grad), -1) != 0).any(1).sum()) > 1


_BOUNDS = frozenset({"lt", "le", "gt", "ge", "clamp", "clamp_", "clip", "clamp_max", "getitem", "narrow"})


def unreached_bound(recordings: Sequence[Recording], parts: Parts, wanted: set[fx.Node], reached: int) -> int | None:
    """The least number, the same whatever the sizes and above `reached` tokens, that rows are compared with or cut at outside
    of the experts and of what is replayed: a capacity that no probe came to, so what happens beyond it was never seen.
    """

    def bounds(recording: Recording, of: Callable[[fx.Node], bool]) -> set[tuple[str, int]]:
        found = set()
        for node in recording.graph.nodes:
            if node.op.startswith("call") and op_name(node) in _BOUNDS and of(node):
                leaves: list[Any] = []
                map_aggregate((node.args, node.kwargs), leaves.append)
                leaves += [end for s in leaves if isinstance(s, slice) for end in (s.start, s.stop)]
                found |= {(op_name(node), n) for n in leaves if type(n) is int and n > reached}
        return found

    first = bounds(recordings[0], lambda n: n not in wanted and not parts.label[n])
    common = first.intersection(*(bounds(r, lambda n: True) for r in recordings[1:]))
    return min((n for _, n in common if n < _ENDLESS), default=None)


def cut_at(recording: Recording) -> tuple[int, str] | None:
    """(number, source line) where the forward keeps so many of a list of rows, made of what the data says, and drops the rest."""
    for node in recording.graph.nodes:
        given = node.args[0] if node.op.startswith("call") and node.args else None
        if not isinstance(given, fx.Node) or given not in recording.raw or node not in recording.raw:
            continue
        rows, kept = recording.raw[given], recording.raw[node]
        if rows.is_floating_point() or rows.dtype == torch.bool or not rows.dim() or not kept.dim() or len(kept) >= len(rows):
            continue
        index = node.args[1] if op_name(node) == "getitem" else None
        first = index[0] if isinstance(index, tuple) and index else index
        is_first = isinstance(first, slice) and not first.start and first.step in (None, 1) and type(first.stop) is int
        if (is_first or (op_name(node) == "narrow" and not node.args[1] and not node.args[2])) and _is_picked(given):
            return len(kept), node.meta.get("source", "")
    return None


def _is_picked(node: fx.Node) -> bool:
    """Does it hold places of rows whose number depends on the data (`where`, `nonzero`)?"""
    todo = [node]
    for _ in range(_STEPS):
        if not todo:
            return False
        at = todo.pop()
        if op_name(at) in ("nonzero", "where", "argwhere", "masked_select", "argsort", "sort", "topk", "randperm"):
            return op_name(at) not in ("sort", "argsort", "topk")
        todo += at.all_input_nodes if at.op.startswith("call") else []
    return False


_STEPS = 12
_ENDLESS = 2**31 - 1
"""Numbers from here on mean that there is no bound."""
