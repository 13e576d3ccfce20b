"""Layers that divide their experts over processes by themselves: balanced over the same processes, and equal to themselves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests import forms_parallel, forms_parallel_more, zoo
from tests.balancing import backend
from tests.multirank import run_ranks
from ultraep_compile import explain, shard_experts
from ultraep_compile.errors import ShardingError, TopologyError
from ultraep_compile.ladder.install import lifted_layer
from ultraep_compile.ops import alike
from ultraep_compile.ops.alike import digest
from ultraep_compile.report import collect_reports


def _build(name: str, rank: int, world: int, each: int) -> nn.Module:
    more = forms_parallel_more.FORMS | forms_parallel_more.REPORTED
    return more[name](rank, world, each).train() if name in more else forms_parallel.build(name, rank, world, each)


def _batch(rank: int, seed: int, skewed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    x = torch.randn(2, 16 + 4 * seed, forms_parallel.WIDTH, generator=generator)
    favourite = torch.randn(forms_parallel.WIDTH, generator=torch.Generator().manual_seed(seed))
    return x * 0.1 + favourite if skewed else x


def _step(call, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, its gradient with respect to tokens, to all parameters of this rank, and what the module counted."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + getattr(model, "l_aux", torch.zeros(()))
    loss.backward()
    local = lambda t: t.to_local() if isinstance(t, DTensor) else t  # noqa: E731
    grads = {n: local(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    counted = {n: b.clone() for n, b in model.named_buffers()}
    for buffer in model.buffers():
        buffer.zero_()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads, **counted}


def _equal_to_itself(rank: int, world: int, each: int, names: tuple[str, ...], transport: str) -> list[dict]:
    out = []
    for name in names:
        model = _build(name, rank, world, each)
        batches = [_batch(rank, 0), _batch(rank, 1), _batch(rank, 2, skewed=True)]
        eager = [_step(model, model, x) for x in batches]
        keys = list(model.state_dict())
        found = explain(model, {"x": batches[0]})
        assert list(model.state_dict()) == keys
        for buffer in model.buffers():
            buffer.zero_()
        again = _step(model, model, batches[0])
        assert all(torch.equal(again[n], t) for n, t in eager[0].items()), "eager mode runs the module's own forward"
        with pytest.raises(ShardingError, match=r"divides its experts over \d ranks by itself"):
            shard_experts(model, init_device_mesh("cpu", (world,)))
        facts: dict = {"found": found.to_json()["moe_sites"], "coverage": found.to_json()["coverage"], "worst": {}, "bits": []}
        results = {}
        for planner in ("quota", "none") if name == names[0] else ("quota",):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=backend(planner=planner, redundant_experts=1, transport=transport), dynamic=True)
            with collect_reports() as collected:
                results[planner] = [_step(compiled, model, x) for x in batches]
            sites = [s for g in collected.graphs for s in g.prepared.values()]
            facts["sites"] = [(s.layout.experts, s.layout.ranks, s.layout.slots, s.summed) for s in sites]
            code = "".join(g.graph_module.code for g in collected.graphs)
            facts["exchanges"] = "all_to_all" in code or "tolist" in code
        for ours, theirs in zip(results["quota"], eager, strict=True):
            assert ours.keys() == theirs.keys()
            for n, t in theirs.items():
                error = float((ours[n].double() - t.double()).norm()) / max(float(t.double().norm()), 1e-3)
                facts["worst"][n] = max(facts["worst"].get(n, 0.0), error)
        facts["bits"] = [torch.equal(a["y"], b["y"]) for a, b in zip(results["quota"], results.get("none", ()), strict=False)]
        out.append(facts)
    return out


ALL = tuple(forms_parallel.FORMS | forms_parallel_more.FORMS)
CASES = [
    (2, 2, ("HookedGrouped", "SummedLoads"), "auto"),
    (4, 1, ("Decoder",), "symmetric"),
    *(pytest.param(world, each, ALL, "auto", marks=pytest.mark.slow) for world, each in ((2, 3), (4, 1), (4, 2))),
    pytest.param(4, 2, ("Halves",), "auto", marks=pytest.mark.slow),
    pytest.param(2, 2, ALL, "symmetric", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("world, each, names, transport", CASES)
def test_equal_to_itself(world: int, each: int, names: tuple[str, ...], transport: str) -> None:
    """Forward, gradients and buffers of planned layers against the layer's own exchange, and the same bits for any plan."""
    for rank, forms in enumerate(run_ranks(world, _equal_to_itself, world, each, names, transport)):
        for name, facts in zip(names, forms, strict=True):
            over = world // 2 if name == "Halves" else world
            assert len(facts["found"]) == (2 if name == "Decoder" else 1)
            for site in facts["found"]:
                assert (site["status"], site["rung"], site["experts"], site["top_k"]) == ("rewritten", "lifted", over * each, 2), name
                assert f"over the {over} ranks of the layer's own all-to-all" in site["matched"]
            assert facts["coverage"]["rewritten"] == facts["coverage"]["expert_parameters"] > 0
            assert facts["sites"] and set(facts["sites"]) == {(over * each, over, 1, True)}, name
            assert not facts["exchanges"], "the layer's own exchange must be gone"
            limit = 2e-2 if "Grouped" in name else 2e-5
            assert max(facts["worst"].values()) < limit, (name, rank, facts["worst"])
            assert all(facts["bits"]), (name, rank)


REASONS = {
    "Gathered": ("unbalanceable", "expert-parallel already: its forward exchanges rows by all_gather"),
    "GatheredLooped": ("unbalanceable", "expert-parallel already: its forward exchanges rows by all_gather"),
    "GatheredDense": ("missed", "expert-parallel already: its forward exchanges rows by all_gather"),
    "Keeping": ("missed", "it keeps last_rows in the module, made from what all_to_all_single brought"),
    "Unlike": ("missed", "do not compute the same"),
    "AcrossRows": ("missed", ""),
}


REASONS_OF_4 = {"TwoHops": ("missed", "it exchanges rows over 2 different groups")}


def _reported(rank: int, world: int, each: int, reasons: dict[str, tuple[str, str]]) -> list[tuple]:
    """(status, reason, no layer replaced, equal with our backend) of forms that stay as they are."""
    out = []
    for name in reasons:
        model = _build(name, rank, world, each)
        x = _batch(rank, 0)
        torch._dynamo.reset()
        alone = _step(torch.compile(model, backend="aot_eager"), model, x)  # not eager: torch 2.11 itself loses gradients here
        found = explain(model, {"x": x})
        for buffer in model.buffers():
            buffer.zero_()
        torch._dynamo.reset()
        ours = _step(torch.compile(model, backend=backend()), model, x)
        (site,) = found.moe_sites
        same = all(torch.allclose(ours[n], t, atol=1e-5, rtol=1e-4) for n, t in alone.items())
        out.append((site.status, site.reason, lifted_layer(model) is None, same))
    return out


@pytest.mark.parametrize(
    "world, each, reasons", [(2, 2, REASONS), pytest.param(4, 1, REASONS_OF_4, marks=pytest.mark.slow)]
)
def test_reported_and_left_alone(world: int, each: int, reasons: dict[str, tuple[str, str]]) -> None:
    """What cannot be replaced is told, on all ranks, and runs as it is."""
    for rank in run_ranks(world, _reported, world, each, reasons):
        for (name, (status, reason)), found in zip(reasons.items(), rank, strict=True):
            assert found[0] == status and reason in found[1], (name, found)
            assert found[2:] == (True, True), (name, found)


def _of_its_own(rank: int) -> tuple[str, str]:
    """With the option `group`: what is said to a rank whose experts are not those of the others, and where they are."""
    torch.manual_seed(0)
    call = torch.compile(zoo.HandMoE(), backend=backend(group=dist.group.WORLD))
    x = torch.randn(2, 16, zoo.WIDTH, generator=torch.Generator().manual_seed(rank))
    call(x)
    torch._dynamo.reset()
    alike._compared.clear()
    said = []
    layer = zoo.HandMoE()
    for seed in (rank, rank + 2):  # the second step is no better than the first
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0, 0.1)
        with pytest.raises(TopologyError) as refused:
            torch.compile(layer, backend=backend(group=dist.group.WORLD))(x)
        said.append(str(refused.value))
    return said[0], said[1]


def test_with_the_option_group_experts_that_differ_between_ranks_are_refused() -> None:
    for said in run_ranks(2, _of_its_own):
        for text in said:
            assert "the weights of ranks 0 and 1 differ" in text and "leave 'group' out" in text and "shard_experts" in text


def test_digest_is_exact() -> None:
    assert int(digest(torch.tensor([0.0, 1.0]))) == 0x3F800000
    weight = torch.randn(3, 5, 7)
    other = weight.clone()
    other[1, 2, 3] = torch.nextafter(other[1, 2, 3], torch.tensor(10.0))
    for dtype in (torch.float32, torch.float64):
        assert int(digest(weight.to(dtype))) == int(digest(weight.to(dtype).mT)) != int(digest(other.to(dtype)))
