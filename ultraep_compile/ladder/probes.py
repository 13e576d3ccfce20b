"""Probe batches: a call of a module with other numbers of tokens, or with tokens that all go the same way."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultraep_compile.ladder.recording import Call
from ultraep_compile.passes.lift.values import Refusal


def main_input(call: Call) -> Tensor:
    """The token states: the first float tensor of at least two dims."""
    for tensor in call.tensors():
        if tensor.is_floating_point() and tensor.dim() >= 2:
            return tensor
    raise Refusal("its forward takes no tensor of token states")


def resized(
    call: Call, lead: tuple[int, ...], seed: int, *, skewed: bool = False, gain: float = 1.0, rank: int = 0
) -> Call:
    """The call with other numbers of tokens: rows drawn from its own, token states random, `gain` times as large.

    Args:
        skewed: tokens that all go the same way: alike in what a router reads, and one row of the call's own for all of them (ids
            and weights may be among these).
        rank: others have other tokens.
    """
    states = main_input(call)
    old = tuple(states.shape[:-1])
    generator = torch.Generator().manual_seed(seed + 1000 * rank)
    picks = [torch.randint(0, n, (m,), generator=generator) for n, m in zip(old, lead, strict=True)]
    if skewed:
        picks = [pick[:1].expand_as(pick) for pick in picks]
    flat = picks[0]
    for size, pick in zip(old[1:], picks[1:], strict=True):
        flat = (flat[:, None] * size + pick).flatten()
    made = []
    for tensor in call.tensors():
        if tensor is states:
            scale = gain * deviation(call)
            noise = torch.randn(*lead, states.shape[-1], generator=generator)
            if skewed:
                noise = noise * 0.05 + torch.randn(states.shape[-1], generator=generator)
            new = (noise * scale).to(states.device, states.dtype)
        elif tensor.shape[: len(old)] == old:
            new = tensor.detach()
            for dim, pick in enumerate(picks):
                new = new.index_select(dim, pick.to(tensor.device))
        elif _counts_rows(tensor, math.prod(old)):
            new = torch.tensor(_shares(math.prod(lead), len(tensor), generator, skewed)).to(tensor)
        elif tensor.dim() and tensor.shape[0] == math.prod(old):
            new = tensor.detach().index_select(0, flat.to(tensor.device))
        elif len(old) > 1 and tensor.dim() and tensor.shape[0] == old[0]:  # something of each sample
            new = tensor.detach().index_select(0, picks[0].to(tensor.device))
        else:
            new = tensor.detach()
        made.append(new.clone())
    sizes = [_shares(math.prod(lead), len(s), generator, skewed) if sum(s) == math.prod(old) else s for s in call.sizes()]
    return call.with_tensors(made).with_sizes(sizes)


def small(call: Call) -> Call:
    """A call that is good for `resized` as this one is, but holds one row of token states for all: only their size matters."""
    states = main_input(call)
    row = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0)) * deviation(call)
    row = row.to(states.device, states.dtype)
    return call.with_tensors([row.expand(t.shape) if t is states else t.detach().clone() for t in call.tensors()])


def deviation(call: Call) -> float:
    """Standard deviation of the token states."""
    return float(main_input(call).float().std()) or 1.0


def _counts_rows(tensor: Tensor, rows: int) -> bool:
    """How many rows each expert has: integers that add up to all of them."""
    whole = tensor.dim() == 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool
    return whole and tensor.numel() != rows and int(tensor.sum()) == rows


def _shares(total: int, parts: int, generator: torch.Generator, skewed: bool = False) -> list[int]:
    """Random sizes of `parts` groups; skewed, one of them has everything."""
    if skewed:
        favourite = int(torch.randint(0, parts, (1,), generator=generator))
        return [total * (part == favourite) for part in range(parts)]
    return torch.bincount(torch.randint(0, parts, (total,), generator=generator), minlength=parts).tolist()


def probe_leads(call: Call, experts: int) -> list[tuple[int, ...]]:
    """Two sizes to record, with enough tokens for every expert to get some, and more to check, the call's own among them."""
    rank = main_input(call).dim() - 1
    own = tuple(main_input(call).shape[:-1])
    if rank == 1:
        return [(13 * experts,), (11 * experts,), (5 * experts,), own, (37,), _many(own)]
    rest = (1,) * (rank - 2)
    return [(experts, *rest, 13), (2 * experts, *rest, 11), (experts, *rest, 7), own, (3, *rest, 29), _many(own)]


def more_leads(call: Call) -> list[tuple[int, ...]]:
    """Further sizes to record, to tell how Python computes with them: small ones first, where a least size shows."""
    rank = main_input(call).dim() - 1
    if rank == 1:
        return [(n,) for n in (3, 18, 64, 129, 200, 512, 777, 1536)]
    rest = (1,) * (rank - 2)
    return [(b, *rest, n) for b, n in ((1, 3), (2, 9), (1, 64), (3, 129), (2, 200), (1, 512), (4, 333), (2, 1536))]


def _many(own: tuple[int, ...]) -> tuple[int, ...]:
    """More tokens than a capacity may have been made for, as far as that is cheap."""
    times = max(1, min(4, 8192 // max(math.prod(own), 1)))
    return (times * own[0], *own[1:])


