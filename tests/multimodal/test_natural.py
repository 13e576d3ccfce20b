"""Encoders that no gradient passes, and generators as they are written: parts are found by values, not by gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.multimodal.seeing import SAMPLES, WIDTH, WORDS, Layer, Seeing, batch, beside, made
from tests.multimodal.test_families import assert_same
from tests.multirank import run_ranks
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.parts import find_parts


class Quiet(Seeing):
    """The tower has no gradients, in one of the ways in which people write that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.codebook = nn.Parameter(torch.randn(12, WIDTH), requires_grad=False)
        self.codes = nn.Embedding(12, WIDTH)

    def patches(self, image):
        x = self.tower["patch"](image).flatten(2).transpose(1, 2)
        for block in self.tower["blocks"]:
            x = block(x)
        return x

    @torch.no_grad()
    def frozen(self, image):
        return self.patches(image)

    def features(self, image):
        if self.how == "detached":
            return self.projector(self.patches(image).detach())
        if self.how == "decorated":
            return self.projector(self.frozen(image))
        if self.how == "inference":
            with torch.inference_mode():
                seen = self.patches(image)
            return self.projector(seen.clone())
        with torch.no_grad():
            seen = self.patches(image)
            if self.how == "numbers":  # of the nearest code of each patch
                ids = torch.cdist(seen, self.codebook).argmin(-1)
                return self.codes(ids)
        return self.projector(seen)

    def forward(self, image, tokens, labels):
        if self.how == "numbers":
            with torch.enable_grad():
                return super().forward(image, tokens, labels)
        return super().forward(image, tokens, labels)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("how", ["under_no_grad", "detached", "decorated", "inference"])
def test_encoders_without_gradients(how, frozen):
    """Parameters of the tower that are trainable by oversight have no gradient, as in the model itself."""
    model, whole = made(Quiet, how), batch()
    for part in model.tower.values():
        part.requires_grad_(not frozen)
    parts = find_parts(model, whole, 2)
    assert parts.anatomy.roles.encoders == ["tower"]
    assert_same(parts, parts.microbatches(whole, 2))


class Apart(Seeing):
    def features(self, image):
        return super().features(image).detach()


def _split_backward(rank):
    return beside(made(Apart), batch(), [batch(), batch(2)], base="zero-bubble")


def test_split_backward_where_no_gradient_reaches_the_features():
    for worst, error in run_ranks(2, _split_backward):
        assert not error and worst < 1e-4


class Maker(nn.Module):
    """A diffusion transformer: noisy latents, conditioned by states of the language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, noisy, condition, t):
        x = self.first(noisy) + self.time(t[:, None])[:, None] + condition
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Unified(Seeing):
    """Text loss (or none) beside the flow loss of a generator whose targets a frozen autoencoder makes (or the batch has)."""

    def __init__(self, text: bool, vae: bool, bias: bool, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.text, self.norm, self.head = text, norm(WIDTH), nn.Linear(WIDTH, WORDS, bias=bias)
        self.vae = (
            nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.SiLU(), nn.Conv2d(6, 4, 1)).requires_grad_(False) if vae else None
        )
        self.connector, self.maker = nn.Linear(WIDTH, WIDTH), Maker()

    def forward(self, image, tokens, labels, target, t, noise):
        x = torch.cat([self.features(image), self.table(tokens)], 1)
        for layer in self.trunk:
            x = layer(x)
        states = self.norm(x)
        loss = self.text_loss(self.head(states[:, -tokens.shape[1] :]), labels) if self.text else 0
        if self.vae is not None:
            with torch.no_grad():
                target = self.vae(target).flatten(2).transpose(1, 2)
        a = t[:, None, None]
        velocity = self.maker((1 - a) * target + a * noise, self.connector(states[:, -4:]), t)
        return loss + F.mse_loss(velocity, noise - target)


@pytest.mark.parametrize(
    ("text", "vae", "bias", "norm"),
    [
        (True, True, False, nn.LayerNorm),
        (True, False, False, nn.LayerNorm),
        (True, False, True, nn.RMSNorm),
        (True, True, True, nn.Identity),
        (False, True, False, nn.LayerNorm),
        (False, False, False, nn.RMSNorm),
    ],
)
def test_generators_whose_loss_is_made_outside(text, vae, bias, norm):
    """The text loss cancels in the generator's part, in value and in gradients, whatever a head makes of zeros."""
    model = made(Unified, text, vae, bias, norm)
    g = torch.Generator().manual_seed(3)
    target = torch.randn(SAMPLES, 3, 8, 8, generator=g) if vae else torch.randn(SAMPLES, 4, 4, generator=g)
    whole = batch(target=target, t=torch.rand(SAMPLES, generator=g), noise=torch.randn(SAMPLES, 4, 4, generator=g))
    parts = find_parts(model, whole, 2)
    assert parts.anatomy.roles.layers == "trunk" and [x.name for x in parts.generators] == ["maker"]
    assert_same(parts, parts.microbatches(whole, 4))


class Losses(Seeing):
    """Returns its loss, and other things, in one of the usual forms; or none."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def text_loss(self, logits, labels):
        loss = super().text_loss(logits, labels)
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").mean(1)
        return {
            "dict": {"logits": logits, "loss": loss},
            "dict_of_another_name": {"logits": logits, "total": loss},
            "tuple": (loss, logits),
            "each": each,
            "logits": logits,
            "two": {"a": loss, "b": loss * 2},
            "integers": labels.sum(),
        }[self.form]


@pytest.mark.parametrize("form", ["dict", "dict_of_another_name", "tuple"])
def test_where_the_loss_stands(form):
    model, whole = made(Losses, form), batch()
    parts = find_parts(model, whole, 2)
    assert_same(parts, parts.microbatches(whole, 2))


@pytest.mark.parametrize("form", ["each", "logits", "two", "integers"])
def test_outputs_without_a_loss_are_refused(form):
    with pytest.raises(PartsError, match="the forward returned no loss but"):
        find_parts(made(Losses, form), batch(), 2)


class TwoRequired(Seeing):
    """Neither encoder's input may be left out of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.hear, self.ear = nn.Linear(5, WIDTH), nn.ModuleList(Layer() for _ in range(3))

    def forward(self, image, sound, tokens, labels):
        heard = self.hear(sound)
        for layer in self.ear:
            heard = layer(heard)
        x = torch.cat([self.features(image), heard, self.table(tokens)], 1)
        for layer in self.trunk:
            x = layer(x)
        return self.text_loss(self.head(self.norm(x)[:, -tokens.shape[1] :]), labels)


def test_inputs_that_no_call_can_leave_out():
    model, whole = made(TwoRequired), batch(sound=torch.randn(SAMPLES, 6, 5))
    parts = find_parts(model, whole, 2)
    assert sorted(parts.anatomy.roles.encoders) == ["ear", "tower"]
    assert_same(parts, parts.microbatches(whole, 4))


def test_inputs_that_the_example_did_not_show_are_refused():
    parts = find_parts(made(), batch(), 2)
    assert len(parts.microbatches(batch(mask=None), 4)) == 4
    with pytest.raises(PartsError, match="the batch has 'clip', which the example batch had not"):
        parts.microbatches(batch(clip=torch.randn(SAMPLES, 3, 8, 8)), 4)


class Places(Seeing):
    """A small frozen network on positions, before the trunk: code around the parts, and none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)

    def embedded(self, tokens):
        with torch.no_grad():
            places = self.places(torch.arange(tokens.shape[1], device=tokens.device)[:, None] / 10)
        return super().embedded(tokens) + places


def test_modules_that_are_given_no_input_are_no_projectors():
    model, whole = made(Places), batch()
    parts = find_parts(model, whole, 2)
    assert parts.anatomy.roles.projectors == ["projector"]
    assert_same(parts, parts.microbatches(whole, 4))
