"""The kernels in Triton's interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import run_interpreted
from tests.planner.problems import skewed

pytest.importorskip("triton")
from tests.codegen import ahead_of_time

MODULE = "tests.codegen.interpreted"

GROUPS = {
    "edges": ["the example", "no tokens", "balanced", "one expert", "huge", "an empty rank"],
    "sizes": ["sizes that are no powers of two", "scarce slots"],
    "time": ["fast, not even", "no copy pays", "fast with huge loads"],
    "many experts": ["many experts", "many experts, refined", "many experts, huge"],
    "many experts elsewhere": ["many experts in domains", "more experts than are read at once"],
    "topologies": ["domains", "domains of one", "ranks without slots"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_planner_in_the_interpreter(group: str) -> None:
    run_interpreted(MODULE, "planner", *GROUPS[group])


def test_planner_with_uneven_ranks_in_the_interpreter() -> None:
    run_interpreted(MODULE, "planner_uneven")


@pytest.mark.slow
def test_planner_at_random_in_the_interpreter() -> None:
    run_interpreted(MODULE, "planner_at_random", "60")


def test_counts_in_the_interpreter() -> None:
    run_interpreted(MODULE, "counts")


def test_guards_in_the_interpreter() -> None:
    run_interpreted(MODULE, "guards")


def test_grouped_products_in_the_interpreter() -> None:
    run_interpreted(MODULE, "grouped")


@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead_of_time.main(capability)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


MANY = [(2, 64, 2, 2), (8, 16, 2, 8), (64, 16, 2, 64), (16, 40, 3, 4), (8, 128, 2, 8)]  # experts a rank


class TestOnDevice:
    pytestmark = gpu

    @pytest.mark.parametrize("group", GROUPS)
    def test_small_cases(self, group: str) -> None:
        from tests.codegen.planning_cases import check_plan, small_cases

        for name in GROUPS[group]:
            check_plan(small_cases()[name], "cuda", [None, 1])

    @pytest.mark.parametrize("ranks, masters, slots, domain", [(8, 8, 2, 8), (64, 4, 2, 64), (40, 4, 1, 8), (128, 2, 1, 128), *MANY])
    def test_many_loads(self, ranks: int, masters: int, slots: int, domain: int) -> None:
        from tests.codegen.planning_cases import Case, check_plan

        for seed in range(12):
            scale = (3, 400, 5000, 2.0**31 / (ranks * ranks * masters))[seed % 4]
            counts_RE = skewed(ranks, masters, scale, (0.5, 4.0, 16.0)[seed % 3], seed, quiet=0.3)
            check_plan(Case(counts_RE, slots, domain, (0.01, 0.0)[seed % 2]), "cuda", [None, ranks // 3])

    def test_uneven_ranks(self) -> None:
        from tests.codegen.planning_cases import check_uneven

        for seed in range(4):
            check_uneven([3, 1, 4], [1, 2, 1], "cuda", seed)
            check_uneven([60, 0, 30, 70], 2, "cuda", seed)

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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_grouped_products(self, dtype: torch.dtype) -> None:
        from tests.codegen import grouped_cases as cases

        for name in cases.SIZES:
            cases.check_product(name, dtype, "cuda")
            cases.check_weight_grad(name, dtype, "cuda")
        for inner, outer in ((40, 24), (128, 264), (37, 21)):
            cases.check_independence(dtype, "cuda", inner, outer)
        cases.check_row_sum(dtype, "cuda")

    def test_late_checks(self) -> None:
        """A wrong id and an infinite score are raised by the next call, and name their place."""
        from ultraep_compile.errors import RoutingError
        from ultraep_compile.ops import late_checks

        ids, scores = torch.randint(0, 8, (500, 2), device="cuda"), torch.randn(500, 8, device="cuda")
        late_checks.check_later(ids, scores, 8, "layer")
        late_checks.check_now()
        ids[411, 1] = 8
        late_checks.check_later(ids, scores, 8, "layer")
        torch.cuda.synchronize()
        with pytest.raises(RoutingError, match=r"layer: in an earlier call, pair 823 \(token 411, choice 1\)"):
            late_checks.check_later(ids, scores, 8, "layer")
        ids[411, 1], scores[3, 5] = 0, float("inf")
        late_checks.check_later(ids, scores, 8, "layer")
        torch.cuda.synchronize()
        with pytest.raises(RoutingError, match="token 3, expert 5"):
            late_checks.check_later(ids, scores, 8, "layer")

    @pytest.mark.xdist_group("memory")
    def test_grouped_products_past_two_to_the_31(self) -> None:
        """Rows and weights whose last elements lie past 2^31."""
        from tests.codegen.grouped_cases import close
        from ultraep_compile.codegen.grouped_gemm_kernels import grouped_product, grouped_weight_grad

        rows, wide, groups = 2**21 + 128, 1024, 2052
        x = torch.zeros(rows, wide, device="cuda", dtype=torch.bfloat16)
        x[-100:] = torch.randn(100, wide, device="cuda", dtype=torch.bfloat16)
        weight = torch.zeros(groups, wide, wide, device="cuda", dtype=torch.bfloat16)
        weight[-1] = torch.randn(wide, wide, device="cuda")
        offsets = torch.full((groups + 1,), rows - 100, dtype=torch.int32, device="cuda")
        offsets[0], offsets[-1] = 0, rows
        for w in (weight, weight.transpose(1, 2)):
            y = grouped_product(x, w[:-1], w[-1:], offsets)
            close(y[-100:], x[-100:].double() @ w[-1].double(), 5e-3)
            assert not y[:-100].any()
            close(grouped_product(x, w, w[:0], offsets)[-100:], x[-100:].double() @ w[-1].double(), 5e-3)
        del y, weight, w
        dw = grouped_weight_grad(x, x, offsets)
        close(dw[-1], x[-100:].double().T @ x[-100:].double(), 5e-3)
        assert not dw[:-1].any()

    def test_slots_wait_until_they_are_ready(self) -> None:
        """Weights arrive from another stream while the product is running."""
        from tests.codegen.grouped_cases import close, exact_product, make
        from ultraep_compile.codegen.grouped_gemm_kernels import Ready, grouped_product

        x, weight, offsets = make([2000, 300, 300], 256, 256, torch.bfloat16, device="cuda")
        exact = exact_product(x, weight, offsets)
        grouped_product(x, weight[:1], weight[1:], offsets)
        slots = torch.full_like(weight[1:], torch.nan)
        flags, epoch = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            slots.copy_(weight[1:])
            flags.fill_(1)
        y = grouped_product(x, weight[:1], slots, offsets, Ready(flags, epoch))
        close(y, exact, 5e-3)

    def test_grouped_products_read_nothing_on_the_host(self) -> None:
        from tests.codegen.grouped_cases import make
        from ultraep_compile.ops import grouped_gemm as ops

        x, weight, offsets = make([20, 30, 0], 64, 64, torch.bfloat16, device="cuda")
        bias = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)

        def everything() -> None:
            y = ops.grouped_gemm(x, weight[:2], weight[2:], offsets)
            ops.grouped_gemm_weight_grad(x, y, offsets)
            ops.expert_take(bias[:2], bias[2:], offsets, x.shape[0])
            ops.expert_take_grad(y, offsets)

        everything()
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")
