"""Experts change places and the model stays the same function: outputs, gradients, training, state_dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests import zoo
from ultraep_compile.errors import ShardingError
from ultraep_compile.permutation import permute_experts
from ultraep_compile.sharding import stacked_experts


def last_layer(model: nn.Module) -> tuple[str, nn.Module, int]:
    """(name, module with router and experts, E) of the last MoE layer."""
    *_, (name, _, experts, _) = stacked_experts(model)
    parent = name.rpartition(".")[0]
    return parent, model.get_submodule(parent), experts


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "lfm2_moe", "afmoe", "qwen3_next"])
def test_outputs_are_unchanged(family):
    torch.manual_seed(0)
    model, inputs = zoo.build(family, "batched_mm")
    before = model.eval()(**inputs).logits
    _, layer, experts = last_layer(model)
    order_E = torch.randperm(experts)
    keys = list(model.state_dict())
    moved = permute_experts(layer, order_E, (torch.randn(2, 24, zoo.WIDTH),))
    after = model(**inputs).logits
    assert len(moved) >= 3 and list(model.state_dict()) == keys
    assert (after - before).norm() <= 1e-6 * before.norm()
    permute_experts(layer, order_E.argsort(), (torch.randn(2, 24, zoo.WIDTH),))
    assert torch.equal(model(**inputs).logits, before)


def test_example_by_name():
    model, _ = zoo.build("mixtral", "batched_mm")
    _, layer, experts = last_layer(model)
    assert permute_experts(layer, torch.randperm(experts), {"hidden_states": torch.randn(1, 8, zoo.WIDTH)})


def test_training_goes_on_as_before():
    torch.manual_seed(1)
    model, inputs = zoo.build("mixtral", "batched_mm")
    twin = copy.deepcopy(model)
    _, layer, experts = last_layer(model)
    example = (torch.randn(1, 16, zoo.WIDTH),)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, twin)]
    order_E = torch.randperm(experts)

    def step(number: int) -> None:
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            one(**inputs, output_router_logits=False).loss.backward()  # its auxiliary loss mixes layers by expert number
            optimizer.step()
            optimizer.zero_grad()

    for n in range(2):
        step(n)
    moved = permute_experts(layer, order_E, example, optimizer=optimizers[0])
    for n in range(3):
        step(n)
    theirs = dict(last_layer(twin)[1].named_parameters())
    for name, tensor in layer.named_parameters():
        expected = theirs[name][order_E] if name in moved else theirs[name]
        assert (tensor - expected).norm() <= 1e-5 * expected.norm(), name


def test_groups_of_experts_are_refused_and_left_alone():
    torch.manual_seed(2)
    model, _ = zoo.build("deepseek_v3", "batched_mm")
    _, layer, experts = last_layer(model)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ShardingError, match=r"put back.*in groups"):
        permute_experts(layer, torch.arange(experts).roll(1), (torch.randn(2, 32, zoo.WIDTH),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_names_tell_experts_from_sizes_that_coincide():
    class Coincidence(nn.Module):
        """As wide as it has experts: the last layer's weight looks like one row for each expert."""

        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 6, bias=False)
            self.weights = nn.Parameter(torch.randn(6, 6, 6))
            self.last = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, ids = self.router(x).softmax(-1).topk(2, -1)
            return self.last((torch.einsum("ti,tkij->tkj", x, self.weights[ids]) * weight[..., None]).sum(1))

    layer, example = Coincidence(), (torch.randn(40, 6),)
    with pytest.raises(ShardingError, match=r"last\.weight.*names="):
        permute_experts(layer, torch.randperm(6).roll(1), example)
    before = layer(*example)
    assert permute_experts(layer, torch.arange(6).flip(0), example, ["router.weight", "weights"]) == ["weights", "router.weight"]
    assert torch.allclose(layer(*example), before, rtol=1e-5, atol=1e-6)


def test_bad_input():
    model, _ = zoo.build("mixtral", "batched_mm")
    _, layer, experts = last_layer(model)
    example = (torch.randn(1, 8, zoo.WIDTH),)
    with pytest.raises(ShardingError, match="no permutation of the layer's 8 experts"):
        permute_experts(layer, torch.zeros(experts, dtype=torch.int64), example)
    with pytest.raises(ShardingError, match=r"'gate\.bias' is no tensor"):
        permute_experts(layer, torch.arange(experts), example, ["gate.bias"])
    with pytest.raises(ShardingError, match="one set of stacked experts; found: none"):
        permute_experts(nn.Linear(4, 4), torch.arange(4), (torch.randn(1, 4),))
