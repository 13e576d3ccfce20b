"""The figure `ideal`: what the same number of tokens would cost under a router that is forced to be even."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ultraep_compile.planner.checks import checked_counts


def forced_counts(counts_RE: Tensor) -> Tensor:
    """int64 [R, E]: every source's tokens dealt over all experts; ranks' loads differ by at most one.

    Tokens are dealt one after the other, source after source, to the first expert of every rank, then to the
    second of every rank, and so on around.

    Example: counts [[4, 0], [3, 0]] become [[2, 2], [2, 1]].
    """
    counts = checked_counts(counts_RE, 0)
    ranks, experts = counts.shape
    end_R = counts.sum(1).cumsum()
    turn_E = np.arange(experts).reshape(-1, ranks).T.ravel()  # when, in a round, each expert's turn comes

    def dealt(tokens_R: np.ndarray) -> np.ndarray:
        """Of the first `tokens` tokens, how many each expert got."""
        return (tokens_R[:, None] - turn_E + experts - 1) // experts

    return torch.from_numpy(dealt(end_R) - dealt(end_R - counts.sum(1)))
