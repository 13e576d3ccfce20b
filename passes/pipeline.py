"""The ordered list of graph passes, and what runs it.

A pass is `f(gm, rewrite) -> gm`; `rewrite` carries the options and what earlier passes found. Read `PASSES` first.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.distributed.tensor import DTensor

from ultraep_compile.codegen.row_function import undisturbed
from ultraep_compile.config import Options
from ultraep_compile.errors import TopologyError, UltraEPError
from ultraep_compile.ops.experts import ExpertSite
from ultraep_compile.ops.transport import choose_transport
from ultraep_compile.passes.insert_balance import insert_balance, prepare_site, site_layout
from ultraep_compile.passes.lift import Miss, Refusal, Site, find_moe_sites, verify_site
from ultraep_compile.passes.lift.faults import internal_error
from ultraep_compile.passes.lift.nodes import is_unshard, upstream
from ultraep_compile.passes.refused import refusal
from ultraep_compile.passes.regions import Region, cut, take_marks
from ultraep_compile.worth import NEVER, least_pairs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LookedAt:
    """One site as the watch sees it."""

    owner: fx.GraphModule
    outputs: list[fx.Node]
    before: Region
    """What the unmodified graph computes: the whole layer where it was lifted, else from routed tokens to their sum."""
    is_layer: bool
    """Was the layer lifted? Then its inputs and outputs are those of its module."""

    @classmethod
    def of(
        cls, gm: fx.GraphModule, owner: fx.GraphModule, site: Site, layers: list[tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]]
    ) -> LookedAt | None:
        """None where the layer cannot be run by itself."""
        inputs = list(dict.fromkeys(n for n in (site.hidden, site.ids, site.weight, site.scores) if n is not None))
        outputs, is_layer = [site.output], False
        is_given = lambda n: source_of(gm, owner, n) is not None  # noqa: E731
        for where, begins, ends in layers:
            if where is owner and any(site.output in upstream(e) for e in ends) and not any(site.output in upstream(b) for b in begins):
                inputs, outputs, is_layer = begins, ends, True
        before = cut(owner, inputs, outputs, is_given)
        order = {n: i for i, n in enumerate(owner.graph.nodes)}
        if before is None or any(order[n] > order[site.output] for n in before.inputs):  # known too late to be shown
            return None
        return cls(owner, outputs, before, is_layer)


def source_of(gm: fx.GraphModule, owner: fx.GraphModule, node: fx.Node) -> int | None:
    """Number of the whole graph's input that an input of one of its bodies stands for, None if it is made in the graph."""
    if owner is gm:
        return gm.graph.find_nodes(op="placeholder").index(node)
    for parent in _bodies(gm):
        for call in parent.graph.nodes:
            if owner in bodies_run_by(parent, call):
                places = owner.graph.find_nodes(op="placeholder")
                given = call.args[len(call.args) - len(places) :][places.index(node)]
                if isinstance(given, fx.Node) and given.op == "placeholder":
                    return source_of(gm, parent, given)
    return None


@dataclass(slots=True)
class Rewrite:
    """Options of one compilation and what the passes learn about one graph."""

    options: Options
    ranks: int = 1
    group: str = ""
    refused: dict[fx.Node, str] = field(default_factory=dict)
    """Inputs whose sites stay as they are, with the reasons."""
    sites: list[Site] = field(default_factory=list)
    owners: list[fx.GraphModule] = field(default_factory=list)
    """The graph that each site is in: the whole one, or the body of an activation checkpoint."""
    misses: list[Miss] = field(default_factory=list)
    layers: list[tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]] = field(default_factory=list)
    """Lifted layers that the graphs show: inputs and outputs."""
    looked_at: dict[str, LookedAt] = field(default_factory=dict)
    """What the watch needs of a site, by key."""
    prepared: dict[str, ExpertSite] = field(default_factory=dict)
    """By site key; one per rewritten site, in graph order."""
    seconds: dict[str, float] = field(default_factory=dict)
    snapshots: list[tuple[str, str]] | None = None
    """(pass name, graph text) before the first and after every pass, if wanted."""


def detect_moe_pass(gm: fx.GraphModule, rewrite: Rewrite) -> fx.GraphModule:
    """Find every place where routed tokens meet per-expert parameters, and lift it. Changes nothing."""
    for owner in _bodies(gm):
        rewrite.layers += [(owner, *ends) for ends in take_marks(owner)]
        for found in _sites_or_reason(owner):
            if isinstance(found, Site) and (why := refusal(found.params, rewrite.refused)):
                rewrite.misses.append(Miss(found.name, found.source, why, found.anchors))
            elif isinstance(found, Site):
                rewrite.sites.append(found)
                rewrite.owners.append(owner)
            else:
                rewrite.misses.append(found)
        rewrite.misses += _hidden(owner)
    return gm


def _sites_or_reason(gm: fx.GraphModule) -> list[Site | Miss]:
    """Detection that meets something it cannot even look at costs the balance, never the compilation."""
    try:
        return find_moe_sites(gm)
    except Exception as fault:
        why = internal_error(fault)
        log.warning("this graph runs unbalanced: %s", why, exc_info=fault)
        return [Miss("graph", "", why, [])]


_TRANSPARENT = ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph")


def _bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph and the bodies that it calls as a whole, like those of activation checkpoints."""
    out = [gm]
    for name, body in _called_bodies(gm):
        if name in _TRANSPARENT and body not in out:
            out += _bodies(body)
    return out


def _called_bodies(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """(name of the operator, graph that it is given)."""
    for node in gm.graph.nodes:
        yield from ((node.target.name(), body) for body in _bodies_given_to(gm, node))


def _bodies_given_to(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return []
    named = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    found = [getattr(gm, str(a.target), None) for a in named]
    return [b for b in found if isinstance(b, fx.GraphModule)]


def bodies_run_by(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Bodies that a node runs as they are."""
    return [b for b in _bodies_given_to(gm, node) if node.target.name() in _TRANSPARENT]  # pyright: ignore


def _hidden(gm: fx.GraphModule) -> Iterator[Miss]:
    """Layers in bodies that may run or not, or any number of times (`cond`, `while_loop`, `map`)."""
    for name, body in _called_bodies(gm):
        if name not in _TRANSPARENT:
            for found in (x for owner in _bodies(body) for x in _sites_or_reason(owner)):
                yield Miss(found.name, found.source, f"it is in the body of {name}, which may run on some ranks only", found.anchors)


def topology_pass(gm: fx.GraphModule, rewrite: Rewrite) -> fx.GraphModule:
    """Fix ranks and group: from the options, or from experts that `shard_experts` or the model divided. Changes nothing."""
    options = rewrite.options
    unshards = {n for s in rewrite.sites for p in s.params for n in upstream(p) if is_unshard(n)}
    groups = {n.args[3]: n.args[2] for n in unshards} | dict(s.divided for s in rewrite.sites if s.divided)
    if len(groups) > 1:
        raise TopologyError(
            f"experts are divided over {len(groups)} different groups. Divide all of them over one."
        )
    rewrite.group, rewrite.ranks = "", options.ranks or 1
    if groups:
        ((rewrite.group, rewrite.ranks),) = groups.items()  # pyright: ignore
        if options.ranks not in (None, rewrite.ranks):
            raise TopologyError(
                f"option 'ranks' is {options.ranks} but the experts are divided over {rewrite.ranks} processes. Leave 'ranks' out."
            )
    if options.group is not None:
        if rewrite.group not in ("", options.group.group_name):
            raise TopologyError("option 'group' is not the group that shard_experts used. Leave 'group' out.")
        rewrite.group, rewrite.ranks = options.group.group_name, options.group.size()
        _refuse_partial_experts(rewrite)
    if rewrite.group:
        choose_transport(rewrite.group, options.transport, options.deadline_s)
    return gm


def _refuse_partial_experts(rewrite: Rewrite) -> None:
    """With the option `group` every rank holds all experts whole: not so where the model's own parallelism has divided them."""
    for site in rewrite.sites:
        todo, seen = list(site.params) if not site.divided else [], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in seen or is_unshard(node):
                continue
            seen.add(node)
            todo += node.all_input_nodes
            value = node.meta.get("example_value")
            if isinstance(value, DTensor) and not all(p.is_replicate() for p in value.placements):
                raise TopologyError(
                    f"{site.name}: weights of its experts are divided already, by {value.placements} over a mesh of "
                    f"{value.device_mesh.size()} ranks (tensor parallelism, or the model's own expert parallelism), so rows cannot go to "
                    "other ranks of the option 'group'. Leave experts out of that plan and call shard_experts, or leave 'group' out."
                )


def prove_rows_pass(gm: fx.GraphModule, rewrite: Rewrite) -> fx.GraphModule:
    """Keep only sites whose row function is proven row by row; the rest become misses. Changes nothing."""
    proven, owners = [], []
    names: Counter[str] = Counter()
    for site, owner in zip(rewrite.sites, rewrite.owners, strict=True):
        layout = site_layout(site, rewrite.ranks, rewrite.options.redundant_experts if rewrite.ranks > 1 else 0)
        try:
            verify_site(site)
            names[site.name] += 1
            label = site.name if names[site.name] == 1 else f"{site.name}#{names[site.name]}"
            key, made = prepare_site(site, label, layout, rewrite.group, rewrite.options)
        except UltraEPError:
            raise
        except Exception as fault:  # the door
            why = f"its row function was not proven: {fault}"
            if not isinstance(fault, Refusal):
                why = internal_error(fault)
                log.warning("%s: %s", site.name, why, exc_info=fault)
            rewrite.misses.append(Miss(site.name, site.source, why, []))
        else:
            proven.append(site)
            owners.append(owner)
            rewrite.prepared[key] = made
    rewrite.sites, rewrite.owners = proven, owners
    return gm


def insert_balance_pass(gm: fx.GraphModule, rewrite: Rewrite) -> fx.GraphModule:
    """Replace every proven site by load, plan, reroute and the balanced experts. Bitwise neutral in forward."""
    for site, owner, (key, made) in zip(rewrite.sites, rewrite.owners, rewrite.prepared.items(), strict=True):
        least = least_pairs(made, site.top_k, rewrite.options.balance_from, torch.is_grad_enabled())
        seen: list[fx.Node] = []
        if rewrite.options.watch and (looked_at := LookedAt.of(gm, owner, site, rewrite.layers)) is not None:
            rewrite.looked_at[key], seen = looked_at, looked_at.before.inputs
        stayed = insert_balance(owner, site, key, made, rewrite.options.planner, least, seen)
        if least:
            log.info("%s: planned from %s routed pairs on", site.name, "no number of" if least == NEVER else least)
        if stayed:
            log.info("%s: %d nodes stay because something else reads them", site.name, len(stayed))
    for each in {id(o): o for o in [*rewrite.owners, gm]}.values():
        each.graph.lint()
        each.recompile()
    return gm


Pass = Callable[[fx.GraphModule, Rewrite], fx.GraphModule]
PASSES: list[Pass] = [
    detect_moe_pass,
    topology_pass,
    prove_rows_pass,
    insert_balance_pass,
]
ANALYSES = PASSES[:-1]
"""The passes that leave every graph as it is."""


def run_passes(gm: fx.GraphModule, rewrite: Rewrite, passes: list[Pass] | None = None) -> fx.GraphModule:
    """Run the passes in order; a pass that raises leaves the graph as it was, since only the last one writes."""
    if rewrite.snapshots is not None:
        rewrite.snapshots.append(("before", _text(gm)))
    for each in PASSES if passes is None else passes:
        name = each.__name__
        started = time.perf_counter()
        with undisturbed():
            gm = each(gm, rewrite)
        rewrite.seconds[name] = time.perf_counter() - started
        if rewrite.snapshots is not None:
            rewrite.snapshots.append((name, _text(gm)))
        if not rewrite.sites:
            break
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "ultraep_after", "encoding": "string"},
        payload_fn=lambda: _text(gm),
        expect_trace_id=False,
    )
    return gm


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False, include_stride=False, include_device=False)
