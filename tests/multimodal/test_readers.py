"""Weights that are used without gradients, in some modes or branches only, or through other references: whoever uses them has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.multimodal.seeing import WIDTH, WORDS, Seeing, batch, beside, made
from tests.multirank import run_ranks
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.absent import Absent, must_be_here, nothing_spoilt
from ultraep_compile.multimodal.reads import Reads


class Teacher(Seeing):
    """A frozen head on the embeddings, read without gradients behind the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(WIDTH, WORDS).requires_grad_(False)

    def loss(self, states, seen, image, tokens, labels):
        logits = self.head(states[:, -tokens.shape[1] :])
        with torch.no_grad():
            target = self.teacher(self.table(tokens)).softmax(-1)
        return self.text_loss(logits, labels) + F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


class Latents(Seeing):
    """A frozen autoencoder of images, in evaluation mode, makes the target."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH)).requires_grad_(False)

    def train(self, mode: bool = True) -> Latents:
        super().train(mode)
        self.vae.eval()
        return self

    def loss(self, states, seen, image, tokens, labels):
        with torch.no_grad():
            target = self.vae(image).flatten(2).transpose(1, 2)
        text = super().loss(states, seen, image, tokens, labels)
        return text + F.mse_loss(states[:, : target.shape[1]], target)


class Slow(Seeing):
    """An average of the head over steps, which the user updates, makes the target."""

    def __init__(self, buffers: bool = False) -> None:
        super().__init__()
        if buffers:
            self.register_buffer("slow", torch.randn(WORDS, WIDTH))
        else:
            self.slow = nn.Parameter(torch.randn(WORDS, WIDTH), requires_grad=False)

    def loss(self, states, seen, image, tokens, labels):
        last = states[:, -tokens.shape[1] :]
        with torch.no_grad():
            target = F.linear(last, self.slow).softmax(-1)
        logits = self.head(last)
        return self.text_loss(logits, labels) + F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))

    @torch.no_grad()
    def follow(self) -> None:
        if not self.head.weight.is_meta:
            self.slow.lerp_(self.head.weight, 0.1)


class Reward(Seeing):
    """A number that Python gets from frozen weights scales the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.reward = nn.Linear(WIDTH, 1).requires_grad_(False)

    def loss(self, states, seen, image, tokens, labels):
        with torch.no_grad():
            scale = 1 + float(self.reward.weight.norm()) + self.reward.bias.tolist()[0]
        return super().loss(states, seen, image, tokens, labels) * scale


class Codes(Seeing):
    """A frozen table is asked for the nearest entry, and that one's number is embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(7, WIDTH), requires_grad=False)
        self.entries = nn.Embedding(7, WIDTH)

    def embedded(self, tokens):
        x = self.table(tokens)
        with torch.no_grad():
            nearest = torch.cdist(x, self.codes[None]).argmin(-1)
        return x + self.entries(nearest)


class SeenAsTarget(Seeing):
    """Features that enter the trunk are also a target, detached."""

    def loss(self, states, seen, image, tokens, labels):
        text = super().loss(states, seen, image, tokens, labels)
        return text + F.mse_loss(states[:, : seen.shape[1]], seen.detach())


class OtherWay(Seeing):
    """The table is reached through a list that torch knows nothing of, and its `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.known = [self.table.weight]

    def loss(self, states, seen, image, tokens, labels):
        text = super().loss(states, seen, image, tokens, labels)
        return text + (states[:, -1] @ self.known[0].data.T).logsumexp(-1).mean()


class Only(Seeing):
    """Weights that only evaluation uses, or only a batch that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.extra = nn.Linear(WIDTH, WIDTH)

    def loss(self, states, seen, image, tokens, labels):
        if not self.training:
            states = states + self.shift
        return super().loss(states, seen, image, tokens, labels)

    def forward(self, image, tokens, labels, more=None):
        if more is None or not more.any():
            return super().forward(image, tokens, labels)
        seen = self.features(image)
        x = torch.cat([seen, self.embedded(tokens)], 1)
        for layer in self.trunk:
            x = layer(x)
        return self.loss(self.norm(x) + self.extra(more)[:, None], seen, image, tokens, labels)


def _more() -> dict[str, Any]:
    return batch(2, more=torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3)))


CASES: dict[str, Callable[[], tuple[float, str]]] = {
    "teacher": lambda: beside(made(Teacher), batch(), [batch(2)]),
    "latents": lambda: beside(made(Latents).train(), batch(), [batch(2)]),
    "slow": lambda: beside(
        made(Slow), batch(), [batch(n) for n in range(3)], lambda n, model: n and model.follow(), lr=0.3
    ),
    "slow buffer": lambda: beside(
        made(Slow, True), batch(), [batch(n) for n in range(3)], lambda n, model: n and model.follow(), lr=0.3
    ),
    "reward": lambda: beside(made(Reward), batch(), [batch(2)]),
    "codes": lambda: beside(made(Codes), batch(), [batch(2)]),
    "seen as target": lambda: beside(made(SeenAsTarget), batch(), [batch(2)]),
    "other way": lambda: beside(made(OtherWay), batch(), [batch(n) for n in range(2)], lr=0.3),
    "evaluation": lambda: beside(
        made(Only), batch(), [batch(n) for n in range(3)], lambda n, model: model.train(n != 1)
    ),
}


def _all(rank: int) -> dict[str, tuple[float, str]]:
    return {
        **{name: case() for name, case in CASES.items()},
        "another branch": beside(
            made(Only),
            batch(more=torch.zeros(8, WIDTH)),
            [batch(2, more=torch.zeros(8, WIDTH)), _more()],
            deadline=5.0,
        ),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[float, str]]]:
    return run_ranks(2, _all)


@pytest.mark.parametrize("name", CASES)
def test_weights_used_without_gradients(name: str, results: list[dict[str, tuple[float, str]]]) -> None:
    for row in results:
        worst, error = row[name]
        assert not error and worst < 1e-5, row[name]


def test_weights_that_are_not_here_are_no_zeros(results: list[dict[str, tuple[float, str]]]) -> None:
    errors = [row["another branch"] for row in results]
    assert all(worst < 1e-5 and error for worst, error in errors)
    assert any("extra." in error and "does not hold" in error for _, error in errors), errors


def test_what_reads_notes() -> None:
    w, b, unused = torch.randn(3, 3), torch.randn(3), torch.randn(3)
    both = torch.randn(2, 3)
    with torch.no_grad(), Reads({"w": w, "b": b, "unused": unused, "first": both[0], "second": both[1]}) as reads:
        y = torch.zeros(2, 3)
        y[0] = w.data.detach()[0] * 2
        z = torch.zeros_like(w) + both[1]
        b.add_(1)
    assert reads.behind([y]) == {"w"} and reads.behind((z,)) == {"second"} and reads.written == {"b"}
    with Reads({"w": w, "b": b}) as reads:
        w.numpy()
    assert reads.behind([]) == {"w"}


def _absent(*shape: int, dtype: torch.dtype = torch.float32) -> Absent:
    return Absent(shape, dtype, torch.device("cpu"), ["weight"])


def test_absent_values_have_shapes_only() -> None:
    x = F.embedding(torch.tensor([[1, 2, 3]]), _absent(5, 4))
    assert isinstance(x, Absent) and x.shape == (1, 3, 4) and x.sources == {"weight"}
    assert torch.equal(torch.zeros_like(x), torch.zeros(1, 3, 4)) and x[torch.tensor([[True, False, True]])].shape == (
        2,
        4,
    )
    mine = torch.ones(1, 5, 4)
    with nothing_spoilt() as spoilt:
        mine[:, :3] = x
        spoilt.must_not_show_in(mine[:, 3:])
        with pytest.raises(PartsError, match="weight"):
            spoilt.must_not_show_in(mine)
    looks: list[Callable[[], Any]] = [
        lambda: bool(x.any()),
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: mine[0, :3][x[0, :, 0] > 0],
        lambda: torch.zeros(3, dtype=torch.long).copy_(_absent(3)),
        lambda: must_be_here((mine, [x]), "returns"),
    ]
    for look in looks:
        with pytest.raises(PartsError, match="of weight, which this rank does not hold"):
            look()
