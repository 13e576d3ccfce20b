"""Einsums with the experts' weights, in steps: the same numbers, and rows that stand where the experts' dims do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ultraep_compile.ladder.explicit import explicit

SIZES = {"b": 2, "t": 5, "o": 3, "i": 4, "d": 6, "e": 7, "c": 2}
STEPS = [
    "oibtd,oide->bte",  # summed over both levels
    "iobtd,oide->bte",
    "td,ide->tie",  # rows that all experts read
    "td,ide->eti",
    "btd,ied->ibte",
    "td,oide->te",
    "ti,tid,ide->te",  # weighted and summed
    "to,ti,toid,oide->te",
    "btd,bto,bti->oibtd",  # dispatch over two levels
    "oibte,bto,bti->bte",
]
ONE_STEP = ["itd,ide->ite", "tid,ied->tie", "bti,ibte->bte", "itd,ide->ie", "tid,iid->td"]


def operands(equation, weight):
    torch.manual_seed(0)
    made = [torch.randn([SIZES[c] for c in part], dtype=torch.float64) for part in equation.partition("->")[0].split(",")]
    at = equation.partition("->")[0].split(",").index(weight) if weight else None
    return [nn.Parameter(t) if i == at else t for i, t in enumerate(made)]


def weight_of(equation):
    parts = equation.partition("->")[0].split(",")
    return next((p for p in reversed(parts) if len(p) >= 3 and not {"b", "t"} & set(p)), None)


@pytest.mark.parametrize("equation", STEPS)
def test_same_numbers(equation):
    given = operands(equation, weight_of(equation))
    found = explicit("einsum", (equation, *given))
    assert found is not None
    torch.testing.assert_close(found, torch.einsum(equation, *given))


@pytest.mark.parametrize("equation", ONE_STEP)
def test_one_step_stays(equation):
    shapes = [p for p in equation.partition("->")[0].split(",")]
    weight = weight_of(equation) if "iid" not in shapes else None
    if "iid" in shapes:
        given = [torch.randn(5, 4, 6), nn.Parameter(torch.randn(4, 4, 6))]
        assert explicit("einsum", (equation, *given)) is None
    else:
        assert explicit("einsum", (equation, *operands(equation, weight))) is None


def test_matmul_of_rows_that_all_experts_read():
    weight = nn.Parameter(torch.randn(4, 6, 7, dtype=torch.float64))
    x = torch.randn(5, 6, dtype=torch.float64)
    for rows in (x, x[None]):
        found = explicit("matmul", (rows, weight))
        assert found is not None
        torch.testing.assert_close(found, torch.matmul(rows, weight))
    assert explicit("matmul", (x.expand(4, 5, 6), weight)) is None
    assert explicit("matmul", (x, weight[0])) is None
