"""Find the MoE layers of a Dynamo graph and lift each of them. Nothing in the graph is changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

from torch import fx

from ultraep_compile.passes.lift.anchors import anchor_params, feeds_product, find_anchors, given_by_id, is_weighty
from ultraep_compile.passes.lift.called import called_sites
from ultraep_compile.passes.lift.cut import cut
from ultraep_compile.passes.lift.faults import internal_error
from ultraep_compile.passes.lift.gating import find_gating
from ultraep_compile.passes.lift.id_range import id_bound
from ultraep_compile.passes.lift.lifter import Lifter, Stale
from ultraep_compile.passes.lift.nodes import GraphFacts, module_path, op_name, source_line
from ultraep_compile.passes.lift.region import check_region, data_nodes, region_of
from ultraep_compile.passes.lift.site import Miss, Site
from ultraep_compile.passes.lift.sizes import Size, same
from ultraep_compile.passes.lift.twins import Template, match, renamed
from ultraep_compile.passes.lift.values import Dim, Kind, Refusal, Value

log = logging.getLogger(__name__)


def find_moe_sites(gm: fx.GraphModule) -> list[Site | Miss]:
    """Every place where routed tokens meet per-expert parameters, in graph order: lifted, or with the reason
    why not.
    """
    search = _Search(GraphFacts(gm))
    called = list(called_sites(search.facts))
    for site in called:
        search.names.add(site.name)
    found = [found for ids, anchors in find_anchors(search.facts).items() for found in search.all_by(ids, anchors)]
    return [*called, *found, *search.given()]


class _Search:
    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self.names: set[str] = set()
        self.templates: list[tuple[Template, list[int]]] = []

    def all_by(self, ids: fx.Node, anchors: list[fx.Node]) -> Iterator[Site | Miss]:
        """Sites that go by the same ids, one after the other: several groups of experts may share a router."""
        while anchors and (found := self.look_at(ids, anchors)):
            yield found
            rest = [a for a in anchors if a not in found.region] if isinstance(found, Site) else []
            anchors = rest if len(rest) < len(anchors) else []

    def given(self) -> Iterator[Miss]:
        """Layers whose experts' weights are arguments of what is compiled: nothing says that they are the model's."""
        told: set[fx.Node] = set()
        for node in self.facts.nodes:
            ids = given_by_id(self.facts, node)
            if ids is None or ids in told or not feeds_product(node):
                continue
            experts = self.facts.shape(node.args[0])[0]  # type: ignore[arg-type]
            scores = find_gating(self.facts, ids, None, experts).scores if isinstance(experts, int) else None
            if scores is not None and same(self.facts.shape(scores)[-1], experts):
                told.add(ids)
                why = (
                    f"its experts' weights ({node.args[0].target}) are an argument of what is compiled, and neither parameters nor "  # type: ignore[union-attr]
                    "buffers of a module in it. Compile the module, and let functional_call call the compiled module"
                )
                yield Miss(_unique(_name(ids, [node]), self.names), source_line(node), why, [node])

    def look_at(self, ids: fx.Node, anchors: list[fx.Node]) -> Site | Miss | None:
        """None where no expert product follows: a table of parameters, not a MoE layer."""
        if not any(is_weighty(self.facts, a) for a in anchors):
            return None
        name = _unique(_name(ids, anchors), self.names)
        if transform := self.facts.transform_at(self.facts.order[anchors[0]]):
            inside = f"it runs inside of {transform}, and balanced experts have ordinary gradients only"
            return Miss(name, source_line(anchors[0]), inside, anchors) if any(map(feeds_product, anchors)) else None
        try:
            found = self._twin(name, ids, anchors) or self._lift(name, ids, anchors)
        except Exception as fault:  # the door: a bug of ours costs this layer its balance, never the compilation, and is told
            why = internal_error(fault)
            log.warning("%s: %s", name, why, exc_info=fault)
            found = Miss(name, source_line(anchors[0]), why, anchors)
        if found is not None:
            self.names.add(name)
        return found

    def _lift(self, name: str, ids: fx.Node, anchors: list[fx.Node]) -> Site | Miss | None:
        """Tokens of k choices first; where that fails, each pair as a token of its own."""
        reasons = []
        for apart in (False, True):
            lift = Lifter(self.facts, ids, anchors, apart)
            try:
                lift.run(p for anchor in anchors for p in anchor_params(self.facts, anchor))
                if lift.output is None:
                    raise Refusal("the rows are never summed back to tokens")
                return self._checked(_site(self.facts, name, lift, anchors), lift)
            except Refusal as reason:
                reasons.append(_explain(lift, anchors, str(reason)))
        if any(feeds_product(a) for a in anchors):
            return Miss(name, source_line(anchors[0]), reasons[0], anchors)
        log.debug("%s: no product with what is selected by id: %s", name, reasons[0])
        return None

    def _checked(self, site: Site, lift: Lifter) -> Site:
        data = data_nodes(lift, site.region)
        check_region(self.facts, site, data)
        self.templates.append((Template.of(site, lift), data))
        return site

    def _twin(self, name: str, ids: fx.Node, anchors: list[fx.Node]) -> Site | None:
        """The site by renaming one that is alike, if there is one."""
        for template, data in self.templates:
            if to := match(self.facts, template, ids, anchors):
                site = renamed(template.site, to)
                shift = self.facts.order[ids] - self.facts.order[template.site.ids]
                try:
                    check_region(self.facts, site, [index + shift for index in data])
                except Refusal:
                    return None  # the full analysis will say why
                gating = find_gating(self.facts, ids, site.weight, site.experts)
                return dataclasses.replace(
                    site, name=name, source=source_line(anchors[0]), gating=gating.form, scores=gating.scores
                )
        return None


def _site(facts: GraphFacts, name: str, lift: Lifter, anchors: list[fx.Node]) -> Site:
    halves = cut(lift)
    assert lift.output is not None
    experts = _fixed(lift.sizes[Dim.EXPERT], "number of experts")
    gating = find_gating(facts, lift.ids, halves.weight, experts)
    width = facts.shape(gating.scores)[-1] if gating.scores else experts
    bound = id_bound(facts, lift.ids)
    if lift.legal_ids_assumed and not same(width, experts) and (bound is None or bound > experts):
        raise Refusal(f"{experts} experts, but a router of {width} choices: ids beyond the experts have a meaning")
    region = region_of(lift)
    return Site(
        name=name,
        source=source_line(anchors[0]),
        experts=experts,
        top_k=_fixed(lift.choices, "number of choices"),
        gating=gating.form,
        hidden=halves.hidden,
        ids=lift.ids,
        weight=halves.weight,
        scores=gating.scores,
        params=halves.params,
        consts=halves.consts,
        row_function=halves.row_function,
        uses_weight=halves.uses_weight,
        combine=halves.combine,
        width=_fixed(halves.y.sizes[1], "width of the expert output"),
        dtype=halves.y.dtype,
        output=lift.output,
        region=region,
        anchors=[a for a in anchors if a in set(region)],
    )


def _fixed(size: Size, what: str) -> int:
    if not isinstance(size, int):
        raise Refusal(f"a {what} that is not a fixed number ({size})")
    return size


def _explain(lift: Lifter, anchors: list[fx.Node], reason: str) -> str:
    """What was matched, what stopped it, and the nearest miss: the refused op that stood on data of the rows."""
    first = anchors[0]
    text = f"{op_name(first)} {first.name} goes by expert ids"
    text += f" {lift.ids.name}; {reason}"
    on_rows = [n for n in lift.refused if any(_is_rows(lift.env.get(a)) for a in n.all_input_nodes)]
    nearest = on_rows or list(lift.refused)
    if nearest:
        node = min(nearest, key=lift.facts.order.__getitem__)
        line = source_line(node)
        text += f"; nearest miss at {node.name}: {lift.refused[node]}" + (f" ({line})" if line else "")
    return text


def _is_rows(value: object) -> bool:
    return isinstance(value, Stale) or (isinstance(value, Value) and value.kind in (Kind.ROWS, Kind.TAKEN))


def _name(ids: fx.Node, anchors: list[fx.Node]) -> str:
    """The module that holds both the routing and the experts: the common part of their paths."""
    paths = [module_path(n).split(".") for n in (ids, *anchors) if module_path(n)]
    if not paths:
        return anchors[0].name
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or anchors[0].name


def _unique(name: str, taken: set[str]) -> str:
    count, new = 1, name
    while new in taken:
        count += 1
        new = f"{name}#{count}"
    return new
