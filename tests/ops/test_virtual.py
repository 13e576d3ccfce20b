"""The balanced experts op on virtual ranks against plain gathers in fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.ops.expert_case import balanced, make_inputs, make_site, oracle, relative
from ultraep_compile.ops.layout import ExpertLayout

CASES = {  # tokens, choices, ranks, slots, skew
    "even": (64, 2, 4, 2, 0.0),
    "skewed": (64, 2, 4, 2, 6.0),
    "one-hot-expert": (40, 1, 8, 3, 100.0),
    "rounds": (200, 2, 8, 0, 8.0),
    "fewer-tokens-than-ranks": (3, 2, 8, 2, 1.0),
    "no-token": (0, 2, 4, 1, 0.0),
    "all-experts": (50, 8, 8, 2, 0.0),
    "twice-the-same": (40, 2, 4, 2, 3.0),
    "two-ranks-odd": (37, 3, 2, 1, 3.0),
}


def _gradients(function, hidden, params, seed=3):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, *params)]
    y = function(leaves[0], leaves[1:])
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return y.detach(), torch.autograd.grad(y, leaves, g.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_oracle_and_is_bitwise_unbalanced(case: str, dtype: torch.dtype) -> None:
    tokens, choices, ranks, slots, skew = CASES[case]
    layout = ExpertLayout(8, ranks, slots)
    key = make_site(layout, dtype)
    hidden, params, ids = make_inputs(tokens, choices, 8, dtype, skew)
    if case == "twice-the-same":
        ids = ids[:, :1].expand(-1, 2)
    ours = _gradients(lambda h, p: balanced(h, p, ids, layout, key, "quota"), hidden, params)
    plain = _gradients(lambda h, p: balanced(h, p, ids, layout, key, "none"), hidden, params)
    exact = _gradients(lambda h, p: oracle(h, p, ids), hidden.double(), [p.double() for p in params])
    eager = _gradients(lambda h, p: oracle(h, p, ids, dtype), hidden, params)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1][0], plain[1][0])  # a token's gradient does not depend on where it was computed
    for mine, theirs, truth in zip((ours[0], *ours[1]), (eager[0], *eager[1]), (exact[0], *exact[1]), strict=True):
        assert relative(mine, truth) <= 2 * relative(theirs, truth) + 4 * torch.finfo(dtype).eps


def test_weight_gradients_repeat_bitwise() -> None:
    layout = ExpertLayout(8, 4, 2)
    key = make_site(layout, torch.float32)
    hidden, params, ids = make_inputs(100, 2, 8, torch.float32, 5.0)
    first, second = (
        _gradients(lambda h, p: balanced(h, p, ids, layout, key, "quota"), hidden, params) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_poisoned_token_stays_alone() -> None:
    """A NaN token spoils its own outputs and gradients of its own experts, nothing else."""
    layout = ExpertLayout(8, 4, 2)
    key = make_site(layout, torch.float32)
    hidden, params, ids = make_inputs(30, 2, 8, torch.float32, 4.0)
    hidden[7] = float("nan")
    y, grads = _gradients(lambda h, p: balanced(h, p, ids, layout, key, "quota"), hidden, params)
    bad = y.view(30, 2, -1).isnan().flatten(1).any(1)
    assert bad.tolist() == [t == 7 for t in range(30)]
    touched = set(ids[7].tolist())
    for g in grads[1:]:
        assert {e for e in range(8) if g[e].isnan().any()} <= touched
    assert grads[0].isnan().any(1).tolist() == [t == 7 for t in range(30)]


def test_empty_memory_is_never_read() -> None:
    """With every uninitialised tensor filled with NaN (torch's deterministic mode does it), nothing changes."""
    layout = ExpertLayout(8, 4, 3)
    key = make_site(layout, torch.float32)
    hidden, params, ids = make_inputs(50, 2, 8, torch.float32, 5.0)
    run = lambda: _gradients(lambda h, p: balanced(h, p, ids, layout, key, "quota"), hidden, params)  # noqa: E731
    plain = run()
    torch.use_deterministic_algorithms(True)
    try:
        filled = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain[0], filled[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], filled[1], strict=True))


def test_overflow_makes_rounds_and_drops_nothing() -> None:
    from ultraep_compile.ops import experts as module

    layout = ExpertLayout(8, 8, 0)
    key = make_site(layout, torch.float32)
    hidden, params, ids = make_inputs(400, 1, 8, torch.float32, 100.0)  # one expert takes everything
    counts = torch.ops.ultraep.expert_load(ids, None, 8, 8, "", key)
    slot_expert, shares = torch.ops.ultraep.plan(counts, 0, "none", key)
    physical = torch.ops.ultraep.reroute(ids, slot_expert, shares, 8, "", key)
    call = module._Call.of(module._sites[key], physical, shares)
    assert call.rounds >= 5 and not call.keep
    y = balanced(hidden, params, ids, layout, key, "none")
    assert relative(y, oracle(hidden, params, ids)) < 1e-6
