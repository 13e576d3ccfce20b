"""The same layer over a process group: 4 gloo processes, sharded and replicated experts, ragged and empty ranks;
over collectives and over symmetric memory, which on a CPU is shared files."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.multirank import run_ranks
from tests.ops.expert_case import balanced, make_inputs, make_site, oracle, relative
from ultraep_compile.errors import RoutingError, TopologyError
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.routing import must_agree
from ultraep_compile.ops.transport import choose_transport

WORLD = 4
CASES = {  # tokens of each rank, choices, slots, skew
    "even": ([16, 16, 16, 16], 2, 2, 3.0),
    "ragged": ([40, 0, 3, 17], 2, 2, 4.0),
    "one rank has all": ([0, 0, 50, 0], 2, 1, 2.0),
    "rounds": ([30, 30, 30, 30], 1, 0, 50.0),
    "nothing": ([0, 0, 0, 0], 2, 1, 0.0),
}


def _faults(rank: int, group: str) -> list[str]:
    """A bad batch on some ranks is an error on all of them, and the next batch is as good as any."""
    messages = []
    load = torch.ops.ultraep.expert_load
    for nan_on, id_on, bad in (({2}, set(), 0), (set(), {1, 3}, -7), ({3}, {1}, 1 << 40)):
        ids, scores = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 8)
        if rank in nan_on:
            scores[4, 3] = float("nan")
        if rank in id_on:
            ids[3, 1] = bad
        try:
            load(ids, scores, 8, WORLD, group, "layers.1.mlp@key")
            messages.append("no error")
        except RoutingError as error:
            messages.append(str(error))
        good = load(torch.full((rank, 1), rank), None, 8, WORLD, group, "layers.1.mlp@key")
        assert torch.equal(good, torch.diag(torch.arange(4)).to(torch.int32) @ torch.eye(4, 8, dtype=torch.int32))
    must_agree(f"layers.2.mlp@{rank}", planner="none" if rank == 2 else "quota", experts=8)
    with pytest.raises(TopologyError) as error:
        load(torch.zeros(5, 2, dtype=torch.int64), None, 8, WORLD, group, f"layers.2.mlp@{rank}")
    return [*messages, str(error.value)]


def _on_rank(rank: int, transport: str, device: str = "cpu") -> dict:
    out: dict = {}
    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    choose_transport(group, transport)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if device == "cpu":
        out["faults"] = _faults(rank, group)
    for name, (tokens, choices, slots, skew) in CASES.items():
        for sharded in (True, False):
            layout = ExpertLayout(8, WORLD, slots)
            key = make_site(layout, torch.float32, group, sharded)
            hidden, params, ids = make_inputs(sum(tokens), choices, 8, torch.float32, skew)
            begin = sum(tokens[:rank])
            mine = slice(begin, begin + tokens[rank])
            here = slice(rank * 2, rank * 2 + 2)
            results = {}
            for planner in ("quota", "none"):
                leaves = [hidden[mine].clone().to(device).requires_grad_()]
                leaves += [(p[here] if sharded else p).clone().to(device).requires_grad_() for p in params]
                y = balanced(leaves[0], leaves[1:], ids[mine].to(device), layout, key, planner, group)
                g = torch.randn(sum(tokens) * choices, y.shape[1], generator=torch.Generator().manual_seed(5))
                g = g[begin * choices : (begin + tokens[rank]) * choices].to(device)
                grads = torch.autograd.grad(y, leaves, g)
                results[planner] = (y.detach().cpu(), [d.cpu() for d in grads])
            assert torch.equal(results["quota"][0], results["none"][0])
            assert torch.equal(results["quota"][1][0], results["none"][1][0])
            out[name, sharded] = results["quota"]
    return out


@pytest.mark.parametrize("transport", ["collective", "symmetric"])
def test_four_processes_equal_one(transport: str) -> None:
    by_rank = run_ranks(WORLD, _on_rank, transport)
    faults = [r.pop("faults") for r in by_rank]
    assert all(f == faults[0] for f in faults)
    assert "layers.1.mlp: on rank 2, the router's score of token 4 for expert 3 is nan" in faults[0][0]
    assert "on rank 1 (and on ranks 3), token 3, choice 1 is routed to expert -7, but this layer has experts 0..7" in faults[0][1]
    different = "planner: quota on ranks 0, 1, 3, none on rank 2"
    assert f"layers.2.mlp: the ranks do not agree ({different})" in faults[0][3]
    assert f"on rank 1 (and on ranks 3), token 3, choice 1 is routed to expert {1 << 40}" in faults[0][2]
    _compare_with_one_process(by_rank)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_four_processes_on_gpus_equal_one(monkeypatch) -> None:
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    _compare_with_one_process(run_ranks(WORLD, _on_rank, "symmetric", "cuda"))


def _compare_with_one_process(by_rank: list[dict]) -> None:
    for name, (tokens, choices, _, skew) in CASES.items():
        hidden, params, ids = make_inputs(sum(tokens), choices, 8, torch.float32, skew)
        leaves = [t.double().requires_grad_() for t in (hidden, *params)]
        y = oracle(leaves[0], leaves[1:], ids)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32).double()
        exact = torch.autograd.grad(y, leaves, g)
        for sharded in (True, False):
            got = [r[name, sharded] for r in by_rank]
            assert relative(torch.cat([y for y, _ in got]), y) < 1e-6
            assert relative(torch.cat([g[0] for _, g in got]), exact[0]) < 1e-6
            for index in (1, 2, 3):
                parts = [grads[index] for _, grads in got]
                # sharded: gradient of the mean of the ranks' losses; replicated: what averaging turns into it
                mean = torch.cat(parts) if sharded else torch.stack(parts).sum(0) / WORLD
                assert relative(mean * WORLD, exact[index]) < 1e-6, (name, sharded, index)
