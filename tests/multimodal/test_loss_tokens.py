"""The rule that counts loss tokens: found, or refused where a batch tells apart what the example did not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.multimodal.seeing import LENGTH, SAMPLES, WORDS, Seeing, batch, beside, made
from tests.multirank import run_ranks
from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.division import even
from ultraep_compile.multimodal.loss_tokens import learn_loss_tokens, weigh

TABLE = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(7))
Inputs = Mapping[str, Any]


def _each(b: Inputs, shift: int, ignored: int = -100, labels: str = "labels") -> tuple[Tensor, Tensor]:
    """(loss, 0 where ignored; is it counted) of every place, [samples, places]."""
    logits, wanted = TABLE[b["tokens"]], b[labels]
    if shift:
        logits, wanted = logits[:, :-1], wanted[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=ignored, reduction="none")
    return each, wanted != ignored


def _mean(shift: int, ignored: int = -100) -> Callable[[Inputs], Tensor]:
    def loss(b: Inputs) -> Tensor:
        each, counted = _each(b, shift, ignored)
        return each.sum() / counted.sum()

    return loss


def _masked(labels: str, mask: str) -> Callable[[Inputs], Tensor]:
    def loss(b: Inputs) -> Tensor:
        each, counted = _each(b, 1, labels=labels)
        counted = counted * b[mask][:, 1:]
        return (each * counted).sum() / counted.sum()

    return loss


def _by_sample(b: Inputs) -> Tensor:
    each, counted = _each(b, 1)
    have = counted.any(1)
    return ((each.sum(1) / counted.sum(1).clamp(min=1)) * have).sum() / have.sum()


LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "shifted": _mean(1),
    "not shifted": _mean(0),
    "minus one": _mean(1, -1),
    "padding": _mean(1, 0),
    "masked": _masked("labels", "attention_mask"),
    "tokens by a mask": _masked("tokens", "loss_mask"),
    "all places": lambda b: _each(b, 1)[0].mean(),
    "by sample": _by_sample,
    "sum": lambda b: _each(b, 1)[0].sum(),
    "items": lambda b: _each(b, 1)[0].sum() / b["num_items_in_batch"],
    "classes": lambda b: F.cross_entropy(TABLE[b["tokens"][:, 0]], b["classes"]),
}
IGNORED = {"minus one": -1, "padding": 0}


@st.composite
def _batches(draw: st.DrawFn, name: str, ragged: bool) -> dict[str, Tensor]:
    """Labels behind prompts, equally many in every sample or ragged, possibly none in some; masks with padding."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    samples, length = draw(st.sampled_from([2, 4, 7])), draw(st.sampled_from([6, 10]))
    tokens = torch.randint(1, WORDS, (samples, length), generator=g)
    ignored, labels = IGNORED.get(name, -100), tokens.clone()
    prompt = draw(st.sampled_from([0, 0, 2, length // 2]))
    counts = [draw(st.integers(0, length - prompt)) if ragged else length - prompt for _ in range(samples)]
    if not any(c > 1 for c in counts):
        counts[0] = length - prompt
    mask, loss_mask = torch.ones_like(tokens), torch.zeros(samples, length)
    for s, count in enumerate(counts):
        labels[s, :prompt] = ignored
        labels[s, prompt + count :] = ignored
        mask[s, max(prompt + count, 2) :] = 0
        loss_mask[s, prompt : prompt + count] = 1
    made = {"tokens": tokens, "labels": labels, "attention_mask": mask, "loss_mask": loss_mask}
    made["classes"] = torch.randint(0, WORDS, (samples,), generator=g)
    made["num_items_in_batch"] = torch.tensor(17.0)
    return made


def _part(b: Inputs, r: range) -> dict[str, Any]:
    return {k: v[r.start : r.stop] if v.dim() else v for k, v in b.items()}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_shares_are_those_of_the_loss_or_refused(name: str, data: st.DataObject) -> None:
    loss = LOSSES[name]
    example = data.draw(_batches(name, data.draw(st.booleans())))
    learnt = learn_loss_tokens(
        lambda b: float(loss(b)), lambda b: [_part(b, r) for r in even(len(b["tokens"]), 2)], example, "tokens", set()
    )
    later = data.draw(_batches(name, True))
    chunks = even(len(later["tokens"]), 2)
    parts = [_part(later, c) for c in chunks]
    try:
        weights = weigh(learnt, later, chunks, parts)
    except PartsError as error:
        assert "loss_tokens=" in str(error)
        return
    told = sum(w * float(loss(p)) for w, p in zip(weights, parts, strict=True) if w)
    assert abs(told - float(loss(later))) <= 1e-4 * abs(float(loss(later))), (learnt, weights)


def test_what_is_found_where_it_can_be() -> None:
    """Equal counts behind prompts tell the rules apart, since labels are put elsewhere, too."""
    source = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, WORDS, (4, 8), generator=source)
    labels = tokens.clone()
    labels[:, :5] = -100
    for name, expected in (("shifted", "labels != -100[:, 1:]"), ("not shifted", "labels != -100")):
        learnt = learn_loss_tokens(
            lambda b, name=name: float(LOSSES[name](b)),
            lambda b: [_part(b, r) for r in even(4, 2)],
            {"tokens": tokens, "labels": labels},
            "tokens",
            set(),
        )
        assert str(learnt.rule) == expected and not learnt.rivals


class Weighted(Seeing):
    """Classes have weights: the mean is over them, which no count of labels is."""

    def text_loss(self, logits, labels):
        weight = torch.linspace(0.2, 3, WORDS)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight)


def _weights(inputs: Inputs) -> Tensor:
    labels = inputs["labels"][:, 1:]
    return torch.linspace(0.2, 3, WORDS)[labels.clamp(min=0)] * (labels != -100)


class ByMask(Seeing):
    def forward(self, image, tokens, labels, loss_mask):
        self.mask = loss_mask
        return super().forward(image, tokens, labels)

    def text_loss(self, logits, labels):
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (each * self.mask).sum() / self.mask.sum()


def _answers(counts: list[int], first: int, seed: int = 1) -> dict[str, Any]:
    made = batch(seed)
    for sample, count in enumerate(counts):
        made["labels"][sample, :first] = -100
        made["labels"][sample, first + count :] = -100
    return made


def _masked_batch(seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(SAMPLES, LENGTH, generator=g) < 0.4).float()
    mask[2:4] = 0
    return batch(seed, loss_mask=mask)


EQUAL, RAGGED, NONE = [4] * SAMPLES, [1, 1, 4, 4, 3, 2, 4, 3], [4, 4, 0, 0, 4, 4, 1, 2]
CASES: dict[str, Callable[[], tuple[float, str]]] = {
    "ragged later": lambda: beside(made(), _answers(EQUAL, 4), [_answers(RAGGED, 4, 2), _answers(NONE, 4, 3)]),
    "ragged example": lambda: beside(made(), _answers(NONE, 4), [_answers(EQUAL, 4, 2)]),
    "split backwards": lambda: beside(made(), _answers(EQUAL, 4), [_answers(NONE, 4, 3)], base="zero-bubble"),
    "given": lambda: beside(made(Weighted), batch(), [_answers(RAGGED, 4, 2)], loss_tokens=_weights),
    "given mask": lambda: beside(made(ByMask), _masked_batch(1), [_masked_batch(2)], loss_tokens="loss_mask"),
    "found mask": lambda: beside(made(ByMask), _masked_batch(1), [_masked_batch(2)]),
}


def _all(rank: int) -> dict[str, tuple[float, str]]:
    found = {name: case() for name, case in CASES.items()}
    found["refused"] = beside(made(Weighted), batch(), [batch()])
    found["no count"] = beside(made(), batch(), [batch()], loss_tokens=lambda inputs: "many")
    found["no entry"] = beside(made(), batch(), [batch()], loss_tokens="mask")
    found["no label"] = beside(made(), batch(), [_answers([0] * SAMPLES, 4)])
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[float, str]]]:
    return run_ranks(2, _all)


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_one_process(name: str, results: list[dict[str, tuple[float, str]]]) -> None:
    for row in results:
        worst, error = row[name]
        assert not error and worst < 1e-5, row[name]


def test_what_no_rule_counts_is_refused(results: list[dict[str, tuple[float, str]]]) -> None:
    for row in results:
        assert "loss_tokens=" in row["refused"][1] and "gave 'many'" in row["no count"][1]
        assert "'mask' names no tensor" in row["no entry"][1]


def test_a_batch_without_labels_has_the_loss_that_the_model_gives_it(
    results: list[dict[str, tuple[float, str]]],
) -> None:
    for row in results:
        worst, error = row["no label"]
        assert not error and math.isnan(worst), "as in one process"
