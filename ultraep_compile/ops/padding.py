"""Tokens that only fill up a batch: routed and computed like all others, but neither judged nor counted."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ultraep_compile.errors import OptionError

_real: ContextVar[Tensor | bool] = ContextVar("real tokens", default=True)


@contextlib.contextmanager
def real_tokens(mask: Tensor | bool) -> Iterator[None]:
    """Say which tokens of the calls inside the block count; the others are padding.

    Padding is routed, planned for and computed as always, since the model does compute it, and results do not change. But
    traces do not count it, and scores that are not finite are no error there: what fills up a batch may be anything.

    Args:
        mask: bool or integer, one entry a token in the order in which this process gives them to the model ([batch,
            length], as an `attention_mask`); False for a step none of whose tokens counts: a warm-up, or the dummy batch of
            a rank that has nothing to do.
    Raises: OptionError for a mask of another kind.

    Layers with another number of tokens (a vision encoder's, a decoding step's) are counted whole, with one warning.

        with ultraep_compile.real_tokens(batch["attention_mask"]):
            loss = model(**batch).loss
    """
    if isinstance(mask, Tensor):
        if mask.is_floating_point() or mask.is_complex() or mask.dim() not in (1, 2):
            raise OptionError(
                f"real_tokens got a mask of shape {list(mask.shape)} and {mask.dtype}. Pass True or 1 for real tokens and "
                "False or 0 for padding, as bool or integer [tokens] or [batch, length]."
            )
    elif not isinstance(mask, bool):
        raise OptionError(f"real_tokens got {mask!r}. Pass a mask, or False where no token is real.")
    before = _real.set(mask)
    try:
        yield
    finally:
        _real.reset(before)


def real_among(tokens: int, device: torch.device) -> Tensor | None:
    """Which of a layer's tokens are real, bool [T]; None: all."""
    mask = _real.get()
    if mask is True:
        return None
    if mask is False:
        return torch.zeros(tokens, dtype=torch.bool, device=device)
    if mask.numel() != tokens:
        _warn_of_sizes(mask.numel(), tokens)
        return None
    return mask.to(device, torch.bool).flatten()


@functools.lru_cache(maxsize=64)
def _warn_of_sizes(entries: int, tokens: int) -> None:
    warnings.warn(
        f"ultraep: real_tokens has a mask of {entries} entries, but a layer routes {tokens} tokens; all of these are counted.",
        stacklevel=2,
    )
