"""Everything that belongs to an expert travels with it: scales, quantised weights, LoRA factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests import zoo
from tests.balancing import backend, prepared, relative, step
from tests.bundles import BUNDLES, Quantised
from tests.multirank import fake_group
from ultraep_compile import shard_experts
from ultraep_compile.errors import ShardingError
from ultraep_compile.report import collect_reports


@pytest.mark.parametrize("name", BUNDLES)
def test_bundle(name: str) -> None:
    """Two layers, rewritten, with eager's loss and gradients; both products belong to the site."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(BUNDLES[name](), BUNDLES[name]())
    model = copy.deepcopy(plain)
    model.compile(backend=backend(ranks=4))
    inputs = {"input": torch.randn(2, 16, zoo.WIDTH)}
    with collect_reports() as collected:
        ours = step(model, model, inputs)
    eager = step(plain, plain, inputs)
    sites = [s for g in collected.graphs for s in g.prepared.values()]
    assert len(sites) == 2 and not any(g.misses for g in collected.graphs)
    assert all(sum(len(p.shape) == 2 for p in s.program.signature.params) >= 2 for s in sites)
    assert ours.grads.keys() == eager.grads.keys() and relative(ours.loss, eager.loss) < 1e-6
    for key, grad in eager.grads.items():
        assert relative(ours.grads[key], grad) < 1e-5, key


def test_lora_factors_as_peft_makes_them() -> None:
    """peft puts the factors into the experts module for the time of a forward, which breaks the graph around it."""
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    model, inputs = prepared("mixtral", "batched_mm", output_router_logits=False, num_hidden_layers=1)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    plain = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=targets))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name:  # zero at first: they would hide mistakes
                p.normal_(std=0.05)
    ours = copy.deepcopy(plain)
    ours.compile(backend=backend(ranks=4))
    with collect_reports() as collected:
        got = step(ours, ours, inputs)
    expected = step(plain, plain, inputs)
    assert sum(len(g.prepared) for g in collected.graphs) == 1
    assert relative(got.loss, expected.loss) < 1e-6 and got.grads.keys() == expected.grads.keys()
    assert len(got.grads) == 4
    for key, grad in expected.grads.items():
        assert relative(got.grads[key], grad) < 1e-5, key
    with torch.no_grad():  # another adapter's factors count from the next step on
        for model in (ours, plain):
            torch.manual_seed(9)
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.1)
    swapped = plain(**inputs).loss.detach()
    assert relative(ours(**inputs).loss.detach(), swapped) < 1e-6 < relative(expected.loss, swapped)


def test_a_tensor_that_is_not_registered_is_refused_by_name() -> None:
    """Other ranks may hold another value, so with a group its layer runs unbalanced; sharded, it is an error."""
    with fake_group(4) as group:
        torch._dynamo.reset()
        model = Quantised("attribute")
        model.compile(backend=backend(group=group))
        with collect_reports() as collected, pytest.warns(UserWarning, match="run unbalanced"):
            model(torch.randn(2, 16, zoo.WIDTH))
        (miss,) = [m for g in collected.graphs for m in g.misses]
        assert "up_scale" in miss.reason and "neither a parameter nor a buffer" in miss.reason
        with pytest.raises(ShardingError, match=r"blocks\.0\.up_scale is a tensor of shape \[8, 24, 1\]"):
            shard_experts(nn.ModuleDict({"blocks": nn.ModuleList([model])}), init_device_mesh("cpu", (4,)))
