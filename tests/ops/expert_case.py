"""A hand-built MoE site with bias, for tests of the ops: gated experts without any model around them."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from ultraep_compile.codegen.row_function import RowSignature, TensorSpec, compile_row_function
from ultraep_compile.ops.experts import ExpertSite, register_site
from ultraep_compile.ops.layout import ExpertLayout

D, F = 24, 20


def expert_mm(x: Tensor, w: Tensor, expert_id: Tensor) -> Tensor:
    raise AssertionError("a marker, never run")


def expert_take(p: Tensor, expert_id: Tensor) -> Tensor:
    raise AssertionError("a marker, never run")


def row_function() -> fx.GraphModule:
    g = fx.Graph()
    rows, eid, up, down, bias = (g.placeholder(n) for n in ("rows", "expert_id", "up", "down", "bias"))
    x = g.call_function(expert_mm, (rows, g.call_method("transpose", (up, -2, -1)), eid))
    x = g.call_function(torch.add, (x, g.call_function(expert_take, (bias, eid))))
    halves = g.call_method("chunk", (x, 2, -1))
    gate, value = (g.call_function(operator.getitem, (halves, i)) for i in (0, 1))
    x = g.call_function(operator.mul, (g.call_function(nn.functional.silu, (gate,)), value))
    g.output(g.call_function(expert_mm, (x, g.call_method("transpose", (down, -2, -1)), eid)))
    return fx.GraphModule(nn.Module(), g)


def make_site(layout: ExpertLayout, dtype: torch.dtype, group: str = "", sharded: bool = False) -> str:
    hosted = 1 if group else layout.ranks
    spec = TensorSpec
    signature = RowSignature(
        masters=hosted * layout.masters,
        slots=hosted * layout.slots,
        rows=spec((D,), dtype),
        weight=None,
        params=(spec((2 * F, D), dtype), spec((D, F), dtype), spec((2 * F,), dtype)),
        consts=(),
    )
    program = compile_row_function(
        row_function(), signature, is_product=lambda t: t is expert_mm, is_take=lambda t: t is expert_take
    )
    key = f"case@{layout}{dtype}{group}{sharded}"
    register_site(key, ExpertSite("case", layout, group, sharded, program))
    return key


def make_inputs(tokens: int, choices: int, experts: int, dtype: torch.dtype, skew: float, seed: int = 0):
    """(hidden [T, D], params, ids [T, K]); larger `skew` sends more tokens to the first experts."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, D, generator=g).to(dtype)
    params = [
        torch.randn(*s, generator=g).mul(0.3).to(dtype)
        for s in ((experts, 2 * F, D), (experts, D, F), (experts, 2 * F))
    ]
    scores = torch.randn(tokens, experts, generator=g) + skew * torch.linspace(1, 0, experts)
    return hidden, params, scores.topk(choices)[1]


def balanced(
    hidden: Tensor, params: list[Tensor], ids: Tensor, layout: ExpertLayout, key: str, planner: str, group: str = ""
):
    """The four ops as the rewritten graph calls them: expert outputs in pair order [T*K, D]."""
    ops = torch.ops.ultraep
    counts = ops.expert_load(ids, None, layout.experts, layout.ranks, group, key)
    slot_expert, shares = ops.plan(counts, layout.slots, planner, key)
    physical = ops.reroute(ids, slot_expert, shares, layout.experts, group, key)
    return ops.experts(hidden, None, physical, slot_expert, shares, params, [], key)[0]


def oracle(hidden: Tensor, params: list[Tensor], ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same by plain gathers, in `dtype`."""
    up, down, bias = (p.to(dtype) for p in params)
    flat = ids.flatten()
    x = torch.einsum("nd,nfd->nf", hidden.to(dtype).repeat_interleave(ids.shape[1], 0), up[flat]) + bias[flat]
    gate, value = x.chunk(2, -1)
    return torch.einsum("nf,ndf->nd", nn.functional.silu(gate) * value, down[flat])


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item() if b.numel() else 0.0
