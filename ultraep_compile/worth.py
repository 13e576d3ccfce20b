"""From how many tokens on a plan pays: the option `balance_from`, and what `explain` says about it.

Below the threshold nothing is planned or copied; experts compute where they are at home, and the result has the same bits.
A decoding step, of one token for each sequence, is the case in point.
"""

from __future__ import annotations

import functools
import math

import torch

from ultraep_compile.cost_model import Layer, Loads, Rates, break_even, occurrences
from ultraep_compile.ops.experts import ExpertSite
from ultraep_compile.planner import make_plan

NEVER = 2**31 - 1
_ROWS = 4096
"""Routed pairs of each rank in the loads that the threshold is worked out for."""


def least_pairs(site: ExpertSite, top_k: int, balance_from: int | str, training: bool) -> int:
    """Routed pairs of all ranks below which a layer is not planned; 0: always planned."""
    if balance_from == "auto":
        tokens = tokens_to_break_even(site, top_k, training)
        return NEVER if tokens is None else min(tokens * top_k, NEVER)
    return int(balance_from) * top_k


def tokens_to_break_even(site: ExpertSite, top_k: int, training: bool) -> int | None:
    """Tokens of all ranks from which on balancing pays, by the cost model with its default rates; None: it never does.

    The loads are those of a router whose n-th expert gets 1/n of the first one's tokens, equal on all ranks.
    """
    facts, layout = site.program.signature, site.layout
    expert_bytes = sum(p.elements * p.dtype.itemsize for p in facts.params)
    layer = Layer(
        top_k=top_k,
        row_bytes=facts.rows.elements * facts.rows.dtype.itemsize,
        flops_per_row=site.program.flops_per_row,
        expert_bytes=expert_bytes,
        gradient_bytes=expert_bytes,
        kept_bytes=site.program.kept_bytes_per_row,
    )
    return _solved(layer, layout.experts, layout.ranks, layout.slots, training)


@functools.lru_cache(maxsize=256)
def _solved(layer: Layer, experts: int, ranks: int, slots: int, training: bool) -> int | None:
    if ranks == 1 or slots == 0:
        return None
    share = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    counts = (share / share.sum() * _ROWS).round().to(torch.int32).expand(ranks, -1).contiguous()
    rates = Rates()
    before, after = (Loads.of(make_plan(counts, slots, planner), rates) for planner in ("none", "quota"))
    tokens = break_even(before, after, layer, rates, occurrences("train" if training else "forward"))
    return None if tokens is None else math.ceil(tokens * ranks)
