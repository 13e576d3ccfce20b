"""Products of several operands in steps that show what each does: rows against the experts' matrices, then weights, then sums.

An einsum may do all of it at once (`oitd,oide->te` multiplies every row with the matrix of its expert and sums over the experts
of both levels). The steps give the same numbers up to rounding; they are recorded in its place, and the check against the
module's own forward is made with the module's own einsum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def explicit(name: str, args: Sequence[Any]) -> Tensor | None:
    """The result of an einsum or a matmul with the weights of experts in steps; None where it is one step."""
    if name == "einsum" and args and isinstance(args[0], str):
        operands = list(args[1:])
        operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
        inputs, arrow, out = args[0].replace(" ", "").partition("->")
        letters = inputs.split(",")
        if arrow and "." not in args[0] and len(letters) == len(operands) >= 2:
            return _einsum(letters, operands, out)
    if name in ("matmul", "__matmul__") and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
        return _matmul(*args)
    return None


def _is_weight(tensor: Tensor) -> bool:
    return tensor.dim() >= 3 and (isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter))


def _einsum(letters: list[str], operands: list[Tensor], out: str) -> Tensor | None:
    weights = [i for i, t in enumerate(operands) if _is_weight(t)]
    if len(operands) == 2:
        return _rows_by_matrices(letters, operands, weights[0], out) if len(weights) == 1 else None
    if not weights:  # dispatch or combine: what is not the widest says who goes where
        return _apart(letters, operands, max(range(len(operands)), key=lambda i: operands[i].numel()), out)
    if len(weights) > 1:
        return None
    return _weighted_product(letters, operands, weights[0], out)


def _apart(letters: list[str], operands: list[Tensor], main: int, out: str) -> Tensor:
    """All operands but one are multiplied with each other first: `td,to,ti->oitd` by way of `to,ti->toi`."""
    rest = [i for i in range(len(operands)) if i != main]
    joint = "".join(dict.fromkeys(c for i in rest for c in letters[i] if c in out or c in letters[main]))
    weight = torch.einsum(f"{','.join(letters[i] for i in rest)}->{joint}", *(operands[i] for i in rest))
    return torch.einsum(f"{letters[main]},{joint}->{out}", operands[main], weight)


def _weighted_product(letters: list[str], operands: list[Tensor], at: int, out: str) -> Tensor | None:
    """`te,td,edf->tf`: rows by matrices first, then the weights of what came out."""
    inner = [c for c in letters[at][-2:] if c not in out]
    with_inner = [i for i in range(len(operands)) if i != at and inner and inner[0] in letters[i]]
    if len(inner) != 1 or len(with_inner) != 1:
        return None
    x = with_inner[0]
    rest = [i for i in range(len(operands)) if i not in (at, x)]
    kept = dict.fromkeys(c for c in letters[at][:-2] + letters[x] if c != inner[0])
    made = "".join(kept) + letters[at][-2:].replace(inner[0], "")
    y = _rows_by_matrices([letters[x], letters[at]], [operands[x], operands[at]], 1, made)
    if y is None:
        y = torch.einsum(f"{letters[x]},{letters[at]}->{made}", operands[x], operands[at])
    if len(rest) > 1:
        return _apart([*(letters[i] for i in rest), made], [*(operands[i] for i in rest), y], len(rest), out)
    return torch.einsum(f"{letters[rest[0]]},{made}->{out}", operands[rest[0]], y)


def _rows_by_matrices(letters: list[str], operands: list[Tensor], at: int, out: str) -> Tensor | None:
    """One product with a row for every matrix; experts that are summed over are so afterwards, rows read by several are repeated."""
    of_weight, of_x, weight, x = letters[at], letters[1 - at], operands[at], operands[1 - at]
    experts, matrix = of_weight[:-2], of_weight[-2:]
    inner = [c for c in matrix if c in of_x and c not in out]
    outer = [c for c in matrix if c in out and c not in of_x]
    repeated = any(len(set(part)) < len(part) for part in (of_weight, of_x))
    if len(inner) != 1 or len(outer) != 1 or repeated or set(of_x) - set(experts) - set(out) != {inner[0]}:
        return None
    lost = "".join(c for c in experts if c not in out)
    rows = lost + out.replace(outer[0], "")
    if not lost and of_x == rows + inner[0] and out[-1] == outer[0]:
        return None
    sizes = dict(zip(of_weight, weight.shape, strict=True)) | dict(zip(of_x, x.shape, strict=True))
    there = [c for c in rows if c in of_x]
    x = x.permute(*(of_x.index(c) for c in (*there, inner[0])))
    for place, c in enumerate(rows):
        if c not in of_x:
            x = x.unsqueeze(place)
    x = x.expand(*(sizes[c] for c in rows), sizes[inner[0]])
    y = torch.einsum(f"{rows}{inner[0]},{of_weight}->{rows}{outer[0]}", x, weight)
    y = y.sum(tuple(range(len(lost)))) if lost else y
    left = rows[len(lost) :] + outer[0]
    return y if left == out else y.permute(*(left.index(c) for c in out))


def _matmul(x: Tensor, weight: Tensor) -> Tensor | None:
    """Rows that several experts read, repeated for each of them."""
    lead = weight.shape[:-2]
    if not _is_weight(weight) or x.dim() < 2 or x.dim() > weight.dim() or x.shape[:-2] == lead:
        return None
    if any(size != 1 for size in x.shape[:-2]):
        return None
    return torch.matmul(x.expand(*lead, *x.shape[-2:]), weight)
