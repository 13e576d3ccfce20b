"""The two ops a lifted row function is written in: plain functions that later passes recognise by identity."""

from __future__ import annotations

from torch import Tensor


def expert_mm(rows: Tensor, weight: Tensor, expert_id: Tensor) -> Tensor:
    """Each row times the matrix of its expert. Rows whose id is not in 0..E-1 (padding) give zero.

    Args:
        rows: [N, I]; weight: [E, I, O]; expert_id: integer [N], in any order.
    Returns: [N, O]
    """
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        mine = (expert_id == expert).nonzero().flatten()
        if len(mine):
            out = out.index_copy(0, mine, rows[mine] @ weight[expert])
    return out


def expert_take(param: Tensor, expert_id: Tensor) -> Tensor:
    """Each row's part of a per-expert parameter, a bias say. Padded rows get some expert's: nobody reads
    them.

    Args:
        param: [E, ...]; expert_id: integer [N]
    Returns: [N, ...]
    """
    return param[expert_id.clamp(0, param.shape[0] - 1)]
