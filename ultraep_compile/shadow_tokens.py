"""Which tokens of a layer differ, and where they went: tells a wrong copy from a wrong product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultraep_compile.ops.layout import physical_to_logical


def differing_tokens(
    ours: Tensor, theirs: Tensor, allowed: float, physical_TK: Tensor, slot_expert_RS: Tensor, counts_RE: Tensor
) -> dict[str, Any]:
    """Tokens whose rows differ by more than is allowed, how many of them had a choice that went to a copy, and each place's share.

    Args:
        ours, theirs: the layer's output in both graphs, [T, D], [batch, length, D], or before the sum over choices [T*K, D].
        physical_TK, slot_expert_RS, counts_RE: the layer's routing, plan and loads.
    Returns: JSON, with a `text` for people; empty text where outputs are no rows of tokens.
    """
    experts = counts_RE.shape[1]
    loads = {"rows_by_rank": counts_RE.sum(1).tolist(), "rows_by_expert": counts_RE.sum(0).tolist()}
    found: dict[str, Any] = {**loads, "copies": slot_expert_RS.tolist()}
    tokens = physical_TK.shape[0]
    rows = ours.numel() // max(ours.shape[-1], 1) if ours.dim() else 0
    if ours.numel() == 0 or rows not in (tokens, physical_TK.numel()):
        return {**found, "text": "its output has no row for each token"}
    mine, right = (t.detach().double().reshape(tokens, -1) for t in (ours, theirs))
    differs = (mine - right).norm(dim=1) > allowed * right.norm(dim=1).clamp_min(1e-30)
    differs |= mine.isfinite().all(1) != right.isfinite().all(1)
    logical = physical_to_logical(slot_expert_RS, experts)
    per_rank = logical.numel() // counts_RE.shape[0]
    masters = experts // counts_RE.shape[0]
    is_copy = torch.arange(logical.numel(), device=logical.device) % per_rank >= masters
    at = physical_TK.long()
    to_copies = int(is_copy[at].any(1)[differs].sum())
    everywhere = torch.bincount(at.flatten(), minlength=logical.numel())
    wrong = torch.bincount(at[differs].flatten(), minlength=logical.numel())
    places = [_place(p, per_rank, masters, int(logical[p])) for p in range(logical.numel())]
    found["places"] = {
        places[p]: {"tokens": int(everywhere[p]), "differing": int(wrong[p])} for p in range(logical.numel()) if wrong[p]
    }
    count = int(differs.sum())
    first = int(torch.nonzero(differs)[0]) if count else -1
    went = " and ".join(places[p] for p in at[first].tolist()) if count else "nowhere"
    all_copied = f", {to_copies} of them sent to a copy" if int(is_copy[at].any()) else ", and nothing was copied"
    text = f"{count} of {tokens} tokens differ{all_copied}; the first is token {first}, which went to {went}"
    return {**found, "differing": count, "to_copies": to_copies, "first": first, "text": text}


def _place(physical: int, per_rank: int, masters: int, expert: int) -> str:
    rank, local = divmod(physical, per_rank)
    return f"expert {expert} at home on rank {rank}" if local < masters else f"the copy of expert {expert} on rank {rank}"
