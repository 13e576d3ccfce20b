"""Every op passes torch's own opcheck: schema, autograd registration, fake kernels, tracing with dynamic shapes."""

from __future__ import annotations

import pytest
import torch

from tests.ops.expert_case import make_inputs, make_site
from ultraep_compile.ops import dispatch, grouped_gemm, replicate  # noqa: F401
from ultraep_compile.ops.layout import ExpertLayout

OPS = torch.ops.ultraep
LAYOUT = ExpertLayout(8, 4, 2)


def _routed(tokens: int):
    hidden, params, ids = make_inputs(tokens, 2, 8, torch.float32, 4.0)
    counts = OPS.expert_load(ids, None, 8, 4, "", "x")
    slot_expert, shares = OPS.plan(counts, 2, "quota", "x")
    return hidden, params, ids, counts, slot_expert, shares, OPS.reroute(ids, slot_expert, shares, 8, "", "x")


def _leaf(t):
    return t.detach().clone().requires_grad_()


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_integer_ops(tokens: int) -> None:
    _, _, ids, counts, slot_expert, shares, _ = _routed(tokens)
    torch.library.opcheck(OPS.expert_load.default, (ids, torch.randn(tokens, 8), 8, 4, "", "x"))
    torch.library.opcheck(OPS.plan.default, (counts, 2, "quota", "x"))
    torch.library.opcheck(OPS.reroute.default, (ids, slot_expert, shares, 8, "", "x"))


def test_grouped_products() -> None:
    offsets = torch.tensor([0, 8, 8, 24], dtype=torch.int32)
    x, masters, slots = torch.randn(40, 6), torch.randn(2, 6, 5), torch.randn(1, 6, 5)
    torch.library.opcheck(OPS.grouped_gemm.default, (_leaf(x), _leaf(masters), _leaf(slots), offsets))
    torch.library.opcheck(OPS.expert_take.default, (_leaf(masters), _leaf(slots), offsets, 40))
    y = OPS.grouped_gemm(x, masters, slots, offsets)
    expected = torch.cat([x[:8] @ masters[0], x[8:24] @ slots[0], torch.zeros(16, 5)])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("tokens", [0, 33])
def test_data_ops(tokens: int) -> None:
    hidden, params, _, _, slot_expert, shares, physical = _routed(tokens)
    torch.library.opcheck(OPS.replicate.default, (_leaf(params[0]), slot_expert, 8, ""))
    torch.library.opcheck(OPS.grad_reduce.default, (_leaf(torch.randn(8, 3, 2)), slot_expert, 8, ""))
    torch.library.opcheck(OPS.dispatch.default, (_leaf(hidden), physical, shares, 8, 20, 0, ""))
    buffer = torch.randn(dispatch.buffer_rows(20, LAYOUT, 4), 5)
    torch.library.opcheck(OPS.combine.default, (_leaf(buffer), physical, shares, 8, 20, 0, ""))


@pytest.mark.parametrize("tokens", [0, 33])
def test_experts(tokens: int) -> None:
    hidden, params, _, _, slot_expert, shares, physical = _routed(tokens)
    key = make_site(LAYOUT, torch.float32)
    torch.library.opcheck(
        OPS.experts.default, (_leaf(hidden), None, physical, slot_expert, shares, [_leaf(p) for p in params], [], key)
    )


def test_replicate_and_grad_reduce_are_adjoint() -> None:
    _, _, _, _, slot_expert, _, _ = _routed(60)
    x, y = torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 7, dtype=torch.float64)
    assert torch.allclose(
        (OPS.replicate(x, slot_expert, 8, "") * y).sum(), (x * OPS.grad_reduce(y, slot_expert, 8, "")).sum()
    )


def test_dispatch_and_combine_invert_each_other_over_all_rounds() -> None:
    hidden, _, _, _, _, shares, physical = _routed(60)
    total = 0
    for index in range(5):
        buffer, offsets = OPS.dispatch(hidden, physical, shares, 8, 12, index, "")
        assert offsets[-1] <= buffer.shape[0]
        total = total + OPS.combine(buffer, physical, shares, 8, 12, index, "")
    assert torch.equal(total, hidden.repeat_interleave(2, 0))
