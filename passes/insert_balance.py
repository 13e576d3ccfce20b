"""Put planning, rerouting and the balanced experts op in the place of a proven site."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import fx

from ultraep_compile.codegen.row_function import RowSignature, TensorSpec, compile_row_function
from ultraep_compile.config import Options
from ultraep_compile.errors import TopologyError
from ultraep_compile.ops.experts import ExpertSite, register_site
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.routing import must_agree
from ultraep_compile.passes.lift import Refusal, Site, expert_mm, expert_take, replace_site
from ultraep_compile.passes.lift.nodes import is_attribute, is_substitute, is_unshard, upstream
from ultraep_compile.passes.lift.rewrite import where_now
from ultraep_compile.passes.lift.sizes import size_of
from ultraep_compile.passes.own_part import own_part


def site_layout(site: Site, ranks: int, slots: int) -> ExpertLayout:
    """The layer's layout, or a TopologyError that names the layer and the values that would fit."""
    if site.experts % ranks:
        fits = [r for r in range(1, site.experts + 1) if site.experts % r == 0]
        raise TopologyError(
            f"{site.name}: {site.experts} experts cannot be divided over {ranks} ranks. Choose a number of ranks out of {fits}."
        )
    layout = ExpertLayout(site.experts, ranks, slots)
    foreign = site.experts - layout.masters
    if slots > foreign:
        raise TopologyError(
            f"{site.name}: redundant_experts={slots}, but a rank can hold copies of at most {foreign} experts "
            f"({site.experts} less its own {layout.masters}). Choose redundant_experts at most {foreign}."
        )
    return layout


def prepare_site(
    site: Site, label: str, layout: ExpertLayout, group: str, options: Options
) -> tuple[str, ExpertSite]:
    """Compile the site's row function and register it under `label`; returns its key."""
    unsharded = any(is_unshard(n) for p in site.params for n in upstream(p))
    sharded, summed = unsharded or site.divided is not None, site.divided is not None
    foreign = [n for p in site.params for n in upstream(p) if is_attribute(n) or is_substitute(n)]
    if group and foreign:
        raise Refusal(
            f"{foreign[0].target} takes part in its experts' weights and is neither a parameter nor a buffer, so other ranks "
            "may hold another"
        )
    hosted = 1 if group else layout.ranks
    signature = RowSignature(
        masters=hosted * layout.masters,
        slots=hosted * layout.slots,
        rows=_spec(site.hidden, leading=1),
        weight=TensorSpec((1,), _value(site.weight).dtype) if site.uses_weight and site.weight is not None else None,
        params=tuple(_spec(p, leading=1) for p in site.params),
        consts=tuple(_spec(c, leading=0) for c in site.consts),
    )
    program = compile_row_function(
        site.row_function,
        signature,
        is_product=lambda t: t is expert_mm,
        is_take=lambda t: t is expert_take,
        fuse=options.inner == "inductor",
    )
    made = ExpertSite(label, layout, group, sharded, program, summed)
    content = repr((label, layout, group, sharded, summed, program.key, options.digest()))
    key = f"{label}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    register_site(key, made)
    if group:
        asked = {n: getattr(options, n) for n in ("planner", "redundant_experts", "balance_from", "transport")}
        sizes = {"experts": layout.experts, "top_k": site.top_k, "rows": signature.rows.dtype}
        must_agree(key, **asked, **sizes)
    return key, made


def insert_balance(gm: fx.GraphModule, site: Site, key: str, made: ExpertSite, planner: str, least: int = 0, seen: Sequence[fx.Node] = ()) -> list[fx.Node]:
    """Rewrite one site, planned for batches of at least so many routed pairs. Returns nodes of the old region that had to
    stay because something else reads them.

    Args:
        seen: tensors that the watch is shown.
    """
    ops, layout = torch.ops.ultraep, made.layout

    def make_rows(graph: fx.Graph, site: Site) -> fx.Node:
        ids = site.ids
        if _value(ids).dim() == 1:
            ids = graph.call_method("unsqueeze", (ids, 1))
        scores = None if site.scores is None else graph.call_method("detach", (site.scores,))
        shown = [graph.call_method("detach", (where_now(gm, n),)) for n in seen]
        counts = graph.call_function(
            ops.expert_load.default,
            (ids, scores, layout.experts, layout.ranks, made.group, key, *([shown] if shown else [])),
        )
        plan = graph.call_function(ops.plan.default, (counts, layout.slots, planner, key, least))
        slot_expert = graph.call_function(operator.getitem, (plan, 0))
        shares = graph.call_function(operator.getitem, (plan, 1))
        physical = graph.call_function(ops.reroute.default, (ids, slot_expert, shares, layout.experts, made.group, key))
        gathered = made.sharded and not site.divided
        params = [own_part(graph, p, layout.ranks) for p in site.params] if gathered else site.params
        weight = site.weight if site.uses_weight else None
        out = graph.call_function(
            ops.experts.default,
            (site.hidden, weight, physical, slot_expert, shares, params, list(site.consts), key),
        )
        return graph.call_function(operator.getitem, (out, 0))

    return replace_site(gm, site, make_rows)


def _value(node: fx.Node | None) -> torch.Tensor:
    assert node is not None
    return node.meta["example_value"]


def _spec(node: fx.Node, leading: int) -> TensorSpec:
    value = _value(node)
    shape = tuple(size_of(d) for d in value.shape[leading:])  # of a model compiled with dynamic=True, numbers may be SymInts
    fixed = tuple(d for d in shape if isinstance(d, int))
    if fixed != shape:
        raise Refusal(f"{node.name} has a symbolic inner size {shape}")
    return TensorSpec(fixed, value.dtype)
