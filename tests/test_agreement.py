"""Ranks that differ are told so, all of them, at once and by what differs; what may differ works."""

from __future__ import annotations

import os
import re
import tempfile
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.multirank import run_ranks
from ultraep_compile import agreeing
from ultraep_compile.errors import PeerTimeoutError, TopologyError, UltraEPError
from ultraep_compile.ops.agreement import common
from ultraep_compile.telemetry import get_recorder, read_trace


class MoE(nn.Module):
    def __init__(self, experts: int = 8, width: int = 8, choices: int = 2):
        super().__init__()
        self.choices = choices
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 12) / 8)
        self.down = nn.Parameter(torch.randn(experts, 12, width) / 8)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(self.choices, -1)
        h = torch.einsum("td,tkdf->tkf", x, self.up[ids]).relu()
        return x + (torch.einsum("tkf,tkfd->tkd", h, self.down[ids]) * w[..., None]).sum(1)


class Stack(nn.Module):
    """Layers in one graph, where a `Sequential` has one for each."""

    def __init__(self, layers: int = 2, **sizes: int):
        super().__init__()
        self.layers = nn.ModuleList(MoE(**sizes) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _train(model: nn.Module, steps: int = 1, tokens: int = 16, **options: Any) -> None:
    torch._dynamo.reset()
    model.compile(backend="ultraep", options={"inner": "eager", "redundant_experts": 1, "deadline_s": 20, **options})
    width = next(p for n, p in model.named_parameters() if "gate" in n).shape[1]
    for _ in range(steps):
        model(torch.randn(tokens, width)).sum().backward()


def _seeded(model: type[nn.Module] = Stack, seed: int = 0, **sizes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return model(**sizes)


DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # what the last rank has otherwise: sizes, options; and what all are told
    "experts": ({"experts": 16}, {}, "experts of layer .*: 8 on rank 0, 16 on rank 1"),
    "choices": ({"choices": 3}, {}, "experts of a token of layer .*: 2 on rank 0, 3 on rank 1"),
    "width": ({"width": 16}, {}, r"tokens of layer .*: float32\[8\] on rank 0, float32\[16\] on rank 1"),
    "layers": ({"layers": 3}, {}, r"balanced MoE layers: 2 \(.*\) on rank 0, 3 \(.*\) on rank 1"),
    "slots": ({}, {"redundant_experts": 2}, "option redundant_experts: 1 on rank 0, 2 on rank 1"),
    "planner": ({}, {"planner": "none"}, "option planner: quota on rank 0, none on rank 1"),
    "transport": ({}, {"transport": "symmetric"}, "option transport: auto on rank 0, symmetric on rank 1"),
    "deadline": ({}, {"deadline_s": 21}, "option deadline_s: 20 on rank 0, 21 on rank 1"),
    "verify": ({}, {"verify": 1}, "option verify: 0 on rank 0, 1 on rank 1"),
    "start": ({}, {"balance_from": 64}, "option balance_from: 0 on rank 0, 64 on rank 1"),
    "seed": ({"seed": 1}, {}, "router's weights of layer .* on rank 0, .* on rank 1"),
    "mistake": ({}, {"planner": "quotta"}, "quotta"),
    "slots that do not fit": ({}, {"redundant_experts": 7}, "a rank can hold copies of at most 4 experts"),
}


def _told(rank: int, group: dist.ProcessGroup, what: str) -> str:
    """The error of a rank that trains what `DIFFERENCES` says."""
    sizes, options, _ = DIFFERENCES[what] if rank else ({}, {}, "")
    with pytest.raises(UltraEPError) as error:
        _train(_seeded(**sizes), group=group, **options)
    return str(error.value)


QUICK = ("experts", "layers", "transport", "seed", "mistake")


def _differ(rank: int, differences: list[str]) -> dict[str, tuple[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    ends = {}
    for what in differences:
        begun = time.monotonic()
        told = _told(rank, group, what)
        ends[what] = told, time.monotonic() - begun
    _train(_seeded(), 2, group=group)  # the group is as good as before
    begun = time.monotonic()
    with pytest.raises(TopologyError) as error, mock.patch.object(agreeing, "_versions", lambda: {"torch": f"2.{rank}"}):
        _train(_seeded(), group=group)
    ends["versions"] = str(error.value), time.monotonic() - begun
    sequential = nn.Sequential(*[_seeded(MoE) for _ in range(2 + rank)])
    with pytest.raises(TopologyError) as error:
        _train(sequential, 2, group=group)
    ends["more layers, one by one"] = str(error.value), time.monotonic() - begun
    for odd in (0, 1):
        switched = {"ULTRAEP_COMPILE_DISABLE": "1" if rank == odd else "0"}
        model = _seeded(width=4)  # of which nothing was agreed yet
        model = ultraep_compile.shard_experts(model, init_device_mesh("cpu", (2,))) if odd else model
        with pytest.raises(TopologyError) as error, mock.patch.dict(os.environ, switched):
            _train(model, **({} if odd else {"group": group}))
        ends[f"rank {odd} is switched off"] = str(error.value), time.monotonic() - begun
    return ends


@pytest.mark.parametrize("differences", [QUICK, pytest.param(set(DIFFERENCES) - {*QUICK}, marks=pytest.mark.slow)])
def test_ranks_that_differ_are_told_what_differs(differences: set[str]) -> None:
    first, second = run_ranks(2, _differ, sorted(differences))
    for what, (told, seconds) in first.items():
        words = DIFFERENCES[what][2] if what in DIFFERENCES else "the ranks do not agree"
        assert re.search(words, told), (what, told)
        assert re.search(words, second[what][0]), (what, second[what][0])
        assert max(seconds, second[what][1]) < 60, what  # a loaded machine compiles slowly; no deadline is waited for
    assert "torch: 2.0 on rank 0, 2.1 on rank 1" in first["versions"][0]
    assert "the backward of layer" in first["more layers, one by one"][0]
    assert "ULTRAEP_COMPILE_DISABLE is set on rank 1" in first["rank 1 is switched off"][0]
    assert "ULTRAEP_COMPILE_DISABLE is set on rank 0" in second["rank 0 is switched off"][0]


def _may_differ(rank: int, folder: str) -> list[str]:
    group, seen = dist.group.WORLD, []
    for odd in (0, 1):
        path = f"{folder}/rank{odd}.npz"
        _train(_seeded(), 2, group=group, **({"trace": path} if rank == odd else {}), planner=("quota", "greedy")[odd])
        if rank == odd:
            get_recorder(path).close()
            layers = read_trace(path).layers
            seen += [f"{len(x)} {int((x.realised_NP == x.quota_NP).all())} {int(x.realised_NP[0].sum())}" for x in layers]
    late = f"{folder}/late{rank}.npz"
    _train(_seeded(), 1, group=group, planner="none")
    _train(_seeded(), 1, group=group, planner="none", **({"trace": late} if rank == 1 else {}))  # known: nobody else hears of it
    if rank == 1:
        get_recorder(late).close()
        seen += [f"{len(x)} {int(x.realised_NP.max())}" for x in read_trace(late).layers]
    _train(_seeded(), 1, group=group, expect_moe_sites=2 if rank else None)
    for size in (16, 16 + 8 * rank, 16 + 16 * rank):  # one rank compiles anew, alone
        _train(_seeded(), 1, size, group=group)
    return seen


def test_what_may_differ_works() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = run_ranks(2, _may_differ, folder)
    assert first == ["2 1 64"] * 2  # records, all as planned, pairs of both ranks
    assert second == ["2 1 64", "2 1 64", "1 -1", "1 -1"]


def _gone(rank: int) -> list[str]:
    group, found = dist.group.WORLD, []
    assert group is not None
    if rank == 0:
        with pytest.raises(PeerTimeoutError) as error:
            _train(_seeded(), group=group, deadline_s=2)
        found.append(str(error.value))
    else:
        time.sleep(3)
    assert common(group).agreed == 0
    return found


def test_a_rank_that_never_comes_is_named() -> None:
    (told,), _ = run_ranks(2, _gone)
    assert "rank 0 waited 2 s for rank 1" in told and "has compiled nothing" in told


def _recompiles(rank: int, sharded: bool) -> str:
    model = _seeded(MoE)
    options: dict[str, Any] = {"inner": "eager", "redundant_experts": 1, "deadline_s": 20}
    if sharded:
        model = ultraep_compile.shard_experts(model, init_device_mesh("cpu", (2,)))
    else:
        options["group"] = dist.group.WORLD
    model.compile(backend="ultraep", options=options, dynamic=False)
    with pytest.raises(UltraEPError) as error, torch._dynamo.config.patch(recompile_limit=3):
        for step in range(6):
            model(torch.randn(16 + step * rank, 8)).sum().backward()
    time.sleep(1)  # whoever hosts the store ends last
    return str(error.value)


def test_ranks_with_whole_experts_meet_dynamos_limit_together() -> None:
    for told in run_ranks(2, _recompiles, False):
        assert "balanced 0 MoE layers in this call and 1 before" in told and "recompil" in told


def test_ranks_meet_dynamos_limit_together() -> None:
    for told in run_ranks(2, _recompiles, True):
        assert "gathers all experts' weights (unbalanced, or in eager mode) on rank 1" in told
        assert "recompile_limit" in told and "dynamic=True" in told
