"""What detection finds in a graph: a site that can be rewritten, or a miss with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One MoE layer of a graph. Making it changed nothing in the graph."""

    name: str
    """Module path as in `named_modules()`, or a node name; a label only, unique in its graph."""

    source: str
    """Source line of the anchor, if known."""

    experts: int
    top_k: int
    gating: str
    """By data flow from the ids back to the scores: `softmax-topk`, `topk-softmax`, `sigmoid-topk`,
    `sigmoid-bias-topk`, `group-limited`, `top-p`, `topk`, `argmax`, `capacity`, `table`, `given` (by the
    caller, or computed from what it gives without any scores), or `unknown`."""

    hidden: fx.Node
    """Token states [T, D_in] as the experts read them."""

    ids: fx.Node
    """Expert ids, T*K entries in this order, as the model has them. `make_rows` is given a site with ids [T, K]."""

    weight: fx.Node | None
    """Routing weights, T*K entries, [T, K] as a rule; None if combine and rows use none."""

    scores: fx.Node | None
    """Raw router scores [T, >= E], the output of the router's last product, if one was found."""

    params: list[fx.Node]
    """Per-expert tensors, dim 0 = expert: parameters and buffers, raw (placeholders, get_attr nodes, unshard calls), or
    what the model computes from such alone."""

    consts: list[fx.Node]
    """Shared parameters, buffers and 0-d scalars that the row function reads."""

    row_function: fx.GraphModule
    """(rows [N, D_in], expert_id [N], (weight [N, 1] if `uses_weight`), *params, *consts) -> [N, D_out], for
    any N rows in any order, padding included. Written with `expert_mm` and `expert_take`; no number of
    experts is baked in.
    """

    uses_weight: bool
    combine: fx.GraphModule
    """(y [T*K, D_out] in pair order, weight [T, K], T, K) -> what `output` holds: the model's own ops."""

    width: int
    """D_out."""

    dtype: torch.dtype
    """Of y."""

    output: fx.Node
    region: list[fx.Node]
    """The nodes that the rewrite replaces, in graph order."""

    anchors: list[fx.Node] = field(default_factory=list)
    divided: tuple[str, int] | None = None
    """Group and its size, where the model divides the experts over ranks by itself: `params` are this rank's."""

    python_state: dict[str, str] = field(default_factory=dict)
    """What the layer's forward read in Python and a compiled graph has fixed: all ranks of a group must have it alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Miss:
    """Something that looks like a MoE layer and was not lifted."""

    name: str
    source: str
    reason: str
    """What was matched, and the nearest miss: the node and what was expected of it."""

    anchors: list[fx.Node]
