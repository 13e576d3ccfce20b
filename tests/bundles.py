"""MoE layers whose experts consist of more than weights and biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests import zoo
from tests.zoo import EXPERTS, WIDTH


class Quantised(zoo.HandMoE):
    """int8 weights with scales for each expert and output, or for each expert; multiplied before the experts run."""

    def __init__(self, held_as: str = "parameter", per_output: bool = True) -> None:
        super().__init__()
        for name in ("up", "down"):
            weight = getattr(self, name).detach()
            delattr(self, name)
            scale = weight.abs().amax(-1 if per_output else (-1, -2), keepdim=True) / 127
            quantised = (weight / scale).round().to(torch.int8)
            scale = scale if per_output else scale.view(EXPERTS)
            if held_as == "buffer":
                self.register_buffer(f"{name}_int8", quantised)
            else:
                setattr(self, f"{name}_int8", nn.Parameter(quantised, requires_grad=False))
            if held_as == "parameter":
                setattr(self, f"{name}_scale", nn.Parameter(scale))
            elif held_as == "attribute":
                setattr(self, f"{name}_scale", scale)
            else:
                self.register_buffer(f"{name}_scale", scale)

    def weight(self, name: str, ids: Tensor) -> Tensor:
        scale = getattr(self, f"{name}_scale").view(EXPERTS, -1, 1)
        return (getattr(self, f"{name}_int8").float() * scale)[ids]

    def experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        a = self.act(torch.bmm(self.weight("up", ids), rows.unsqueeze(-1)).squeeze(-1) + self.up_bias[ids])
        return torch.bmm(self.weight("down", ids), a.unsqueeze(-1)).squeeze(-1)


class QuantisedByRow(Quantised):
    """The same, multiplied for each row."""

    def weight(self, name: str, ids: Tensor) -> Tensor:
        return getattr(self, f"{name}_int8")[ids].float() * getattr(self, f"{name}_scale").view(EXPERTS, -1, 1)[ids]


class ScaledResult(zoo.HandMoE):
    """A buffer selected by expert id scales the rows that come out."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(EXPERTS, *(shape or (WIDTH,))) + 0.5)

    def experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        return super().experts(rows, ids) * self.scale[ids]


class LoRA(zoo.HandMoE):
    """Low-rank factors for each expert, applied to the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.randn(EXPERTS, 4, WIDTH) * 0.1)
        self.lora_b = nn.Parameter(torch.randn(EXPERTS, 24, 4) * 0.1)
        for p in (self.up, self.up_bias, self.down):
            p.requires_grad_(False)

    def experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        a = torch.bmm(self.up[ids], rows.unsqueeze(-1)).squeeze(-1) + self.up_bias[ids]
        a = a + torch.bmm(self.lora_b[ids], torch.bmm(self.lora_a[ids], rows.unsqueeze(-1))).squeeze(-1)
        return torch.bmm(self.down[ids], self.act(a).unsqueeze(-1)).squeeze(-1)


class MergedLoRA(LoRA):
    """The same, added to the weights before the experts run."""

    def experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        up = self.up + self.lora_b @ self.lora_a
        a = self.act(torch.bmm(up[ids], rows.unsqueeze(-1)).squeeze(-1) + self.up_bias[ids])
        return torch.bmm(self.down[ids], a.unsqueeze(-1)).squeeze(-1)


BUNDLES = {
    **{f"quantised {held}{'' if per else ', one scale an expert'}": lambda held=held, per=per: Quantised(held, per)
       for held in ("parameter", "scale buffer", "buffer") for per in (True, False)},
    "quantised by row": QuantisedByRow,
    "quantised by row, buffers": lambda: QuantisedByRow("buffer"),
    "scaled result": ScaledResult,
    "scaled result, one scale an expert": lambda: ScaledResult(1),
    "LoRA": LoRA,
    "merged LoRA": MergedLoRA,
}  # fmt: skip
