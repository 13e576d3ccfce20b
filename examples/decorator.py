"""A MoE layer written by hand, balanced by a decorator on its class.

    python examples/decorator.py

The class stays the class: state_dict keys, pickling, copying and subclassing are as they were. Nothing in it
knows about ranks.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import ultraep_compile

WIDTH, EXPERTS, TOP_K = 32, 8, 2


class MoE(nn.Module):
    """Softmax router, two-layer experts, weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        weight, expert = torch.softmax(self.router(h), -1).topk(TOP_K, -1)
        rows = h.repeat_interleave(TOP_K, 0).unsqueeze(-1)
        expert = expert.reshape(-1)
        rows = torch.bmm(self.down[expert], torch.relu(torch.bmm(self.up[expert], rows))).squeeze(-1)
        return x + (rows * weight.reshape(-1, 1)).view(-1, TOP_K, WIDTH).sum(1).view_as(x)


@ultraep_compile.balance(ranks=4, redundant_experts=2, inner="aot_eager", expect_moe_sites=1)
class BalancedMoE(MoE):
    """The same model; `expect_moe_sites` makes it an error if its MoE layer is ever not recognised."""


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    torch.manual_seed(0)
    plain, balanced = MoE(), BalancedMoE()
    balanced.load_state_dict(plain.state_dict())
    x = torch.randn(4, 32, WIDTH)

    difference = (balanced(x) - plain(x)).norm() / plain(x).norm()
    ours, theirs = gradients(balanced, x), gradients(plain, x)
    worst = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    print(f"relative difference: output {difference:.1e}, worst gradient {worst:.1e}")

    assert difference < 1e-6 and worst < 1e-5
    assert list(balanced.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(balanced)
    assert isinstance(twin, MoE) and torch.equal(twin(x), balanced(x))
    print("ok")


if __name__ == "__main__":
    main()
