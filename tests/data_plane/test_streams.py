"""Replicate and gradient reduce: in the interpreter, compiled ahead of time, as text, and on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.data_plane import cases
from tests.interpreter import run_interpreted
from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.codegen.emit import cache_folder, load_source
from ultraep_compile.codegen.routes import sender_reference
from ultraep_compile.errors import OptionError, PoolError, TopologyError
from ultraep_compile.symmetric import open_virtual_pools

pytest.importorskip("triton")
from tests.data_plane import ahead_of_time
from ultraep_compile.codegen.reduce import reduce_from_slots, reduce_source
from ultraep_compile.codegen.replicate import replicate_source, replicate_to_slots

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    "case", ["routes", "virtual direct", "virtual relay", "virtual adaptive", "reduce", "examples", "far", "processes"]
)
def test_in_the_interpreter(case: str) -> None:
    run_interpreted("tests.data_plane.interpreted", *case.split())


@pytest.mark.parametrize("how", ["killed", pytest.param("stalled", marks=pytest.mark.slow)])
def test_a_missing_process(how: str) -> None:
    run_interpreted("tests.data_plane.faults", "check_missing", how, "cpu", 30.0)


@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_ahead_of_time(capability: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead_of_time.main(capability, show=False)


PARTS = (Part((64, 96), torch.bfloat16), Part((7,), torch.uint8))
TEXTS = {
    "push": lambda b, at: replicate_source(b, at, [16, 1], relay=False),
    "pass_on": lambda b, at: replicate_source(b, at, [16, 1], relay=True),
    "pull": lambda b, at: reduce_source(b, at, [torch.float32] * 2, [16, 4]),
}


@pytest.mark.parametrize("kernel", TEXTS)
def test_generated_text(kernel: str) -> None:
    """To accept a wanted change: ULTRAEP_GOLDEN=1 pytest this test, then read the difference."""
    parts = PARTS if kernel != "pull" else (Part((64, 96), torch.bfloat16), Part((7,), torch.float32))
    bundle = Bundle("experts", 4, 2, 1, parts)
    names = ["pool.control", *(f"experts.{n}" for n in ("0", "1", "route", "targets", "chunks", "arrived"))]
    text = TEXTS[kernel](bundle, {name: 4096 * (i + 1) for i, name in enumerate(names)})
    path = GOLDEN / f"{kernel}.txt"
    if os.environ.get("ULTRAEP_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_generated_files_are_kept_and_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = "VALUE = 41 + 1\n"
    (path,) = [Path(load_source(text).__file__)]
    assert path.parent == cache_folder() == tmp_path / "ultraep_compile" and path.read_text() == text
    path.write_text("VALUE = 'something else'\n")  # a file that is not what was generated is never imported
    del sys.modules[path.stem]
    assert load_source(text).VALUE == 42 and path.read_text() == text
    os.chmod(path.parent, 0o777)
    assert cache_folder() != path.parent  # others could write there


def test_the_tree_of_the_example() -> None:
    assert sender_reference([[-1], [0], [0], [0], [0]], masters=1) == [-1, -1, -1, 1, 2]
    assert sender_reference([[-1], [0], [0], [0]], masters=1) == [-1] * 4  # too few copies to gain


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_lowers_the_worst_traffic(seed: int) -> None:
    plan = cases.random_plan(24, 2, 2, seed, hot=0.7)
    sender = sender_reference(plan.tolist(), 2)
    before, after = [0] * 24, [0] * 24
    for q, e in enumerate(plan.flatten().tolist()):
        if e >= 0:
            before[e // 2] += 1
            after[e // 2 if sender[q] < 0 else sender[q] // 2] += 1
            assert sender[q] < 0 or (sender[sender[q]] < 0 and plan.flatten()[sender[q]] == e)
    assert sum(after) == sum(before) and max(after) <= max(before)
    assert max(after) < max(before) or max(before) < 4 or max(before) <= 2


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"mode": "tree"}, OptionError, "direct"),
        ({"masters": []}, PoolError, "1 tensors, but 0 masters"),
        ({"masters": [torch.zeros(4, 8, dtype=torch.float16)]}, PoolError, r"must be \(4, 8\) torch.float32"),
        ({"masters": [torch.zeros(8, 4).t()]}, PoolError, "not contiguous"),
        ({"slot_expert_RS": torch.zeros(2, 2, dtype=torch.int32)}, PoolError, r"must be \(2, 1\) int32"),
        ({"slot_expert_RS": torch.zeros(2, 1)}, PoolError, "int32"),
    ],
)
def test_wrong_arguments(change: dict, error: type, says: str) -> None:
    bundle = Bundle("b", 2, 2, 1, (Part((8,), torch.float32),))
    pools = open_virtual_pools(bundle.replicate_regions(), 2, "cpu")
    good = {"masters": [torch.zeros(4, 8)], "slot_expert_RS": torch.full((2, 1), -1, dtype=torch.int32)}
    with pytest.raises(error, match=says):
        replicate_to_slots(pools, bundle, **{**good, **change})


def test_wrong_gradients_and_bundles() -> None:
    bundle = Bundle("b", 2, 2, 1, (Part((8,), torch.float32),))
    pools = open_virtual_pools(bundle.reduce_regions(), 2, "cpu")
    plan = torch.full((2, 1), -1, dtype=torch.int32)
    with pytest.raises(PoolError, match=r"Gradient 0 .* torch.float64"):
        reduce_from_slots(pools, bundle, [torch.zeros(4, 8, dtype=torch.float64)], plan)
    with pytest.raises(TopologyError, match=r"\[4, 6\] experts over 2 ranks"):
        Bundle.of("b", 2, 1, [torch.zeros(4, 8), torch.zeros(6, 8)], hosted=2)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnDevice:
    pytestmark = gpu

    @pytest.mark.parametrize("mode", ["direct", "relay", "adaptive"])
    @pytest.mark.parametrize("ranks, masters, slots", [(2, 2, 1), (9, 1, 1), (24, 3, 2)])
    def test_replicate(self, mode: str, ranks: int, masters: int, slots: int) -> None:
        from tests.data_plane.interpreted import check_virtual

        for seed, chunk in enumerate((1, 40000, 1 << 17)):
            bundle = Bundle("b", ranks, masters, slots, cases.WEIGHTS, chunk_bytes=chunk)
            check_virtual(bundle, cases.random_plan(ranks, masters, slots, seed, hot=0.7), mode, seed, "cuda")

    @pytest.mark.parametrize("ranks, masters, slots", [(2, 2, 1), (9, 1, 1), (24, 3, 2)])
    def test_reduce(self, ranks: int, masters: int, slots: int) -> None:
        from tests.data_plane.interpreted import check_reduce

        for seed, own in enumerate((torch.float32, torch.bfloat16)):
            bundle = Bundle("g", ranks, masters, slots, cases.GRADS)
            plan = cases.random_plan(ranks, masters, slots, seed, hot=0.7)
            check_reduce(bundle, [own] * len(cases.GRADS), plan, seed, "cuda")

    def test_routes(self) -> None:
        from tests.data_plane.interpreted import check_routes

        for seed, (ranks, masters, slots) in enumerate(((2, 1, 1), (21, 4, 2), (64, 4, 2), (128, 2, 4))):
            bundle = Bundle("b", ranks, masters, slots, (Part((4,), torch.int32),))
            for mode in ("direct", "relay", "adaptive"):
                check_routes(bundle, cases.random_plan(ranks, masters, slots, seed, hot=0.6), mode, "cuda")

    @pytest.mark.xdist_group("memory")
    def test_past_two_to_the_31(self) -> None:
        from tests.data_plane.interpreted import check_edge

        check_edge("cuda")

    def test_captured_in_a_graph(self) -> None:
        from tests.data_plane.interpreted import check_graph

        check_graph()

    def test_processes(self, monkeypatch) -> None:
        from tests.data_plane.interpreted import steps_on
        from tests.multirank import run_ranks

        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        run_ranks(4, steps_on, "cuda", 30)

    @pytest.mark.parametrize("how", ["stalled", "killed"])
    def test_a_missing_process(self, how: str, monkeypatch) -> None:
        from tests.data_plane.faults import check_missing

        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        check_missing(how, "cuda", stall_s=10)
