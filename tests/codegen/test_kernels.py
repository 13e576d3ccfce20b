"""The kernels in Triton's interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.planner.problems import skewed

pytest.importorskip("triton")

GROUPS = {
    "edges": ["the example", "no tokens", "balanced", "one expert", "huge", "an empty rank"],
    "sizes": ["sizes that are no powers of two", "scarce slots"],
    "topologies": ["domains", "domains of one", "ranks without slots"],
}


def _run(module: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", f"tests.codegen.{module}", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_planner_in_the_interpreter(group: str) -> None:
    _run("interpreted", "planner", *GROUPS[group], TRITON_INTERPRET="1")


def test_counts_in_the_interpreter() -> None:
    _run("interpreted", "counts", TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path) -> None:
    _run("ahead_of_time", str(capability), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnDevice:
    pytestmark = gpu

    @pytest.mark.parametrize("group", GROUPS)
    def test_small_cases(self, group: str) -> None:
        from tests.codegen.planning_cases import check_plan, small_cases

        for name in GROUPS[group]:
            check_plan(small_cases()[name], "cuda", [None, 1])

    @pytest.mark.parametrize("ranks, masters, slots, domain", [(8, 8, 2, 8), (64, 4, 2, 64), (40, 4, 1, 8), (128, 2, 1, 128)])
    def test_many_loads(self, ranks: int, masters: int, slots: int, domain: int) -> None:
        from tests.codegen.planning_cases import Case, check_plan

        for seed in range(12):
            scale = (3, 400, 5000, 2.0**31 / (ranks * ranks * masters))[seed % 4]
            counts_RE = skewed(ranks, masters, scale, (0.5, 4.0, 16.0)[seed % 3], seed, quiet=0.3)
            check_plan(Case(counts_RE, slots, domain, (0.01, 0.0)[seed % 2]), "cuda", [None, ranks // 3])

    def test_captured_in_a_graph(self) -> None:
        from ultraep_compile.planner import make_plan

        loads = [skewed(16, 4, 3000, power, seed=7).int() for power in (2.0, 8.0)]
        counts_RE = loads[0].cuda()
        make_plan(counts_RE, 2, check=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan = make_plan(counts_RE, 2, check=False)
        for load in loads:
            counts_RE.copy_(load)
            graph.replay()
            assert all(torch.equal(a.cpu(), b) for a, b in zip(plan, make_plan(load, 2), strict=True))

    def test_counts(self) -> None:
        from ultraep_compile.codegen.count_kernels import expert_counts

        for tokens, experts in ((1, 5), (8192, 256), (50001, 1000)):
            ids = torch.randint(0, experts, (tokens, 8), device="cuda")
            assert torch.equal(expert_counts(ids, experts).long(), torch.bincount(ids.flatten(), minlength=experts))
