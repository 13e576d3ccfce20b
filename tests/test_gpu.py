"""The same promises on a CUDA device: virtual ranks, several gloo processes sharing one GPU, compiled models."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.balancing import assert_as_good_as_eager, compiled_step, oracle_step, prepared, step
from tests.multirank import run_ranks
from tests.ops.expert_case import balanced, make_inputs, make_site, oracle, relative
from ultraep_compile.ops.layout import ExpertLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CASES = {
    "skewed": (300, 2, 4, 2, 6.0),
    "rounds": (400, 2, 8, 0, 8.0),
    "tiny": (3, 2, 8, 2, 1.0),
    "none": (0, 2, 4, 1, 0.0),
}


def _run(function, hidden, params):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, *params)]
    y = function(leaves[0], leaves[1:])
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_virtual_ranks(case: str, dtype: torch.dtype) -> None:
    tokens, choices, ranks, slots, skew = CASES[case]
    layout = ExpertLayout(8, ranks, slots)
    key = make_site(layout, dtype)
    hidden, params, ids = make_inputs(tokens, choices, 8, dtype, skew)
    exact = _run(lambda h, p: oracle(h, p, ids), hidden.double(), [p.double() for p in params])
    device = [hidden.cuda(), [p.cuda() for p in params], ids.cuda()]
    eager = _run(lambda h, p: oracle(h, p, device[2], dtype), device[0], device[1])
    ours, again = (_run(lambda h, p: balanced(h, p, device[2], layout, key, "quota"), *device[:2]) for _ in range(2))
    plain = _run(lambda h, p: balanced(h, p, device[2], layout, key, "none"), *device[:2])
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert relative(mine.cpu(), truth) <= 2 * relative(theirs.cpu(), truth) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_family(family: str, inner: str) -> None:
    model, inputs = prepared(family, "grouped_mm", torch.bfloat16)
    exact = oracle_step(model, inputs)
    model, inputs = model.cuda(), {k: v.cuda() for k, v in inputs.items()}
    eager = step(model, model, inputs)
    ours, graphs = compiled_step(model, inputs, ranks=4, inner=inner)
    plain, _ = compiled_step(model, inputs, ranks=4, inner=inner, planner="none")
    assert sum(len(g.prepared) for g in graphs) > 0
    assert torch.equal(ours.loss, plain.loss)
    for s in (ours, eager):
        s.loss, s.grads = s.loss.cpu(), {k: g.cpu() for k, g in s.grads.items()}
    assert_as_good_as_eager(ours, eager, exact, floor=4 * torch.finfo(torch.bfloat16).eps)


def _process(rank: int) -> list[float]:
    import torch.distributed as dist

    group = dist.group.WORLD.group_name
    layout = ExpertLayout(8, 2, 2)
    key = make_site(layout, torch.float32, group, True)
    hidden, params, ids = make_inputs(90, 2, 8, torch.float32, 5.0)
    mine, here = slice(rank * 45, rank * 45 + 45), slice(rank * 4, rank * 4 + 4)
    leaves = [hidden[mine].cuda().requires_grad_()] + [p[here].cuda().requires_grad_() for p in params]
    y = balanced(leaves[0], leaves[1:], ids[mine].cuda(), layout, key, "quota", group)
    y.sum().backward()
    exact = [t.double().requires_grad_() for t in (hidden, *params)]
    z = oracle(exact[0], exact[1:], ids)
    z.sum().backward()
    errors = [relative(y.cpu(), z[rank * 90 : rank * 90 + 90]), relative(leaves[0].grad.cpu(), exact[0].grad[mine])]
    return errors + [relative(2 * a.grad.cpu(), b.grad[here]) for a, b in zip(leaves[1:], exact[1:], strict=True)]


def test_two_gloo_processes_share_the_gpu() -> None:
    for errors in run_ranks(2, _process):
        assert max(errors) < 1e-5


def test_default_placement_of_a_trace_on_a_gpu(tmp_path) -> None:
    from ultraep_compile.telemetry import get_recorder, read_trace, summarize

    model = zoo.HandMoE().cuda()
    path = tmp_path / "trace.npz"
    compiled_step(model, {"x": torch.randn(2, 64, zoo.WIDTH, device="cuda")}, ranks=8, trace=str(path))
    get_recorder(path).close()
    assert summarize(read_trace(path)).records == 1
