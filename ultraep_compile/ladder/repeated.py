"""Tokens whose ids name one expert twice: does a layer's own forward add both results, count the expert once, or neither?

`y[t] += ...` keeps one of two results for a token in forward and gives gradients to both, `index_add_` adds them, weights `[T, E]`
know an expert once. Ids of one top-k never repeat; others (of a caller, of a table, of several hash functions) may do so in a batch
that comes after `prepare`, whatever was recorded. So repeated ids are planted where the ids are made, in the module's own forward and
in the new one alike, and outputs and gradients are compared.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ultraep_compile.passes.lift.nodes import CASTS, RESHAPES, op_name

if TYPE_CHECKING:
    from ultraep_compile.ladder.recording import Recording

_WHOLE = (
    CASTS
    | RESHAPES
    | {"transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "unsqueeze", "squeeze", "expand"}
)
_ALONG_A_DIM = {"topk": 2, "sort": 1, "argsort": 1}
"""Selections whose places along a dim are distinct, and which argument names the dim."""


def are_distinct(recording: Recording, ids: fx.Node, tokens: int, choices: int) -> bool:
    """Do the ops that made ids of `tokens` rows of `choices` show that no row names an expert twice?"""
    if choices == 1:
        return True
    node = ids
    while node.op.startswith("call") and (op_name(node) in _WHOLE or _is_slice(node) or _is_shift(node)):
        node = node.all_input_nodes[0]
    name = op_name(node)
    if name == "getitem" and node.args[1] == 1 and isinstance(node.args[0], fx.Node):
        selection = node.args[0]
    elif name in ("argsort", "multinomial"):
        selection = node
    else:
        return False
    shape = tuple(recording.raw[node].shape)
    if op_name(selection) == "multinomial":
        replaced = selection.kwargs.get("replacement", selection.args[2] if len(selection.args) > 2 else False)
        return not replaced and len(shape) == 2 and shape[0] == tokens
    if op_name(selection) not in _ALONG_A_DIM:
        return False
    place = _ALONG_A_DIM[op_name(selection)]
    dim = selection.kwargs.get("dim", selection.args[place] if len(selection.args) > place else -1)
    if not isinstance(dim, int) or isinstance(dim, bool) or not shape:
        return False
    along = dim % len(shape)
    rows = recording.raw[node].numel() // max(shape[along], 1)
    return rows == tokens and along in (0, len(shape) - 1) and shape[along] >= choices


def _is_slice(node: fx.Node) -> bool:
    """Does a node pick places of a tensor by slices and numbers alone?"""
    if op_name(node) == "narrow":
        return True
    if node.target is not operator.getitem or len(node.all_input_nodes) != 1:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(i, slice) for i in index) and all(
        isinstance(i, (slice, int, type(None), type(...))) for i in index
    )


def _is_shift(node: fx.Node) -> bool:
    return op_name(node) in ("add", "sub") and len(node.all_input_nodes) == 1


def place_of_ids(recording: Recording, ids: fx.Node) -> fx.Node:
    """Where ids are made: the tensor of whose numbers `ids` is another form."""
    node = ids
    while node.op.startswith("call"):
        name, before = op_name(node), node.all_input_nodes
        if len(before) == 1 and (
            name in _WHOLE or (_is_slice(node) and recording.raw[before[0]].numel() == recording.raw[node].numel())
        ):
            source = before[0]
        elif name in ("one_hot", "eq"):  # which of all experts each number is
            source = next((a for a in before if recording.raw[a].numel() < recording.raw[node].numel()), node)
        else:
            break
        value = recording.raw.get(source)
        if source is node or value is None or value.is_floating_point() or value.dtype == torch.bool:
            break
        node = source
    return node


def plant(ids: Tensor, rows: int, choices: int) -> Tensor:
    """The same ids with rows that name an expert twice, or as often as it goes, between rows that stay.

    Args:
        ids: any form of [rows, choices], or of [choices, rows].

    Example:
        >>> plant(torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]]), 3, 3).tolist()
        [[0, 0, 0], [0, 1, 0], [0, 1, 2]]
    """
    by_choice = ids.dim() >= 2 and ids.shape[0] == choices and ids.shape[-1] != choices
    table = ids.reshape(choices, rows).t() if by_choice else ids.reshape(rows, choices)
    turn = torch.arange(rows, device=ids.device)[:, None] % 3
    last = torch.arange(choices, device=ids.device)[None, :] == choices - 1
    made = torch.where((turn == 0) | ((turn == 1) & last), table[:, :1], table)
    return (made.t() if by_choice else made).reshape(ids.shape)


def repeats(ids: Tensor) -> Tensor:
    """Which of ids [T, K] an earlier choice of the same token has named already: bool [T, K]."""
    return (ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1).any(2)


@torch.library.custom_op("ultraep::distinct", mutates_args=())
def distinct(ids: Tensor, live: Tensor | None) -> Tensor:
    """Ids [T, K] that must name no expert twice for a token: where one does, the second is `REPEATED - expert`, of which
    `expert_load`, where all ranks meet, makes an error that all of them raise.

    Args:
        live: bool [T, K]; pairs that count, or None for all.
    """
    from ultraep_compile.ops.routing import REPEATED

    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    if live is not None:
        same = same & live.unsqueeze(2) & live.unsqueeze(1)
    return torch.where(same.tril(-1).any(2), REPEATED - ids, ids)


@distinct.register_fake
def _(ids: Tensor, live: Tensor | None) -> Tensor:
    return torch.empty_like(ids)
