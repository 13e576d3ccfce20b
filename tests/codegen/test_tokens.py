"""Reroute, dispatch and combine: plain torch, Triton's interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from tests.codegen import ahead_of_time_tokens
from tests.codegen.interpreted_tokens import exchange_rows
from tests.codegen.token_cases import (
    TokenCase,
    check_dispatch,
    check_packed_trip,
    check_reroute,
    check_sum,
    check_wire,
    small_token_cases,
)
from tests.interpreter import run_interpreted
from tests.multirank import run_ranks
from ultraep_compile.codegen.dispatch import addresses, pull_rows, push_rows
from ultraep_compile.codegen.reroute import reroute_and_place, window
from ultraep_compile.ops.dispatch import buffer_rows
from ultraep_compile.ops.layout import ExpertLayout

MODULE = "tests.codegen.interpreted_tokens"
GROUPS = [
    ["the example", "every expert chosen", "no tokens at all"],
    ["one rank", "no slots, odd sizes", "repeated choices"],
    ["one hot expert", "many copies", "padding"],
]
DISPATCHED = [["the example", "no tokens at all", "repeated choices"], ["padding"]]


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g[0])
def test_reroute_in_the_interpreter(group: list[str]) -> None:
    run_interpreted(MODULE, "reroute", *group)


@pytest.mark.parametrize("group", DISPATCHED, ids=lambda g: g[0])
def test_dispatch_in_the_interpreter(group: list[str]) -> None:
    run_interpreted(MODULE, "dispatch", *group)


def test_wire_format_and_sum_in_the_interpreter() -> None:
    run_interpreted(MODULE, "wire")


def test_processes_exchange_rows_in_the_interpreter() -> None:
    run_interpreted(MODULE, "processes")


@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead_of_time_tokens.reroute(capability)
    ahead_of_time_tokens.rows(capability)


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.sampled_from([1, 2, 3, 8]),
    masters=st.integers(1, 4),
    slots=st.integers(0, 3),
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    choices=st.integers(1, 4),
    skew=st.floats(0, 20),
    padding=st.sampled_from([0.0, 0.3]),
    repeats=st.booleans(),
    capacity=st.sampled_from([5, 16, 2**31 - 1]),
    seed=st.integers(0, 10_000),
)
def test_the_references_agree_with_the_ops(
    ranks, masters, slots, tokens, choices, skew, padding, repeats, capacity, seed
) -> None:
    experts = ranks * masters
    case = TokenCase.draw(
        ranks, masters, min(slots, experts - masters), tokens, min(choices, experts), skew, seed, padding=padding,
        repeats=repeats,
    )  # fmt: skip
    check_reroute(case, "cpu", list(range(ranks)), capacity)
    check_dispatch(case, "cpu", 3, torch.bfloat16, max(capacity, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wire_reference(dtype: torch.dtype) -> None:
    for rows, width in ((1, 1), (9, 128), (4, 300)):
        check_wire("cpu", rows, width, dtype, seed=rows)
    check_packed_trip(small_token_cases()["padding"], "cpu", 200)
    check_sum(small_token_cases()["padding"], "cpu", 9, dtype)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnDevice:
    pytestmark = gpu

    @pytest.mark.parametrize("name", list(small_token_cases()))
    def test_small_cases(self, name: str) -> None:
        case = small_token_cases()[name]
        for capacity in (2**31 - 1, 11):
            check_reroute(case, "cuda", list(range(case.layout.ranks)), capacity)
        check_dispatch(case, "cuda", 9, torch.bfloat16)
        check_dispatch(case, "cuda", 2056, torch.bfloat16, capacity=16, programs=3)
        check_dispatch(case, "cuda", 5, torch.float32, capacity=7)
        check_dispatch(case, "cuda", 1, torch.uint8)
        check_packed_trip(case, "cuda", 130)
        check_sum(case, "cuda", 1024, torch.bfloat16)

    @pytest.mark.parametrize("ranks, masters, slots", [(64, 2, 2), (64, 4, 2), (40, 4, 1), (8, 32, 4), (128, 4, 2)])
    def test_reroute_of_many_tokens(self, ranks: int, masters: int, slots: int) -> None:
        for seed, tokens in enumerate((8192, 777, 20000, 70001)):
            few = [tokens] + [50] * (ranks - 1)
            case = TokenCase.draw(ranks, masters, slots, few, 8, (0.5, 4.0)[seed % 2], seed)
            check_reroute(case, "cuda", [0], (2**31 - 1, 5000)[seed % 2])

    def test_wire(self) -> None:
        for rows, width in ((1, 1), (1000, 4096), (77, 300), (4, 7168)):
            for dtype in (torch.bfloat16, torch.float32, torch.float16):
                check_wire("cuda", rows, width, dtype, rows)

    def test_processes_exchange_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three processes on one GPU, each late at random: 100 steps through the same buffers."""
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        run_ranks(3, exchange_rows, "cuda", 100, 40)

    @pytest.mark.xdist_group("memory")
    def test_past_2_to_the_31_elements(self) -> None:
        """A buffer of 2^31 words and more, over 131080 tokens: the ends are right."""
        tokens, choices, width = 131080, 8, 4096
        layout = ExpertLayout(8, 1, 0)
        ids = torch.arange(8, device="cuda").expand(tokens, 8).contiguous()
        shares = torch.full((1, 8), tokens, dtype=torch.int32, device="cuda")
        slots = shares.new_empty(1, 0)
        routing = reroute_and_place(ids, slots, shares, layout, 0, distinct=True)
        rows = buffer_rows(tokens * choices, layout, 1)
        x = torch.randint(-30000, 30000, (tokens, width // 2), device="cuda", dtype=torch.int32).view(torch.bfloat16)
        buffer = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
        assert buffer.numel() // 2 > 2**31
        push_rows(x, routing, [buffer], rows, layout)
        for e in (0, 7):
            assert torch.equal(as_words(buffer[e * tokens : (e + 1) * tokens]), as_words(x))
        out = torch.empty(tokens * choices, width, dtype=torch.bfloat16, device="cuda")
        pull_rows(out, routing, [buffer], rows, layout)
        for k in (0, 7):
            assert torch.equal(as_words(out.view(tokens, choices, width)[:, k].contiguous()), as_words(x))

    def test_captured_in_a_graph_without_a_host_read(self) -> None:
        case = TokenCase.draw(8, 4, 2, [300], 4, 4.0, 3)
        ids, slots, shares = case.ids_RTK[2].cuda(), case.slot_expert_RS.cuda(), case.shares_RP.cuda()
        buffers = [torch.zeros(4000, 64, device="cuda") for _ in range(8)]
        x, out = torch.randn(300, 64, device="cuda"), torch.zeros(1200, 64, device="cuda")
        table = addresses(buffers, x.device)

        def step() -> None:
            routing = reroute_and_place(ids, slots, shares, case.layout, 2, 2000, distinct=False)
            trip = window(shares, case.layout, 2, 2000, torch.zeros(1, dtype=torch.int32, device="cuda"))
            push_rows(x, routing, table, 4000, case.layout, window=trip)
            pull_rows(out, routing, table, 4000, case.layout, window=trip)

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for seed in range(3):
            x.copy_(torch.randn(300, 64))
            out.zero_()
            graph.replay()
            assert torch.equal(out, x.repeat_interleave(4, 0)), seed


def as_words(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.int32)
