"""What only the symmetric transport does: buffers that grow, rounds, missing ranks, the choice of a transport."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from torch import fx

from tests.multirank import fake_group, run_ranks
from tests.ops.expert_case import balanced, expert_mm, make_inputs, make_site, oracle, relative
from ultraep_compile.codegen.row_function import RowSignature, TensorSpec, compile_row_function
from ultraep_compile.errors import PeerTimeoutError
from ultraep_compile.ops import plane
from ultraep_compile.ops.experts import ExpertSite, register_site
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.transport import CollectiveTransport, SymmetricTransport, choose_transport, transport_for

DEADLINE_S = 3


def _group(deadline_s: int = 60) -> str:
    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name
    choose_transport(name, "symmetric", deadline_s)
    return name


def _step(rank: int, ranks: int, tokens: int, layout: ExpertLayout, key: str, group: str, seed: int) -> float:
    """Largest relative error of output and gradients of one step against fp64."""
    hidden, params, ids = make_inputs(tokens * ranks, 2, layout.experts, torch.float32, 4.0, seed)
    mine = slice(rank * tokens, (rank + 1) * tokens)
    here = slice(rank * layout.masters, (rank + 1) * layout.masters)
    leaves = [hidden[mine].clone().requires_grad_(), *(p[here].clone().requires_grad_() for p in params)]
    y = balanced(leaves[0], leaves[1:], ids[mine], layout, key, "quota", group)
    grads = torch.autograd.grad(y.sum(), leaves)
    exact = [t.double().requires_grad_() for t in (hidden, *params)]
    z = oracle(exact[0], exact[1:], ids)
    right = torch.autograd.grad(z.sum(), exact)
    pairs = [(y.detach(), z.detach()[mine.start * 2 : mine.stop * 2]), (grads[0], right[0][mine])]
    pairs += [(ranks * a, b[here]) for a, b in zip(grads[1:], right[1:], strict=True)]
    return max(relative(a, b) for a, b in pairs)


def _batches(rank: int) -> tuple[float, list[int], int]:
    group, layout = _group(), ExpertLayout(4, 2, 1)
    key = make_site(layout, torch.float32, group, True)
    worst, capacities = 0.0, []
    for seed, tokens in enumerate((8, 200, 200, 3, 50)):
        worst = max(worst, _step(rank, 2, tokens, layout, key, group, seed))
        (only,) = plane.planes()
        capacities.append(only.capacity)
    plane.close_planes()
    worst = max(worst, _step(rank, 2, 30, layout, key, group, 9))  # opens it again
    return worst, capacities, plane.reserved_bytes()


def test_batches_of_any_size_share_buffers_that_grow() -> None:
    layout = ExpertLayout(4, 2, 1)
    for worst, capacities, held in run_ranks(2, _batches):
        assert worst < 1e-6
        small, large = layout.capacity(8 * 2 * 2), layout.capacity(200 * 2 * 2)
        assert capacities == [small, large, large, large, large] and held > 0


def _weighted_rows() -> fx.GraphModule:
    """y = (rows * weight) @ w[expert] * scale: a routing weight before the product, a shared tensor after it."""
    g = fx.Graph()
    rows, eid, weight, w, scale = (g.placeholder(n) for n in ("rows", "expert_id", "weight", "w", "scale"))
    x = g.call_function(operator.mul, (rows, weight))
    g.output(g.call_function(operator.mul, (g.call_function(expert_mm, (x, w, eid)), scale)))
    return fx.GraphModule(torch.nn.Module(), g)


def _weighted(rank: int) -> float:
    group, layout, tokens = _group(), ExpertLayout(4, 2, 1), 60
    spec, dtype = TensorSpec, torch.float32
    signature = RowSignature(2, 1, spec((8,), dtype), spec((1,), dtype), (spec((8, 12), dtype),), (spec((12,), dtype),))
    program = compile_row_function(
        _weighted_rows(), signature, is_product=lambda t: t is expert_mm, is_take=lambda t: False
    )
    register_site("weighted@1", ExpertSite("weighted", layout, group, True, program))
    g = torch.Generator().manual_seed(4)
    hidden, w = torch.randn(2 * tokens, 8, generator=g), torch.randn(4, 8, 12, generator=g)
    weight, scale = torch.rand(2 * tokens, 2, generator=g), torch.randn(12, generator=g)
    ids = (torch.randn(2 * tokens, 4, generator=g) + torch.tensor([3.0, 1, 0, 0])).topk(2)[1]
    mine, here = slice(rank * tokens, (rank + 1) * tokens), slice(2 * rank, 2 * rank + 2)
    worst, outputs = 0.0, []
    for planner in ("quota", "none"):
        leaves = [t.clone().requires_grad_() for t in (hidden[mine], weight[mine], w[here], scale)]
        ops, own = torch.ops.ultraep, ids[mine]
        counts = ops.expert_load(own, None, 4, 2, group, "weighted@1")
        plan = ops.plan(counts, 1, planner, "weighted@1")
        physical = ops.reroute(own, *plan, 4, group, "weighted@1")
        y = ops.experts(*leaves[:2], physical, *plan, [leaves[2]], [leaves[3]], "weighted@1")[0]
        grads = torch.autograd.grad(y.square().sum(), leaves)
        exact = [t.double().requires_grad_() for t in (hidden, weight, w, scale)]
        z = torch.einsum("tkd,tkdo->tko", exact[0].unsqueeze(1) * exact[1].unsqueeze(2), exact[2][ids]) * exact[3]
        right = torch.autograd.grad(z.square().sum(), exact)
        shared = grads[3].clone()
        dist.all_reduce(shared)
        pairs = [(y, z[mine].flatten(0, 1)), (grads[0], right[0][mine]), (grads[1], right[1][mine])]
        pairs += [(2 * grads[2], right[2][here]), (shared, right[3])]
        worst = max([worst, *(relative(a.detach(), b.detach()) for a, b in pairs)])
        outputs.append((y.detach(), grads[0], grads[1]))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    return worst


def test_routing_weights_and_shared_tensors_travel_too() -> None:
    assert max(run_ranks(2, _weighted)) < 2e-6


def _added_weights() -> fx.GraphModule:
    """y = rows @ (a + b)[expert].T: stored [E, O, I], and one gradient for both."""
    g = fx.Graph()
    rows, eid, a, b = (g.placeholder(n) for n in ("rows", "expert_id", "a", "b"))
    turned = g.call_method("transpose", (g.call_function(operator.add, (a, b)), -2, -1))
    g.output(g.call_function(expert_mm, (rows, turned, eid)))
    return fx.GraphModule(torch.nn.Module(), g)


def _added(rank: int) -> float:
    group, layout, tokens = _group(), ExpertLayout(4, 2, 1), 60
    spec, dtype = TensorSpec, torch.float32
    signature = RowSignature(2, 1, spec((8,), dtype), None, (spec((12, 8), dtype),) * 2, ())
    program = compile_row_function(
        _added_weights(), signature, is_product=lambda t: t is expert_mm, is_take=lambda t: False
    )
    register_site("added@1", ExpertSite("added", layout, group, True, program))
    g = torch.Generator().manual_seed(5)
    hidden, a, b = (torch.randn(n, *size, generator=g) for n, size in ((2 * tokens, (8,)), (4, (12, 8)), (4, (12, 8))))
    ids = (torch.randn(2 * tokens, 4, generator=g) + torch.tensor([3.0, 1, 0, 0])).topk(2)[1]
    mine, here = slice(rank * tokens, (rank + 1) * tokens), slice(2 * rank, 2 * rank + 2)
    leaves = [t.clone().requires_grad_() for t in (hidden[mine], a[here], b[here])]
    ops, own = torch.ops.ultraep, ids[mine]
    plan = ops.plan(ops.expert_load(own, None, 4, 2, group, "added@1"), 1, "quota", "added@1")
    assert int(plan[0].max()) >= 0, "nothing is copied"
    physical = ops.reroute(own, *plan, 4, group, "added@1")
    y = ops.experts(leaves[0], None, physical, *plan, leaves[1:], [], "added@1")[0]
    grads = torch.autograd.grad(y.square().sum(), leaves)
    exact = [t.double().requires_grad_() for t in (hidden, a, b)]
    z = torch.einsum("td,tkod->tko", exact[0], (exact[1] + exact[2])[ids])
    right = torch.autograd.grad(z.square().sum(), exact)
    pairs = [(y, z[mine].flatten(0, 1)), (grads[0], right[0][mine])]
    pairs += [(2 * got, wanted[here]) for got, wanted in zip(grads[1:], right[1:], strict=True)]
    return max(relative(a.detach(), b.detach()) for a, b in pairs)


def test_two_tensors_with_one_gradient() -> None:
    assert max(run_ranks(2, _added)) < 2e-6


def _grown_before_backward(rank: int) -> float:
    """Two forwards, the second of a larger batch, then both backwards, as accumulation and pipelines run them."""
    group, layout = _group(), ExpertLayout(8, 2, 2)
    key, worst, runs = make_site(layout, torch.float32, group, True), 0.0, []
    here = slice(rank * layout.masters, (rank + 1) * layout.masters)
    for tokens in (9, 150):
        hidden, params, ids = make_inputs(2 * tokens, 2, 8, torch.float32, 3.0, tokens)
        mine = slice(rank * tokens, (rank + 1) * tokens)
        leaves = [hidden[mine].clone().requires_grad_(), *(p[here].clone().requires_grad_() for p in params)]
        y = balanced(leaves[0], leaves[1:], ids[mine], layout, key, "quota", group)
        exact = [t.double().requires_grad_() for t in (hidden, *params)]
        runs.append((y, leaves, oracle(exact[0], exact[1:], ids), exact, mine))
    for y, leaves, z, exact, mine in runs:
        grads, right = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.sum(), exact)
        pairs = [(y.detach(), z.detach()[mine.start * 2 : mine.stop * 2]), (grads[0], right[0][mine])]
        pairs += [(2 * a, b[here]) for a, b in zip(grads[1:], right[1:], strict=True)]
        worst = max(worst, *(relative(a, b) for a, b in pairs))
    return worst


def test_buffers_that_grow_between_forward_and_backward() -> None:
    assert max(run_ranks(2, _grown_before_backward)) < 1e-6


def _missing(rank: int, how: str) -> None:
    group, layout = _group(DEADLINE_S), ExpertLayout(6, 3, 1)
    key = make_site(layout, torch.float32, group, True)
    assert _step(rank, 3, 20, layout, key, group, 0) < 1e-6
    if rank == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.Popen(["sh", "-c", f"sleep {DEADLINE_S + 5}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError, match=rf"layer case, microbatch 0: rank {rank} waited 3 s for rank 2 \(count"):
        _step(rank, 3, 20, layout, key, group, 1)
    assert time.monotonic() - start < DEADLINE_S + 4
    with pytest.raises(PeerTimeoutError):  # and nothing runs on what is missing
        _step(rank, 3, 20, layout, key, group, 1)


def test_a_killed_rank_is_named_by_the_others() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(3, _missing, "killed")
    assert str(caught.value) == "rank 2:\ndied"


def test_a_stopped_rank_is_named_by_the_others() -> None:
    run_ranks(3, _missing, "stopped")


def test_choice_of_the_transport() -> None:
    with fake_group(2) as group:
        name = group.group_name
        assert isinstance(transport_for(2, name), CollectiveTransport)
        choose_transport(name, "symmetric")
        assert isinstance(transport_for(2, name), SymmetricTransport)
        choose_transport(name, "collective")
        assert not isinstance(transport_for(2, name), SymmetricTransport)
