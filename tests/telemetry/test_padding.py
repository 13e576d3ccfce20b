"""`real_tokens`: padding is computed like all else, may hold anything, and is in no trace."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from tests import zoo
from tests.balancing import backend, relative
from tests.multirank import run_ranks
from ultraep_compile import real_tokens, shard_experts
from ultraep_compile.errors import OptionError, RoutingError
from ultraep_compile.telemetry import LayerTrace, get_recorder

TOP_K = zoo.HandMoE.top_k


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two sequences, padded on the left with what no router can score, and the mask."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, :5] = mask[1, :2] = 0
    x = torch.randn(2, 16, zoo.WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.where(mask[..., None] == 1, x, torch.nan), mask


def recorded(path: Path) -> LayerTrace:
    (layer,) = get_recorder(path).trace().layers
    return layer


def assert_consistent(layer: LayerTrace) -> None:
    """Shares have the counts as margins, and what was realised is what was planned."""
    assert np.array_equal(layer.realised_NP, layer.quota_NP)
    assert np.array_equal(layer.shares_nRP.sum(2), layer.counts_nRE.sum(2))
    assert np.array_equal(layer.shares_nRP.sum((1, 2)), layer.expert_load_NE.sum(1))


def test_padding_is_computed_and_not_counted(tmp_path: Path) -> None:
    """The trace has, for every source rank and expert, what the router asked for real tokens."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = zoo.HandMoE()
    model = copy.deepcopy(plain)
    model.compile(backend=backend(ranks=4, trace=str(tmp_path / "t.npz")))
    x, mask = padded_batch()
    with real_tokens(mask):
        out = model(x)
    assert relative(out[mask == 1].detach(), plain(x)[mask == 1].detach()) < 1e-6 and out[mask == 0].isnan().all()
    layer = recorded(tmp_path / "t.npz")
    assert_consistent(layer)
    _, ids = plain.route(x.view(-1, zoo.WIDTH))
    for rank in range(4):
        rows = slice(8 * rank, 8 * rank + 8)
        asked = torch.bincount(ids[rows][mask.view(-1)[rows] == 1].flatten(), minlength=zoo.EXPERTS)
        assert layer.counts_nRE[0, rank].tolist() == asked.tolist()
    with pytest.raises(RoutingError, match=r"score of token 0 .* is nan"):
        model(x)
    worse = x.clone()
    worse[1, 9, 0] = torch.inf
    with pytest.raises(RoutingError, match=r"score of token 25 "), real_tokens(mask):
        model(worse)


def test_steps_that_do_not_count(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = zoo.HandMoE()
    model.compile(backend=backend(ranks=4, trace=str(tmp_path / "t.npz")))
    x, mask = padded_batch()
    with real_tokens(False):
        model(torch.full_like(x, torch.nan))
    model(x.nan_to_num())
    assert len(recorded(tmp_path / "t.npz")) == 1
    with real_tokens(mask[:1]), pytest.warns(UserWarning, match="mask of 16 entries, but a layer routes 32 tokens"):
        model(x.nan_to_num())
    with real_tokens(True):
        model(x.nan_to_num())
    assert recorded(tmp_path / "t.npz").source_load_NR.sum(1).tolist() == [32 * TOP_K] * 3


def test_padding_stays_harmless_when_it_is_recomputed() -> None:
    """Backward runs after the block: what forward has passed is not judged again."""
    torch._dynamo.reset()
    model = zoo.HandMoE()
    call = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend=backend(ranks=4))
    x, mask = padded_batch()
    with real_tokens(mask):
        out = call(x)
    out[mask == 1].pow(2).sum().backward()
    assert model.down.grad is not None


@pytest.mark.parametrize("mask", [torch.ones(2, 16), torch.ones(1, 1, 4, 4, dtype=torch.bool), None, 1])
def test_masks_of_other_kinds_are_refused(mask: object) -> None:
    with pytest.raises(OptionError, match="real_tokens got"), real_tokens(mask):  # type: ignore[arg-type]
        pass


def _one_rank_has_nothing_to_do(rank: int, path: str) -> list[list[int]]:
    torch.manual_seed(0)
    model = shard_experts(zoo.HandMoE(), init_device_mesh("cpu", (2,)))
    model.compile(backend=backend(redundant_experts=1, trace=path))
    x, mask = padded_batch()
    with real_tokens(mask if rank == 0 else False):
        model(x)
    with real_tokens(False):  # nobody
        model(x)
    model(x.nan_to_num())
    if rank:
        return []
    layer = recorded(Path(path))
    assert_consistent(layer)
    return layer.source_load_NR.tolist()


def test_a_dummy_batch_of_one_rank(tmp_path: Path) -> None:
    loads, _ = run_ranks(2, _one_rank_has_nothing_to_do, str(tmp_path / "t.npz"))
    assert loads == [[25 * TOP_K, 0], [32 * TOP_K, 32 * TOP_K]]
