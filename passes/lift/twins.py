"""Layers of a model are alike: a site whose nodes match those of a lifted one, node by node, is lifted by
renaming.

Models of a hundred layers are analysed once. The match covers everything that the interpretation looked at:
targets, arguments, shapes, dtypes, and who reads each node.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import fx

from ultraep_compile.passes.lift.lifter import Lifter
from ultraep_compile.passes.lift.nodes import GraphFacts, is_buffer, is_call, is_param, tensor
from ultraep_compile.passes.lift.site import Site
from ultraep_compile.passes.lift.sizes import same

_DEPTH = 4
"""How far back to compare nodes that the interpretation looked at without tracking them (arange, sizes,
casts).
"""


@dataclass(frozen=True, slots=True)
class Template:
    """A lifted site, and the nodes its interpretation looked at, in graph order."""

    site: Site
    looked_at: list[fx.Node]

    @classmethod
    def of(cls, site: Site, lift: Lifter) -> Template:
        order, last = lift.facts.order, lift.facts.order[site.output]
        nodes = {
            n for n in (*lift.reads, *lift.env, *lift.refused) if is_call(n) and order[n] <= last and not is_param(n)
        }
        nodes -= {site.hidden, site.ids, site.weight}
        return cls(site, sorted(nodes, key=order.__getitem__))


def match(facts: GraphFacts, template: Template, ids: fx.Node, anchors: list[fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """Node of the template -> node of this layer, if the layers are alike."""
    site = template.site
    if len(anchors) != len(site.anchors):
        return None
    pairing = _Pairing(facts, template, ids)
    if pairing.match_all() and all(pairing.to.get(a) is b for a, b in zip(site.anchors, anchors, strict=True)):
        return pairing.to
    return None


def renamed(site: Site, to: dict[fx.Node, fx.Node]) -> Site:
    """The site on other nodes; it shares the row function and the combine. Labels and gating are for the
    caller to set.
    """
    return dataclasses.replace(
        site,
        hidden=to[site.hidden],
        ids=to[site.ids],
        weight=None if site.weight is None else to[site.weight],
        params=[to[p] for p in site.params],
        consts=[to[c] for c in site.consts],
        output=to[site.output],
        region=[to[n] for n in site.region],
        anchors=[to[n] for n in site.anchors],
    )


class _Pairing:
    def __init__(self, facts: GraphFacts, template: Template, ids: fx.Node) -> None:
        self.facts, self.template = facts, template
        self.nodes = facts.nodes
        self.shift = facts.order[ids] - facts.order[template.site.ids]
        self.last = facts.order[template.site.output]
        self.to: dict[fx.Node, fx.Node] = {template.site.ids: ids}
        self.tracked = set(template.looked_at)

    def match_all(self) -> bool:
        site = self.template.site
        if not self._alike(site.ids, self.to[site.ids]) or not self._read_alike(site.ids, self.to[site.ids]):
            return False
        for a in self.template.looked_at:
            at = self.facts.order[a] + self.shift
            if not 0 <= at < len(self.nodes) or not self._pair(a, self.nodes[at], _DEPTH):
                return False
            if not self._read_alike(a, self.nodes[at]):
                return False
        return len(set(self.to.values())) == len(self.to)

    def _pair(self, a: fx.Node, b: fx.Node, depth: int) -> bool:
        """Pair two nodes and what they read; each node has one partner only."""
        if a in self.to:
            return self.to[a] is b
        self.to[a] = b
        site = self.template.site
        if not self._alike(a, b):
            return False
        if a in (site.hidden, site.weight) or not is_call(a) or is_param(a):
            return is_param(a) == is_param(b) and is_buffer(a) == is_buffer(b)
        if a.op != b.op or a.target != b.target or depth == 0:
            return False
        depth = depth if a in self.tracked else depth - 1
        return self._args(a.args, b.args, depth) and self._args(a.kwargs, b.kwargs, depth)

    def _args(self, a: Any, b: Any, depth: int) -> bool:
        if isinstance(a, fx.Node):
            return isinstance(b, fx.Node) and self._pair(a, b, depth)
        if type(a) is not type(b):
            return False
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(self._args(x, y, depth) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self._args(a[k], b[k], depth) for k in a)
        if isinstance(a, slice):
            return self._args((a.start, a.stop, a.step), (b.start, b.stop, b.step), depth)
        return a == b

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        x, y = tensor(a), tensor(b)
        if x is None or y is None:
            return x is None and y is None
        before, after = self.facts.shape(a), self.facts.shape(b)
        return x.dtype == y.dtype and len(before) == len(after) and all(map(same, before, after))

    def _read_alike(self, a: fx.Node, b: fx.Node) -> bool:
        order = self.facts.order
        readers = {order[u] + self.shift for u in a.users if order[u] <= self.last}
        return readers == {order[u] for u in b.users if order[u] <= self.last + self.shift}
