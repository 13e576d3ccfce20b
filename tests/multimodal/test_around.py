"""Values that go around the cut between stages are refused by name, however small their share of the loss."""

from __future__ import annotations

import pytest
import torch

from tests.multimodal.seeing import Seeing, batch, made
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.parts import find_parts

TINY = 1e-6  # of the loss: far below what a comparison of losses tells from rounding


class Around(Seeing):
    """Something of the layers reaches the loss, or other layers, besides their outputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kept = how, []
        if how.startswith("hook"):
            for layer in self.trunk:
                layer.mlp[0].register_forward_hook(lambda module, args, output: self.kept.append(output))

    def loss(self, states, seen, image, tokens, labels):
        loss = self.head(states[:, -tokens.shape[1] :])
        kept, self.kept = self.kept, []
        extra = self.extra(kept) if kept or self.how == "regularised" else 0.0
        return self.text_loss(loss, labels) + extra

    def extra(self, kept):
        if self.how in ("hook: first", "first output"):
            return TINY * kept[0].square().mean()
        if self.how in ("hook: last", "last output"):
            return TINY * kept[-1].square().mean()
        if self.how == "hook: metric only":
            self.seen = float(kept[0].detach().sum())
            return 0.0
        if self.how == "regularised":
            return TINY * sum(layer.mix.weight.square().sum() for layer in self.trunk)
        return TINY * sum(k.square().mean() for k in kept)

    def forward(self, image, tokens, labels):
        self.kept = []
        seen = self.features(image)
        x = torch.cat([seen, self.embedded(tokens)], 1)
        first = room = None
        for n, layer in enumerate(self.trunk):
            if self.how == "skip" and n == 3:
                x = x + TINY * first
            x = layer(x)
            first = x if first is None else first
            if self.how == "buffer":
                x = torch.empty_like(x).copy_(x) if n == 0 else room.clone().copy_(x)
                room = x
            if self.how.endswith("output") or self.how == "all outputs":
                self.kept.append(x)
        return self.loss(self.norm(x), seen, image, tokens, labels)


@pytest.mark.parametrize("how", ["hook: all", "hook: first", "all outputs", "first output"])
def test_the_loss_reads_other_stages(how):
    with pytest.raises(
        PartsError, match=r"the loss reads something made before layer 2 of trunk.*output_router_logits"
    ):
        find_parts(made(Around, how), batch(), 2)


def test_a_layer_reads_other_stages():
    with pytest.raises(PartsError, match="layer 3 reads something made before layer 2 of trunk"):
        find_parts(made(Around, "skip"), batch(), 2)


@pytest.mark.parametrize("how", ["none", "hook: last", "last output", "hook: metric only", "regularised", "buffer"])
@pytest.mark.parametrize("stages", [2, 4])
def test_what_stages_have_themselves(how, stages):
    assert len(find_parts(made(Around, how), batch(), stages).stages) == stages


@pytest.mark.parametrize("how", ["hook: all", "all outputs", "skip"])
def test_one_stage_has_everything(how):
    find_parts(made(Around, how), batch(), 1)


def test_made_inside_the_first_layer():
    """It is the whole first stage, so that nothing handed on stands behind what is made in it."""
    with pytest.raises(PartsError, match="the loss reads something made before layer 1 of trunk"):
        find_parts(made(Around, "hook: first"), batch(), 2, costs=[3e9, 1e9, 1e9, 1e9])
