"""Lift the experts of one module: record, find the experts, write the new forward, prove it equal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, fx, nn

from ultraep_compile.ladder.analysis import Analysis, analyse, cut_at, is_full, stays_full, unreached_bound
from ultraep_compile.ladder.check import SEEDS, agrees_when_planted, check, in_mode
from ultraep_compile.ladder.divided import whole
from ultraep_compile.ladder.gating import Around, gating_of
from ultraep_compile.ladder.groups import Siblings, siblings, with_lists_beside
from ultraep_compile.ladder.guards import Reads
from ultraep_compile.ladder.install import LayerFacts, Lift, LiftedLayer, Pattern
from ultraep_compile.ladder.lifted import caller, reference_caller
from ultraep_compile.ladder.probes import deviation, main_input, more_leads, probe_leads, resized, small
from ultraep_compile.ladder.recording import Call, Recording, record
from ultraep_compile.ladder.regions import (
    ALL,
    between_exchanges,
    find_parts,
    multiplied_after_selection,
    numbers_read,
)
from ultraep_compile.ladder.repeated import are_distinct, place_of_ids, plant
from ultraep_compile.ladder.replay import Replay
from ultraep_compile.ladder.routing import Missed, Unbalanceable
from ultraep_compile.ladder.sources import Sources, common_sources, sources
from ultraep_compile.ladder.standing import hooked_module
from ultraep_compile.ladder.together import ALONE, Ranks, is_dispatch, local
from ultraep_compile.passes.lift.called import LiftedExperts
from ultraep_compile.passes.lift.values import Refusal

log = logging.getLogger(__name__)
_LARGE = 2.0
"""Standard deviation of token states above which they are also recorded small."""


def lift_layer(
    owner: nn.Module,
    name: str,
    call: Call,
    group: Siblings | None,
    ranks: Ranks = ALONE,
    around: Around = (),
) -> LiftedLayer:
    """New forwards for a module that contains experts.

    Args:
        call: one real call of the module.
        around: modules around it in which the router may be, innermost first.
        group: the sibling modules that are its experts, with paths inside the module; None where parameters hold them.
        ranks: the processes that this layer's own exchanges join, each with experts of its own. All of them come here.
    Raises: Refusal with the reason, Unbalanceable where the loads are equal by construction.
    """
    if "forward" in vars(owner):
        raise Refusal("its forward was replaced on the instance")
    pattern = Pattern.of(owner, call)
    with in_mode(owner, owner.training):
        first = _lift(owner, name, call, group, ranks, around)
    layer = LiftedLayer(first.facts, {owner.training: first}, pattern, small(call), group, ranks)
    try:
        with in_mode(owner, not owner.training):
            other = _lift(owner, name, call, group, ranks, around)
    except Refusal as reason:
        log.info("%s stays as it is with training=%s: %s", name, not owner.training, reason)
    else:
        layer.lifts[not owner.training] = other
        for facts in (first.facts, other.facts):
            facts.lead = first.facts.lead or other.facts.lead
            facts.inference = first.facts.inference or other.facts.inference
            facts.dynamic = first.facts.dynamic or other.facts.dynamic
            facts.most = min((m for m in (first.facts.most, other.facts.most) if m is not None), default=None)
    return layer


def lift_again(
    owner: nn.Module, name: str, layer: LiftedLayer, kinds: tuple[torch.dtype, ...]
) -> tuple[Lift | None, Reads, str]:
    """A new forward of a lifted module in the state that it is in now, what that reads, and why there is none.

    Args:
        kinds: dtypes of the tensors that its forward is given.
    """
    given = [t.to(k) for t, k in zip(layer.call.tensors(), kinds, strict=False)]
    call = layer.call.with_tensors([t.to(_device_of(owner, t)) for t in given])
    with whole(owner):
        try:
            lift = _lift(owner, name, call, _group_now(owner, layer.group), layer.ranks)
        except Refusal as reason:
            reads = Reads(owner)
            with contextlib.suppress(Refusal):
                record(owner, resized(call, tuple(main_input(call).shape[:-1]), 0), {}, reads=reads)
            return None, reads, str(reason)
    return lift, lift.reads, ""


def _device_of(owner: nn.Module, tensor: Tensor) -> torch.device:
    return next((p.device for p in owner.parameters()), tensor.device)


def _group_now(owner: nn.Module, before: Siblings | None) -> Siblings | None:
    """The experts that stand where others stood: some may have come or gone, or have other parameters."""
    if before is None or before.container not in dict(owner.named_modules()):
        return before
    now = [g for g in siblings(owner) if g.container == before.container]
    return max(now, key=lambda g: len(set(g.names) & set(before.names)), default=before)


def _lift(
    owner: nn.Module, name: str, call: Call, group: Siblings | None, ranks: Ranks, around: Around = ()
) -> Lift:
    leads = ranks.every(probe_leads(call, (len(group.names) if group else _leading(owner)) * ranks.size))[0]
    problem: Refusal | None = None
    plain = [dataclasses.replace(way, around=around) for way in _ways(owner, call, group, leads[0], ranks)]
    ways = [(way, 1.0) for way in plain]
    if (large := max(ranks.every(deviation(call)))) > _LARGE:  # a router that is sure of itself has weights too small to be measured
        ways.append((plain[0], 0.1 / large))
    for way, gain in ways:
        try:
            return _attempt(owner, name, call, way, leads, ranks, gain)
        except Unbalanceable:
            raise
        except Refusal as reason:
            if problem is None or isinstance(reason, Missed):
                problem = reason
    assert problem is not None
    if isinstance(problem, Missed):  # perhaps Python computes with sizes: more of them show how
        with contextlib.suppress(Refusal):
            return _attempt(owner, name, call, plain[0], leads, ranks, more=more_leads(call))
    if isinstance(problem, Missed) and ranks.size == 1:  # sizes that Python computes: good for the numbers of tokens that were seen
        own = tuple(main_input(call).shape[:-1])
        with contextlib.suppress(Refusal):
            lift = _attempt(owner, name, call, plain[0], [own] * 4, ranks)
            lift.facts.lead = own
            return lift
    if isinstance(problem, Missed) and ranks.size == 1 and (why := _capacity_of(owner, call, leads)):
        raise Missed(why) from problem
    raise problem


def _capacity_of(owner: nn.Module, call: Call, leads: list[tuple[int, ...]]) -> str:
    """Why a layer cannot be lifted whose capacity only Python makes: where experts keep some of their rows and drop the rest."""
    for lead in (leads[-1], leads[0]):
        with contextlib.suppress(Refusal):
            if (cut := cut_at(record(owner, resized(call, lead, 0, skewed=True), {}))) is not None:
                return (
                    f"it has a capacity that only Python shows: an expert computes the first {cut[0]} of its tokens and drops the others "
                    f"({cut[1]}). Drop them by a mask of the routing weights (a running count of each expert's tokens, compared with the "
                    "capacity), or leave the capacity out: balanced experts need none"
                )
    return ""


@dataclass(frozen=True, slots=True)
class _Way:
    """What a recording is to take for experts' tensors, and which modules are one node each."""

    owned: dict[str, tuple[str, int]]
    """Parameter -> (role, expert); empty where experts are blocks of parameters."""
    count: int
    leaves: dict[nn.Module, str]
    around: Around = ()
    """Modules around, in which the router may be."""


def _ways(owner: nn.Module, call: Call, group: Siblings | None, lead: tuple[int, ...], ranks: Ranks) -> list[_Way]:
    """The likeliest first. A single expert of a rank has no like beside it: it is what meets the rows of other ranks."""
    if group is not None or ranks.size == 1:
        owned = group.parameters() if group else {}
        holders = [(owned, len(group.names) if group else 0, set(owned))]
        if group and (whole := with_lists_beside(owner, group)):
            owned = whole.parameters()
            holders.append((owned, len(group.names), set(owned)))
    else:
        inside = between_exchanges(record(owner, resized(call, lead, 0, rank=ranks.rank), {}))
        alone = {name: (name, 0) for name in sorted(inside)}
        stacked = any(local(owner.get_parameter(n)).dim() >= 3 for n in inside if n in dict(owner.named_parameters()))
        holders = [({}, 0, inside), (alone, 1, inside)] if stacked else [(alone, 1, inside)]
    ways = []
    for owned, count, inside in holders:
        outermost = _leaves(owner, inside)
        ways += [_Way(owned, count, outermost), *([_Way(owned, count, {})] if outermost else [])]
    return ways


def _attempt(
    owner, name, call, way: _Way, leads, ranks: Ranks, gain=1.0, more=()
) -> Lift:
    recorded = [*leads[:2], *more]
    reads = Reads(owner, way.leaves.values())
    recordings = [
        record(owner, resized(call, lead, seed, gain=gain, rank=ranks.rank), way.leaves, reads=reads)
        for seed, lead in enumerate(recorded)
    ]
    first = recordings[0]
    _judge_exchanges(first, ranks)
    parts = ranks.agreed(lambda: find_parts(first, way.owned, way.count))
    if len(held := set(ranks.every(parts.experts))) > 1:
        raise Missed(f"its ranks hold different numbers of experts ({sorted(held)})")
    tokens = math.prod(leads[0])
    problem: Refusal | None = None
    for found in analyse(first, parts, tokens, ranks):
        try:
            if why := reads.writes(exchanging=ranks.size > 1):
                raise Missed(why)
            made = _with_sources(owner, name, call, way, recordings, found, [*leads[:-1], *more[:2], leads[-1]], ranks, reads)
            return Lift(*made, reads)
        except Refusal as reason:
            problem = problem if isinstance(problem, Unbalanceable) else problem or reason
    assert problem is not None
    raise problem


def not_by_all_to_all(name: str, ranks: int) -> str:
    return (
        f"it is expert-parallel already: its forward exchanges rows by {name} over {ranks} ranks, and only all-to-all can be "
        "replaced. Build it over one rank, or leave the balance to its own dispatcher"
    )


def _judge_exchanges(recording: Recording, ranks: Ranks) -> None:
    """Do the layer's exchanges join the ranks that are looking at it, and no others?"""
    over = [(n, g) for n, g in recording.exchanges if is_dispatch(n)]
    if ranks.size == 1 and recording.exchanges:
        name, group = recording.exchanges[0]
        raise Unbalanceable(not_by_all_to_all(name, group.size()))
    if ranks.size > 1 and not over:
        raise Refusal("its rows are exchanged with other ranks around it, not in its forward")
    if len({g.group_name for _, g in over}) > 1:
        raise Missed(
            f"it exchanges rows over {len({g.group_name for _, g in over})} different groups. Experts of one layer are balanced over "
            "one group: exchange over a single flat group"
        )


def _with_sources(
    owner, name, call, way: _Way, recordings, found: Analysis, leads, ranks: Ranks, reads: Reads
) -> tuple[Callable, str, LayerFacts]:
    parts = found.parts
    problem: Refusal = Missed("no recorded tensor holds the experts' ids or weights for each token")
    ways = sources(recordings[0], parts, found.routing, parts.experts * ranks.size, found.weights)
    if ranks.size > 1:
        here = ways
        ways = common_sources(ranks.agreed(lambda: list(here)), recordings[0], parts, ranks)
    bounded = None
    for source in ways:
        try:
            function, text, facts = _written(owner, name, call, recordings, found, source, leads, ranks, way.around, reads)
        except Refusal as reason:
            problem = Missed(str(reason))
            continue
        if all(most is None for most in ranks.every(facts.most)):
            return function, text, facts
        bounded = bounded or (function, text, facts)
    if bounded is not None and ranks.size > 1:  # ranks must not part at a number of tokens
        raise Missed(
            f"it has a bound of {bounded[2].most} rows that no probe came to. Call prepare with a batch of at least so many tokens a rank"
        )
    if bounded is not None:
        return bounded
    if ranks.size > 1 or not is_full(found.slots):
        raise problem
    skewed = record(owner, resized(call, leads[0], 0, skewed=True), way.leaves)
    if not stays_full(skewed, find_parts(skewed, way.owned, way.count), found.position):
        raise problem  # a capacity below every load of a usual batch
    if bool((found.routing.after != 0).all()) or all(len(o) == math.prod(leads[0]) for o in _tokens_of(found)):
        raise Unbalanceable(
            "every expert computes every token, and the weights of all of them count (if only for gradients): the loads are equal by "
            "construction, there is nothing to balance"
        )
    raise Unbalanceable(
        "every expert takes equally many tokens whatever the routing (experts choose tokens, not tokens experts): the loads are "
        "equal by construction, there is nothing to balance"
    )


def _tokens_of(found: Analysis) -> list[set[int]]:
    """Which tokens each expert was given."""
    return [set(found.routing.owner[found.slots.expert == e].tolist()) for e in range(found.parts.experts)]


def _written(
    owner, name, call, recordings, found: Analysis, way: Sources, leads, ranks: Ranks, around: Around, reads: Reads
) -> tuple[Callable, str, LayerFacts]:
    first = recordings[0]
    if ranks.size == 1 and (hooked := hooked_module(owner, itertools.chain(*found.parts.holders.values()))):
        raise Missed(f"{hooked} has hooks, which experts that are called together do not run. Register them on the layer, or remove them")
    experts = found.parts.experts * ranks.size
    form = "together" if ALL in found.parts.present else "one by one"
    source = next((n.meta["source"] for n in first.graph.nodes if found.parts.label[n] and n.meta.get("source")), "")
    gating = gating_of(first, way.ids, way.weight, experts, around if ranks.size == 1 else ())
    place = ".".join(p for p in (name, _common_path(found)) if p) or type(owner).__name__
    lifted = LiftedExperts(found.rows.module, experts, found.scaled, source, gating, place, reads.told())

    dtype = first.raw[found.rows.rows].dtype
    dynamic = ""

    def replay(rows: Callable, way: Sources, planted: tuple | None = None) -> Replay:
        return Replay(
            recordings, found.parts, found.routing, way, found.rows, found.scaled, rows, experts, planted, found.static
        )

    def balanced(way: Sources, planted: tuple | None = None) -> tuple[Callable, str, int | None]:
        _refuse_shared(first, found.rows.consts, ranks)
        params = [_stacked_like(owner, found, role) for role in found.rows.roles]
        consts = [first.raw[c].detach() for c in found.rows.consts]
        weight = first.raw[way.weight] if found.scaled and way.weight is not None else None
        hidden = first.raw[found.routing.table].flatten(0, -2).to(dtype)
        nonlocal dynamic
        made = replay(
            caller(name or "model", lifted, hidden, weight, params, consts, ranks.name, ranks.size), way, planted
        )
        function = made.function()
        dynamic = made.dynamic
        most = max(math.prod(leads[0]), math.prod(leads[-1]))  # sizes of skewed probes, see `check`
        return function, made.source, unreached_bound(recordings, found.parts, made.wanted, most)

    if ranks.size == 1:
        plain = reference_caller(lifted)
        made = replay(plain, way)
        try:
            inference = check(owner, made.function(), call, leads, dtype=dtype)
        except Refusal:
            if not made.static:
                raise
            found.static = False  # counts of the data that mean something else where an expert has no rows
            made = replay(plain, way)
            inference = check(owner, made.function(), call, leads, dtype=dtype)
        way = _told_of_repeats(owner, first, found, way, lambda *a: replay(plain, *a).function(), ranks, dtype)
        function, text, most = balanced(way)
    else:  # nobody has all experts: what is checked is what will run
        function, text, most = ranks.agreed(lambda: balanced(way))
        inference = check(owner, function, call, leads, ranks=ranks, dtype=dtype)
        told = _told_of_repeats(owner, first, found, way, lambda *a: ranks.agreed(lambda: balanced(*a)[0]), ranks, dtype)
        if told is not way:
            function, text, most = ranks.agreed(lambda: balanced(told))
    holders = tuple(tuple(found.parts.holders[role]) for role in found.rows.roles)
    counted = way.ids_form == "sizes"
    facts = LayerFacts(
        experts, way.choices, holders, form, counted, source, most=most, ranks=ranks.size, dtype=dtype, gating=gating,
        inference=inference, dynamic=dynamic, caller=_callers_choice(first, found, way),
    )  # fmt: skip
    return function, text, facts


def _callers_choice(recording: Recording, found: Analysis, way: Sources) -> int | None:
    """Which input of the module names the one expert of each token, where nothing weighs it; None where something routes."""
    if way.ids is None or way.weight is not None or way.choices > 1 or found.routing.skip is not None or way.ids_form == "sizes":
        return None
    place = place_of_ids(recording, way.ids)
    return recording.inputs.index(place) if place in recording.inputs else None


def _told_of_repeats(
    owner: nn.Module,
    recording: Recording,
    found: Analysis,
    way: Sources,
    write: Callable[[Sources, tuple], Callable],
    ranks: Ranks,
    dtype: torch.dtype,
) -> Sources:
    """Sources that say what becomes of an expert that a token names twice, as the module's own forward shows it.

    Args:
        write: the new forward by some sources, with something planted.
    """
    tokens = math.prod(recording.raw[found.routing.table].shape[:-1])
    rows = tokens if way.ids is None or way.ids_form != "samples" else recording.raw[way.ids].numel() // way.choices
    proven = way.ids is None or way.choices == 1 or are_distinct(recording, way.ids, rows, way.choices)
    if all(ranks.every(proven)):
        return way
    assert way.ids is not None
    place = place_of_ids(recording, way.ids)
    value = recording.raw[place]
    whole = value.numel() == rows * way.choices and not value.is_floating_point() and value.dtype != torch.bool
    if all(ranks.every(whole and place.op != "get_attr")):
        change = functools.partial(plant, rows=rows, choices=way.choices)
        for kind in ("", "once"):
            told = dataclasses.replace(way, repeats=kind)
            function = write(told, (place, plant, rows, way.choices))
            if agrees_when_planted(owner, function, recording, (place.meta["turn"], change), ranks, dtype):
                return told
    return dataclasses.replace(way, repeats="never")


def _refuse_shared(recording: Recording, consts: list[fx.Node], ranks: Ranks) -> None:
    """What experts share besides their own weights is trained where their rows are computed: elsewhere, once balanced."""
    trained = [n for n in consts if recording.raw[n].requires_grad]
    if ranks.size > 1 and trained:
        raise Missed(f"{trained[0].target} is trained and read by all experts, and each rank has one of its own. Freeze it")


def _common_path(found: Analysis) -> str:
    """The innermost module that holds all experts."""
    paths = [n.split(".")[:-1] for role in found.rows.roles for n in found.parts.holders[role]]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _stacked_like(owner: nn.Module, found: Analysis, role: str) -> Tensor:
    parameter = local(owner.get_parameter(found.parts.holders[role][0]))
    shape = (found.parts.experts, *found.rows.layouts[role])
    return torch.empty(shape, dtype=parameter.dtype, device="meta")


def _leading(owner: nn.Module) -> int:
    sizes = [local(p).shape[0] for p in owner.parameters() if p.dim() >= 3]
    return max(set(sizes), key=sizes.count) if sizes else 8


def _leaves(owner: nn.Module, inside: set[str]) -> dict[nn.Module, str]:
    """Outermost modules inside that hold no expert: routers, shared experts, norms. `inside`: experts' parameters, if known."""
    found: dict[nn.Module, str] = {}
    for path, module in owner.named_modules():
        if not path or any(path.startswith(f"{other}.") for other in found.values()):
            continue
        own = {f"{path}.{n}" for n, _ in module.named_parameters()}
        if not own:
            continue  # activations, dropout: cheap to look into, and experts have them
        holds = bool(own & inside) if inside else any(p.dim() >= 3 or _is_flat(module) for p in module.parameters())
        container = type(module) in (nn.ModuleList, nn.ModuleDict)
        if not holds and not container and not any(m in found for m in module.modules()):
            found[module] = path
    return found


def _is_flat(module: nn.Module) -> bool:
    return any(
        not type(m).__module__.startswith("torch.nn.") and len([p for p in m.parameters(recurse=False) if p.dim() >= 2]) >= 2
        for m in module.modules()
    )


def recheck(owner: nn.Module, layer: LiftedLayer, call: Call, ranks: Ranks = ALONE) -> list[tuple[Lift, Reads]]:
    """The check of `lift_layer` for another module of the same make: its forwards, each with what this module reads."""
    assert layer.facts.experts is not None
    leads = ranks.every(probe_leads(call, layer.facts.experts))[0]
    states = []
    for training, lift in layer.lifts.items():
        with in_mode(owner, training):
            modules = dict(owner.named_modules())
            reads = Reads(owner, lift.reads.around)
            record(owner, resized(call, leads[0], 0, rank=ranks.rank), {modules[p]: p for p in reads.around}, reads=reads)
            if why := reads.writes(exchanging=ranks.size > 1):
                raise Missed(why)
            check(owner, lift.function, call, leads, seeds=SEEDS[:1], ranks=ranks, dtype=lift.facts.dtype)
        states.append((lift, reads))
    return states


def routed_product(owner: nn.Module, call: Call, parameters: set[str]) -> str:
    """Where a module multiplies stacked parameters with what a selection gave, "" if nowhere: a layer that must not be lost."""
    own = tuple(main_input(call).shape[:-1])
    node = multiplied_after_selection(record(owner, resized(call, own, 0), {}), parameters)
    return "" if node is None else node.meta.get("source") or str(node.target)


def rows_follow_data(owner: nn.Module, call: Call, group: Siblings) -> bool:
    """Do other tokens, as many, come to the siblings in other shares?"""
    held = group.parameters()
    own = tuple(main_input(call).shape[:-1])
    counts = [numbers_read(record(owner, resized(call, own, seed), {}), held) for seed in range(3)]
    shares = [{e: Fraction(n, sum(found.values())) for e, n in found.items() if n} for found in counts]
    return any(share != shares[0] for share in shares)


def meets_rows_of_others(owner: nn.Module, call: Call, parameters: set[str], ranks: Ranks) -> bool:
    """Do these parameters, or any if there are none, stand between an exchange of rows with other ranks and another one?"""
    lead = ranks.every(tuple(main_input(call).shape[:-1]))[0]
    found: set[str] = set()
    with contextlib.suppress(Refusal):  # what hooks around it exchange is no call of its own that could be repeated
        found = between_exchanges(record(owner, resized(call, lead, 0, rank=ranks.rank), {}))
    return any(ranks.every(bool(found & parameters if parameters else found)))
