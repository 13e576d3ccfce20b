"""Find everything in a model that holds experts, and bring each to a form that a compiler can see: rung by rung.

1. `traced`: the compiler's graph of the module shows its experts as they are.
2. `lifted`: it does not (a loop over experts, capacity buffers, dense products); the experts are lifted from a recorded
   eager forward and the module's forward is replaced under a compiler, after a check against eager.
3. `unbalanceable`, `missed`: reported with the reason.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ultraep_compile.ladder.calls import Calls, watch_chain, watch_exchanges
from ultraep_compile.ladder.equal_loads import equally_loaded, is_light
from ultraep_compile.ladder.gating import Around, gating_around
from ultraep_compile.ladder.groups import FEWEST, Siblings, like_layers, raw_owners, siblings, unlike_siblings
from ultraep_compile.ladder.install import LayerFacts, LiftedLayer, install, keep_counts, lifted_layer
from ultraep_compile.ladder.layer import (
    lift_layer,
    meets_rows_of_others,
    not_by_all_to_all,
    recheck,
    routed_product,
    rows_follow_data,
)
from ultraep_compile.ladder.lent import lent
from ultraep_compile.ladder.recording import Call
from ultraep_compile.ladder.routing import Missed, Unbalanceable
from ultraep_compile.ladder.together import Ranks
from ultraep_compile.ladder.unsharded import unsharded
from ultraep_compile.ops.alike import digest
from ultraep_compile.passes.lift import Site, find_moe_sites
from ultraep_compile.passes.lift.faults import internal_error, run_theirs
from ultraep_compile.passes.lift.values import Refusal
from ultraep_compile.passes.refused import allow, refuse

log = logging.getLogger(__name__)
_LEVELS = 3
"""How far above the experts the routing may stand."""
_MOST = 16
"""A layer's parameters, over those of its experts, at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One place with experts, or what looked like one."""

    path: str
    """Module whose forward contains routing and experts, or experts alone."""
    rung: str
    """`traced`, `lifted`, `unbalanceable` or `missed`."""
    reason: str
    parameters: tuple[str, ...]
    """Per-expert parameters, as in `named_parameters()`."""
    experts: int | None = None
    top_k: int | None = None
    source: str = ""
    gating: str = "unknown"
    """As the forwards around the experts show it; a graph that does not contain the router cannot."""
    inference: bool = False
    """Lifted for inference only: the module's own forward has no gradients."""


@dataclass(frozen=True, slots=True)
class Candidate:
    holder: str
    group: Siblings | None
    parameters: tuple[str, ...]
    stacked: bool
    alike: bool = True
    """The siblings have parameters of the same sizes."""


def candidates(model: nn.Module) -> list[Candidate]:
    """By structure; outermost first."""
    found = []
    for group in siblings(model):
        found.append(Candidate(group.container, group, tuple(group.parameters()), False))
    for group in unlike_siblings(model):
        found.append(Candidate(group.container, group, tuple(group.parameters()), False, alike=False))
    for path, module in raw_owners(model):
        own = {f"{path}.{n}" if path else n: p for n, p in module.named_parameters(recurse=False) if p.dim() >= 2}
        found.append(Candidate(path, None, tuple(own), any(p.dim() >= 3 and p.shape[0] >= FEWEST for p in own.values())))
    return found


def watched(model: nn.Module, found: list[Candidate]) -> Callable[[], Calls]:
    """Hook the modules in question; the function returned takes the hooks away and gives what they saw."""
    representatives: dict[tuple, str] = {}
    for candidate in found:
        representatives.setdefault(_kind(model, candidate), candidate.holder)
    wanted = {p for holder in representatives.values() for p in _upwards(holder)}
    calls, handles = Calls(wanted), []
    modules = dict(model.named_modules())
    exchanges = contextlib.ExitStack()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        exchanges.enter_context(watch_exchanges(modules, calls))

    def remember(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.first.setdefault(path, Call(args, dict(kwargs)))

        return hook

    for path in wanted:
        handles.append(modules[path].register_forward_pre_hook(remember(path), with_kwargs=True))
    for candidate in found:
        if candidate.group:
            handles += watch_chain(modules, candidate.group, calls)

    def done() -> Calls:
        for handle in handles:
            handle.remove()
        exchanges.close()
        return calls

    return done


def climb(model: nn.Module, found: list[Candidate], calls: Calls) -> list[Finding]:
    """Settle every candidate. Modules are given new forwards in place; nothing else of the model changes."""
    findings: list[Finding] = []
    settled: set[str] = set()
    weak: list[Finding] = []
    kinds: dict[tuple, list[Candidate]] = {}
    allow(model.get_parameter(n) for candidate in found for n in candidate.parameters)
    for candidate, name, size in _divided_by_gathering(model, found, calls):
        experts, why = len(candidate.group.names) if candidate.group else None, not_by_all_to_all(name, size)
        findings.append(Finding(candidate.holder, "unbalanceable", why, candidate.parameters, experts))
        refuse((model.get_parameter(n) for n in candidate.parameters), why)
        settled.update(candidate.parameters)
    for candidate in [*found, *_lone(model, found, calls)]:
        kinds.setdefault(_kind(model, candidate), []).append(candidate)
    for alike in kinds.values():
        if alike[0].group and (alike[0].holder in calls.chained or calls.exchanging_inside(alike[0].group)):
            continue
        alike = [c for c in alike if not (c.parameters and settled.issuperset(c.parameters))]
        if not alike:
            continue
        new: list[Finding] = []
        try:
            for finding, sure in _looked_into(model, alike, calls):
                (new if sure else weak).append(finding)
        except Exception as fault:  # the door: a bug of ours costs a layer its balance, never the model, and is told
            why = internal_error(fault)
            log.warning("%s: %s", alike[0].holder, why, exc_info=fault)
            held = {f.path for f in new}
            weak += [_unlifted(c, "missed", why) for c in alike if c.holder not in held]
        findings += new
        settled.update(p for finding in new for p in finding.parameters)
    for finding in weak:  # unless experts were found inside or around
        if settled.isdisjoint(finding.parameters):
            findings.append(finding)
            settled.update(finding.parameters)
    order = {n: i for i, (n, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(findings, key=lambda f: min((order[p] for p in f.parameters), default=0))


def _looked_into(model: nn.Module, alike: list[Candidate], calls: Calls) -> Iterator[tuple[Finding, bool]]:
    """What becomes of all candidates of one kind, and whether that is sure where experts are found inside or around, too."""
    levels = _levels(model, alike, calls)
    with lent(*(model.get_submodule(p) for p in levels[-1:])), unsharded(model, *levels[-1:]):
        found = False
        try:
            for finding in _settle(model, alike, levels, calls):
                found = True
                yield finding, True
        except _Heads:
            found = True
        if found:
            return
        if why := _follow_data(model, alike[0], levels, calls):
            yield from ((_unlifted(c, "missed", why), False) for c in alike if c.group)
            return
        for finding in _equally_loaded(model, alike, levels, calls):
            yield finding, False


class _Heads(Exception):
    """Whoever calls the model says which of these modules computes a row, and nothing weighs it: heads of tasks, not experts."""


def _is_callers(place: int | None, call: Call, outermost: Call | None) -> bool:
    """Is an input of a module one of the whole model's?"""
    if place is None or outermost is None:
        return False
    memory = call.inputs()[place].untyped_storage().data_ptr()
    return any(t.untyped_storage().data_ptr() == memory for t in outermost.tensors())


def _unlifted(candidate: Candidate, rung: str, why: str) -> Finding:
    experts = len(candidate.group.names) if candidate.group else None
    return Finding(candidate.holder, rung, why, candidate.parameters, experts)


def _divided_by_gathering(model: nn.Module, found: list[Candidate], calls: Calls) -> Iterator[tuple[Candidate, str, int]]:
    """Candidates whose weights differ between ranks that gather rows around them; the collective and the number of ranks.

    What gathers the same experts' rows (sequence parallelism, FSDP) holds the same weights on all ranks. All ranks compare all
    candidates at once, before any of them is looked at: what is found later may differ.
    """
    suspects: dict[str, list[tuple[Candidate, str, dist.ProcessGroup]]] = {}
    for candidate in found:
        group = candidate.group
        if not candidate.stacked and (group is None or group.container in calls.chained or calls.exchanging_inside(group)):
            continue
        weights = [model.get_parameter(n) for n in candidate.parameters]
        levels = _upwards(candidate.holder)[:_LEVELS]
        around = next(filter(None, (calls.gathers_at(p, group) for p in levels)), None)
        if around is not None and not any(w.is_meta or isinstance(w, DTensor) for w in weights):
            suspects.setdefault(around[1].group_name, []).append((candidate, *around))
    for _, those in sorted(suspects.items()):
        ranks = Ranks(those[0][2])
        every = ranks.every([[int(digest(model.get_parameter(n))) for n in c.parameters] for c, _, _ in those])
        for index, (candidate, name, _) in enumerate(those):
            if any(each[index] != every[0][index] for each in every):
                yield candidate, name, ranks.size


def _lone(model: nn.Module, found: list[Candidate], calls: Calls) -> Iterator[Candidate]:
    """Modules that send rows to other ranks and hold one expert each, which has no like beside it."""
    for path in calls.exchanging:
        if not any(not path or c.holder == path or c.holder.startswith(f"{path}.") for c in found):
            yield Candidate(path, None, (), False)


def _levels(model: nn.Module, alike: list[Candidate], calls: Calls) -> list[str]:
    """Modules in which the routing of the first candidate may stand; innermost first."""
    levels = [p for p in _upwards(alike[0].holder)[:_LEVELS] if p in calls.first and _is_plain(calls.first[p])]
    return [p for p in levels if _is_layer(model, p, alike)]


def _settle(model: nn.Module, alike: list[Candidate], levels: list[str], calls: Calls) -> Iterator[Finding]:
    """All candidates of one kind by what works for the first."""
    first = alike[0]
    if any(lifted_layer(model.get_submodule(p)) is not None for p in levels):
        return  # by an earlier call
    home = _exchanging_level(model, first, levels, calls)
    levels = [p for p in levels if calls.ranks_of(p).size == 1] if home is None else levels[levels.index(home) :]
    untraced: list[str] = []  # levels that were not looked at
    if first.stacked and home is None:
        is_traced, untraced = _traced_at(model, first, levels, calls)
        if is_traced:
            yield from _traced(model, alike, levels, calls)
            return
    verdict: Refusal | None = None
    plain: Refusal | None = None
    for path in levels if first.alike else ():
        owner = model.get_submodule(path)
        try:
            around = _around(model, path, levels, calls)
            group = _inside(first.group, path)
            layer = lift_layer(owner, path, calls.first[path], group, calls.ranks_of(path), around)
        except (Unbalanceable, Missed) as reason:
            verdict = verdict if isinstance(verdict, Unbalanceable) else reason
        except Refusal as reason:
            plain = reason
            log.debug("%s is not lifted at %r: %s", first.holder, path, reason)
        else:
            if _is_callers(layer.facts.caller, calls.first[path], calls.first.get("")):
                raise _Heads
            yield from _installed(model, alike, first, path, layer, calls)
            return
    if any(_looked_at(model, path, first, calls.first[path])[0] for path in untraced):
        yield from _traced(model, alike, levels, calls)
        return
    if verdict is None and first.stacked and (source := _routed(model, first, levels, calls)):
        verdict = Missed(f"{plain or 'its forward was not understood'}; the router's choice meets its weights at {source}")
    if verdict is None and home is not None:  # weights that meet rows of other ranks: experts beyond doubt
        verdict = plain or Missed("its forward was not understood")
    if verdict is not None:
        rung = "unbalanceable" if isinstance(verdict, Unbalanceable) else "missed"
        yield from (_unlifted(each, rung, str(verdict)) for each in alike)


def _traced(model: nn.Module, alike: list[Candidate], levels: list[str], calls: Calls) -> Iterator[Finding]:
    shapes = [p.shape for p in map(model.get_parameter, alike[0].parameters) if p.dim() >= 3]
    gating = gating_around(shapes[0][0] if shapes else 0, _around(model, alike[0].holder, levels, calls))
    for each in alike:
        yield Finding(each.holder, "traced", "the compiler's graph shows its experts", each.parameters, gating=gating)


def _traced_at(model: nn.Module, candidate: Candidate, levels: list[str], calls: Calls) -> tuple[bool, list[str]]:
    """Does a graph of one of these modules show the candidate, and which of them were left out.

    A module whose graph breaks breaks those of the modules around it as well, and tracing them is what takes longest here.
    """
    for index, path in enumerate(levels):
        shown, broken = _looked_at(model, path, candidate, calls.first[path])
        if shown or broken:
            return shown, [] if shown else levels[index + 1 :]
    return False, []


def _exchanging_level(model: nn.Module, candidate: Candidate, levels: list[str], calls: Calls) -> str | None:
    """The innermost module in whose forward a candidate's weights meet rows that come from other ranks, if there is one."""
    for path in levels:
        if (ranks := calls.ranks_of(path)).size > 1:
            inside = {_below(path, n) for n in candidate.parameters}
            if meets_rows_of_others(model.get_submodule(path), calls.first[path], inside, ranks):
                return path
    return None


def _installed(
    model: nn.Module, alike: list[Candidate], first: Candidate, path: str, layer: LiftedLayer, calls: Calls
) -> Iterator[Finding]:
    above = len(_parts(first.holder)) - len(_parts(path))
    for each in alike:
        here = ".".join(_parts(each.holder)[: len(_parts(each.holder)) - above])
        owner = model.get_submodule(here)
        facts: LayerFacts = layer.facts
        parameters = tuple(f"{here}.{n}" if here else n for n in facts.parameters)
        states = [(lift, lift.reads) for lift in layer.lifts.values()]
        try:
            if each is not first:
                with lent(owner), unsharded(model, here):
                    states = recheck(owner, layer, calls.first[path], calls.ranks_of(path))
        except Refusal as reason:
            yield Finding(here, "missed", str(reason), parameters, facts.experts)
            continue
        if lifted_layer(owner) is None:
            install(owner, layer, here, states)
        if facts.counted:
            keep_counts(model.get_submodule(_caller(here, path, calls)))
        log.info("%s: %d experts lifted from a recorded forward (%s)", here, facts.experts, facts.form)
        only = f" (for inference only, since its own forward has no gradients: {facts.inference})" if facts.inference else ""
        only += "" if facts.lead is None else f" (for batches of {list(facts.lead)} tokens only: Python computes its sizes)"
        if facts.most is not None:
            only += f" (for up to {facts.most} tokens: its forward has that bound, and no probe came to it)"
        if facts.dynamic:
            only += f" (graphs break at {facts.dynamic}, which makes a tensor whose size depends on the data; where that is inside of an "
            only += "activation checkpoint, write it with a fixed size, or the layer runs as it is)"
        over = "" if facts.ranks == 1 else f" over the {facts.ranks} ranks of the layer's own all-to-all, which planning replaces"
        why = f"experts called {facts.form}{only}{over}, lifted from a recorded forward; outputs and gradients checked against eager"
        yield Finding(
            here, "lifted", why, parameters, facts.experts, facts.top_k, facts.source, facts.gating, bool(facts.inference)
        )


def _routed(model: nn.Module, candidate: Candidate, levels: list[str], calls: Calls) -> str:
    """Where the routing of stacked experts shows, although nothing could be made of them."""
    for path in levels:
        inside = {_below(path, n) for n in candidate.parameters}
        try:
            if source := routed_product(model.get_submodule(path), calls.first[path], inside):
                return source
        except Refusal as reason:
            log.debug("%s cannot be recorded at %r: %s", candidate.holder, path, reason)
    return ""


def _follow_data(model: nn.Module, candidate: Candidate, levels: list[str], calls: Calls) -> str:
    """Why siblings that are given rows by their values, and so are experts, are not rewritten; "" for others."""
    if candidate.group is None or not calls.uneven(candidate.group):
        return ""
    if _is_lifted(model, candidate):
        return ""
    why = "its experts have weights of different sizes, and a copy of one does not fit in the place of another"
    for path in levels:
        group = _inside(candidate.group, path)
        try:
            if group and rows_follow_data(model.get_submodule(path), calls.first[path], group):
                if candidate.alike:
                    why = "what its experts compute is not understood as a function of single rows"
                return f"{why}; which rows come to which of them depends on the data"
        except Refusal as reason:
            log.debug("%s cannot be recorded at %r: %s", candidate.holder, path, reason)
    return ""


def _equally_loaded(model: nn.Module, alike: list[Candidate], levels: list[str], calls: Calls) -> Iterator[Finding]:
    """Dense mixtures in larger sums, and experts that are rows of tables; seen in the innermost module that is called."""
    first = alike[0]
    path = next((p for p in _upwards(first.holder) if p in calls.first), None)
    if path is None or not first.alike or not _is_plain(calls.first[path]) or calls.ranks_of(path).size > 1:
        return
    if _is_lifted(model, first):
        return
    owner = model.get_submodule(path)
    if path not in levels and not is_light(owner, sum(model.get_parameter(n).numel() for n in first.parameters)):
        return
    names = {_below(path, n): n for n in first.parameters}
    try:
        with lent(owner), unsharded(model, path):
            found = equally_loaded(owner, calls.first[path], _inside(first.group, path), set(names))
    except Refusal as reason:
        log.debug("%s cannot be recorded at %r: %s", first.holder, path, reason)
        return
    if found is None:
        return
    for each in alike:
        held = tuple(theirs for n, theirs in zip(names, each.parameters, strict=True) if n in found.parameters)
        yield Finding(each.holder, "unbalanceable", found.reason, held, found.experts, found.choices)


def _is_lifted(model: nn.Module, candidate: Candidate) -> bool:
    """By an earlier call."""
    return any(lifted_layer(model.get_submodule(path)) is not None for path in _upwards(candidate.holder))


def _caller(here: str, path: str, calls: Calls) -> str:
    """The module whose forward calls this one, by what was seen of its representative."""
    above = next((p for p in _upwards(path)[1:] if p in calls.first), "")
    return ".".join(_parts(here)[: len(_parts(above))])


def _around(model: nn.Module, path: str, levels: list[str], calls: Calls) -> Around:
    """Modules around one in which its router may be."""
    outer = [p for p in levels if p != path and (not p or path.startswith(f"{p}."))]
    return [(model.get_submodule(p), calls.first[p], _below(p, path)) for p in outer]


def _looked_at(model: nn.Module, path: str, candidate: Candidate, call: Call) -> tuple[bool, bool]:
    """Does the compiler's graph of a module show all of a candidate's stacked parameters as one site, and did it break?"""
    module = model.get_submodule(path)
    parameters = [model.get_parameter(n) for n in candidate.parameters]
    wanted = sum(p.numel() for p in parameters if p.dim() >= 3 and p.shape[0] >= FEWEST)
    covered = 0
    bug: Exception | None = None

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        nonlocal covered, bug
        try:
            found = find_moe_sites(gm)
        except Exception as fault:  # Dynamo would wrap it
            bug = fault
            raise
        for site in found:
            if isinstance(site, Site) and site.anchors[0].target is not torch.ops.ultraep.experts.default:
                covered += sum(p.meta["example_value"].numel() for p in site.params)
        return gm.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    forward.__code__ = forward.__code__.replace()  # a code object of its own: compiled graphs are counted by it
    copied = call.with_tensors([t.detach().clone() for t in call.tensors()])
    before = logging.root.manager.disable
    breaks = torch._dynamo.utils.counters["graph_break"].total()
    logging.disable(logging.ERROR)  # a module that cannot be traced alone is no error
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run_theirs(torch.compile(forward, backend=backend, dynamic=False), *copied.args, **copied.kwargs)
    except Exception as fault:  # Dynamo's, and the model's own
        if bug is not None:
            raise bug from None
        log.debug("%s cannot be traced alone", path, exc_info=fault)
    finally:
        logging.disable(before)
    return covered >= wanted > 0, torch._dynamo.utils.counters["graph_break"].total() > breaks


# ---- paths ----------------------------------------------------------------------------------------------------------


def _parts(path: str) -> list[str]:
    return path.split(".") if path else []


def _below(path: str, name: str) -> str:
    """A name as the module at `path` knows it."""
    return name[len(path) :].lstrip(".") if path else name


def _upwards(path: str) -> list[str]:
    parts = _parts(path)
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _kind(model: nn.Module, candidate: Candidate) -> tuple:
    roles = (candidate.group.names, candidate.group.roles) if candidate.group else ()
    return (*like_layers(model, candidate.holder), roles)


def _is_plain(call: Call) -> bool:
    """Arguments without state: a cache would be written to by running the module again."""
    plain = (Tensor, int, float, str, bool, type(None), torch.dtype, torch.device)
    return all(isinstance(a, plain) for a in pytree.tree_leaves((call.args, call.kwargs)))


def _is_layer(model: nn.Module, path: str, alike: list[Candidate]) -> bool:
    """A module above several layers of a kind is no layer, nor is one in which experts would be a small part."""
    prefix = f"{path}." if path else ""
    if len(alike) > 1 and sum(c.holder == path or c.holder.startswith(prefix) for c in alike) > 1:
        return False
    if not alike[0].parameters:
        return True  # which parameters are its experts' is not known yet
    experts = sum(model.get_parameter(n).numel() for n in alike[0].parameters)
    return sum(p.numel() for p in model.get_submodule(path).parameters()) <= _MOST * experts


def _inside(group: Siblings | None, path: str) -> Siblings | None:
    if group is None:
        return None
    return Siblings(_below(path, group.container), group.names, group.roles)
