"""The nodes that a rewrite replaces, and the checks that replacing them at one place is sound."""

from __future__ import annotations

from torch import fx

from ultraep_compile.passes.lift.lifter import Lifter
from ultraep_compile.passes.lift.nodes import (
    VIEWS,
    GraphFacts,
    functional_target,
    is_call,
    op_name,
)
from ultraep_compile.passes.lift.site import Site
from ultraep_compile.passes.lift.values import Kind, Refusal, Value


def region_of(lift: Lifter) -> list[fx.Node]:
    """Nodes between the sources (token states, ids, weights, parameters) and the output, in graph order."""
    assert lift.output is not None
    sources = {lift.ids, *lift.row_sources, *lift.weights, *lift.params, *lift.consts}
    region: set[fx.Node] = set()

    def include(start: fx.Node) -> None:
        todo = [start]
        while todo:
            node = todo.pop()
            if node not in region and node not in sources and node in lift.reads:
                region.add(node)
                todo.extend(lift.reads[node])

    include(lift.output)
    for node in lift.reads:  # writes into the region's tensors that nobody reads
        if node in lift.env and functional_target(node)[0] and node.args[0] in region:
            include(node)
    resolved = {n for n in lift.env if n not in sources and is_call(n) and n not in region and n not in lift.reads}
    region |= {n for n in resolved if all(u in region for u in n.users)}  # repeat_interleave(h, K) and the like
    return sorted(region, key=lift.facts.order.__getitem__)


def check_region(facts: GraphFacts, site: Site, data: list[int]) -> None:
    """The new nodes stand where the output stood: nothing they read may be overwritten before, no mode may differ.

    Args:
        data: where in the graph the site computes on rows.
    """
    order = facts.order
    first, last, inside = order[site.region[0]], order[site.output], set(site.region)
    for source in (site.hidden, site.ids, site.weight, *site.params, *site.consts):
        if source is not None and (writer := _written(source, first, last, order, inside)):
            raise Refusal(f"{source.name} is overwritten by {writer.name} inside the site")
    if functional_target(site.output)[0]:  # its tensor is not written any more: nobody may look at it by a view
        for user in site.output.all_input_nodes[0].users:
            if is_call(user) and op_name(user) in VIEWS and order[user] < last:
                raise Refusal(f"the output is written where the view {user.name} sees it")
    here = facts.mode_at(last)
    if any(facts.mode_at(index) != here for index in data):
        raise Refusal("grad mode or autocast changes inside the site")


def data_nodes(lift: Lifter, region: list[fx.Node]) -> list[int]:
    """Indices of the nodes of the region that compute on rows."""
    return [lift.facts.order[n] for n in region if _is_data(lift.env.get(n))]


def _is_data(value: object) -> bool:
    return isinstance(value, Value) and value.kind is Kind.ROWS


def _written(node: fx.Node, first: int, last: int, order: dict[fx.Node, int], inside: set[fx.Node]) -> fx.Node | None:
    for user in node.users:
        if functional_target(user)[0] and user.args and user.args[0] is node and first < order[user] < last:
            return user
        view = is_call(user) and op_name(user) in VIEWS and user not in inside
        if view and (found := _written(user, first, last, order, inside)):
            return found
    return None
