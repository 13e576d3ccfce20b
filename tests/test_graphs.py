"""What a compiler may hand over: nothing to balance, layers cut in two, several graphs, a recomputed router.

Which test stands for what may go wrong with models, graphs, shapes and checkpoints:

| what happens | tests |
| --- | --- |
| no MoE layer, or another number than expected | here; `test_behaviour.py::test_bad_options` |
| a gate or experts of an unknown kind | `passes/test_refusals.py`, `ladder/test_forms.py::test_refused`, `..._are_missed_not_lost` |
| a graph break in a layer; several graphs | here; `test_compositions.py` (`_with_split_graphs`) |
| layers in `vmap`, `torch.func.grad`, forward-mode AD, `cond`; second derivatives | `test_transforms.py` |
| detection itself fails | `test_behaviour.py::test_a_fault_in_detection_costs_the_balance_not_the_compilation` |
| no tokens on a rank, on all, for an expert; all to one; all experts chosen | `ops/test_virtual.py`, `ops/test_collective.py`, `test_behaviour.py`, `test_surroundings.py::test_hard_loads`, `test_models.py::test_handmade` |
| other numbers of tokens in every step; more than buffers hold | `test_behaviour.py::test_changing_sizes_...`, `test_surroundings.py::test_sizes_that_are_all_dynamic_or_none`, `ops/test_virtual.py::test_overflow_...`, `ops/test_symmetric.py` |
| NaN or infinite scores; ids out of range, twice | `ops/test_routing.py`, `ops/test_collective.py`, `codegen/test_tokens.py` |
| padded and dummy tokens | `telemetry/test_padding.py` |
| close scores, recomputed | here; `test_behaviour.py::test_activation_checkpointing` |
| experts that ranks do not divide; no slots, too many | `test_behaviour.py::test_bad_options`, `test_processes.py::test_bad_topologies_...`, `planner/test_hostile.py` |
| CUDA graphs, of single kernels and of recording | `codegen/test_kernels.py`, `codegen/test_tokens.py`, `telemetry/test_recorder.py`, all on a GPU |
| several models; compiled twice; an exception in between | `test_surroundings.py` |
| weights loaded, trained, or adapters changed between steps | `test_behaviour.py`, `test_checkpoints.py`, `ladder/test_forms.py`, `test_bundles.py` |
| tensors beside the weights, known and unknown | `test_bundles.py` |
| activation checkpoints, in all forms and around what is compiled | `test_behaviour.py::test_forms_of_activation_checkpointing` |
| autocast, `no_grad`, eval and training, accumulation, clipping, offloaded activations, anomaly detection, default dtype and device | `test_surroundings.py` |
| tokens divided over the sequence | `test_context_parallel.py` |
| FSDP2, DDP, tensor parallelism, ties | `test_compositions.py` |
| checkpoints of other ranks, of the whole model, of one rank alone, that do not fit, of models that were never whole | `test_checkpoints.py`, `test_module_experts.py`, `test_compositions.py` |
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import zoo
from tests.balancing import backend, relative, step
from ultraep_compile import explain
from ultraep_compile.ops import routing
from ultraep_compile.report import collect_reports


def test_a_dense_model_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    with caplog.at_level(logging.INFO, logger="ultraep_compile"):
        out = torch.compile(model, backend=backend(ranks=4))(x)
    assert torch.equal(out, model(x))
    (line,) = [r for r in caplog.records if r.name.startswith("ultraep_compile")]
    assert line.levelno == logging.INFO and "no MoE layer in this graph" in line.message


class BrokenBefore(zoo.HandMoE):
    """A compiler cannot follow from the router to the experts."""

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(h)
        torch._dynamo.graph_break()
        return w, ids


class BrokenInside(zoo.HandMoE):
    """Nor from one product to the next."""

    def act(self, a: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.relu(a)


@pytest.mark.parametrize(("kind", "sites"), [(BrokenBefore, 3), (BrokenInside, 4)])
def test_a_break_in_a_layer(kind: type[nn.Module], sites: int) -> None:
    """What is whole in one graph is balanced: the experts without their router, or each product for itself; and the layers
    before and after. The break is told with its line.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(zoo.HandMoE(), kind(), zoo.HandMoE()), torch.randn(2, 16, zoo.WIDTH)
    with collect_reports() as collected:
        ours = step(torch.compile(model, backend=backend(ranks=4)), model, {"input": x})
    assert len(collected.graphs) > 1 and sum(len(g.prepared) for g in collected.graphs) == sites
    eager = step(model, model, {"input": x})
    assert relative(ours.loss, eager.loss) < 1e-6
    assert all(relative(ours.grads[n], g) < 1e-5 for n, g in eager.grads.items())
    found = explain(model, (x,))
    assert [s.status for s in found.moe_sites] == ["rewritten"] * sites
    assert {s.name for s in found.moe_sites} == {"0", "1", "2"}
    assert found.rewritten_parameters == found.expert_parameters == sum(p.numel() for n, p in model.named_parameters() if "router" not in n)
    (reason,) = found.graph_breaks
    assert "test_graphs.py" in reason and "torch._dynamo.graph_break()" in reason


def test_close_scores_are_routed_alike_when_they_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 scores of which many are equal: forward and recomputation count the same tokens for every expert."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counted: list[Tensor] = []
    real = routing.make_plan
    monkeypatch.setattr(routing, "make_plan", lambda counts, *a, **k: counted.append(counts.clone()) or real(counts, *a, **k))
    model = zoo.HandMoE().bfloat16()
    with torch.no_grad():
        model.router.weight.copy_(model.router.weight.sign() * 2**-6)
    h = torch.randn(4, 64, zoo.WIDTH).sign().bfloat16()
    scores = model.router(h).flatten(0, 1).sort(-1).values
    assert (scores.diff(dim=-1) == 0).any(-1).float().mean() > 0.9
    call = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend=backend(ranks=4))
    zoo.loss_of(call(h)).backward()
    forward, again = counted
    assert torch.equal(forward, again) and forward.sum() == 4 * 64 * zoo.HandMoE.top_k
