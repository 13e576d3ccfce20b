"""A state of Python that changes where ranks run a layer together: on all of them, or on one alone."""

from __future__ import annotations

import copy
import re
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests import forms_parallel
from tests.ladder.changing import Reader
from tests.multirank import run_ranks
from ultraep_compile.errors import PeerTimeoutError, ShardingError, TopologyError


def _step(call, model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    assert model.gate.weight.grad is not None
    return {"y": y.detach(), "gate": model.gate.weight.grad.clone()}


def _of_whole_experts(rank: int) -> str:
    """All ranks hold all experts, and one was set otherwise before it was prepared: what it is told."""
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(rank))
    options = {"group": dist.group.WORLD, "redundant_experts": 1, "inner": "aot_eager", "deadline_s": 20}
    model = Reader()
    model.temperature = 1.0 + rank
    ultraep_compile.prepare(model, (x,))
    try:
        torch.compile(model, backend="ultraep", options=options)(x)
    except TopologyError as error:
        return str(error)
    return "nothing"


def _of_own_exchanges(rank: int, world: int) -> list[str]:
    """A layer with an all-to-all of its own: changes that it can be lifted in again, and one that it cannot."""
    x = torch.randn(2, 16, forms_parallel.WIDTH, generator=torch.Generator().manual_seed(rank))
    plain, ours = (forms_parallel.Gshard(rank, world, 2, capacity_factor=4.0) for _ in range(2))
    ultraep_compile.prepare(ours, (x,))
    compiled = torch.compile(ours, backend="ultraep", options={"redundant_experts": 1, "inner": "aot_eager", "deadline_s": 20})
    told = []
    for only, activation in ((slice(None), nn.ReLU), (slice(1, None), nn.Tanh), (slice(None), nn.ReLU)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = []
            for call, model in ((plain, plain), (compiled, ours)):
                for expert in model.experts[only]:
                    expert[1] = activation()
                model.zero_grad()
                y = call(x)
                y.square().mean().backward()
                found.append([y.detach(), *(p.grad for p in model.parameters())])
            for want, got in zip(*found, strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        told.append("; ".join(str(w.message) for w in caught if str(w.message).startswith("ultraep")))
    return told


def _changed(rank: int, world: int) -> list:
    x = torch.randn(24 + rank, 16, generator=torch.Generator().manual_seed(rank))
    plain = Reader()
    ours = copy.deepcopy(plain)
    ultraep_compile.shard_experts(ours, init_device_mesh("cpu", (world,)), (x,))
    options = {"redundant_experts": 1, "inner": "aot_eager", "deadline_s": 5}
    compiled = torch.compile(ours, backend="ultraep", options={**options, "expect_moe_sites": 1})

    def compare() -> None:
        want, got = _step(plain, plain, x), _step(compiled, ours, x)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")

    compare()
    for temperature in (0.3, 1.0, 0.3):
        plain.temperature = ours.temperature = temperature
        compare()
    ended = [_of_whole_experts(rank), _of_own_exchanges(rank, world)]
    ours.temperature = 2.0 + rank  # what each rank has is another thing
    try:
        compiled(x)
    except ShardingError as error:
        ended.append(str(error))
    ours.temperature = 0.3
    if rank == 0:
        ours.k = 1
    try:
        compiled(x)
    except PeerTimeoutError as error:
        ended.append(type(error).__name__)
    return ended


def test_changes_on_all_ranks_are_followed_and_others_end_in_an_error() -> None:
    for whole, exchanging, differ, alone in run_ranks(2, _changed, 2):
        assert "Python's state has changed differently on them" in differ and "temperature was" in differ
        assert "the ranks do not agree" in whole and re.search("temperature in Python of layer .*: 1.0 on rank 0, 2.0 on rank 1", whole)
        assert exchanging[0] == exchanging[2] == ""
        assert exchanging[1].startswith("ultraep: Gshard runs unbalanced: experts.1.1 was ReLU and is Tanh")
        assert alone == "PeerTimeoutError"
