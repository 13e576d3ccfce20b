"""The recipes in docs/multimodal.md do what they say: each block over two processes, every step beside one process."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.multimodal import test_readers
from tests.multimodal.seeing import batch as seen
from tests.multimodal.seeing import difference, made
from tests.multimodal.test_families import build
from tests.multirank import run_ranks
from ultraep_compile.executor.pipeline import Pipeline, StepResult
from ultraep_compile.multimodal.skeleton import loss_of

PAGE = Path(__file__).parents[2] / "docs" / "multimodal.md"


def blocks() -> dict[str, str]:
    """The Python under each heading of the recipes."""
    (page,) = re.findall(r"\n## Recipes\n(.*?)\n## ", PAGE.read_text(), re.DOTALL)
    return dict(re.findall(r"### ([^\n]+)\n```python\n(.*?)```", page, re.DOTALL))


def _qwen() -> dict[str, Any]:
    model, batch = build("qwen2_5_vl")
    return {"model": model, "batch": batch, "prompt": batch["labels"] == -100}


def _lora() -> dict[str, Any]:
    return {**_llava(), "peft": pytest.importorskip("peft")}


def _llava() -> dict[str, Any]:
    model, batch = build("llava")
    return {"model": model, "batch": batch}


def _latents() -> dict[str, Any]:
    model = made(test_readers.Latents).train()
    return {"model": model, "batch": seen(2)}


def _omni() -> dict[str, Any]:
    model, batch = build("qwen2_5_omni")
    (audio,) = (m for n, m in model.named_modules() if n.rpartition(".")[2] == "audio_tower")
    return {"model": model, "batch": batch, "audio": audio}


def _accumulated() -> dict[str, Any]:
    model, batch = build("llava")
    other = copy.deepcopy(batch)
    other["labels"][:, :12] = -100
    return {"model": model, "batches": [batch, other]}


GIVEN: dict[
    str, tuple[Callable[[], dict[str, Any]], int]
] = {  # what a block stands on, and how often it is to be compared
    "LLaVA, stages 1 and 2": (_llava, 2),
    "Qwen-VL fine-tuning": (_qwen, 1),
    "LoRA": (_lora, 2),
    "Generation with a frozen autoencoder": (_latents, 1),
    "Two encoders": (_omni, 1),
    "Evaluation": (_llava, 2),
    "Sums over accumulated batches": (_accumulated, 2),
}


class Beside:
    """`ultraep_compile` for a block: its pipelines compare every step with one process that has the same weights."""

    clip_grad_norm_ = staticmethod(ultraep_compile.clip_grad_norm_)

    def __init__(self) -> None:
        self.errors: list[float] = []

    def pipeline(self, model: nn.Module, *args: Any, **more: Any) -> Any:
        single = copy.deepcopy(model)
        pipe = ultraep_compile.pipeline(model, *args, deadline=60.0, **more)
        step, evaluate = pipe.step, pipe.evaluate

        def stepped(batch: Mapping[str, Any]) -> StepResult:
            self._follow(pipe, model, single)
            result = step(batch)
            self.errors.append(difference(pipe, single, float(result), batch))
            return result

        def evaluated(batch: Mapping[str, Any]) -> StepResult:
            self._follow(pipe, model, single)
            before = [None if p.grad is None else p.grad.clone() for p in pipe.parameters()]
            result = evaluate(batch)
            with torch.no_grad():
                loss = float(loss_of(single(**batch)))
            self.errors.append(abs(float(result) - loss) / abs(loss))
            for was, p in zip(before, pipe.parameters(), strict=True):
                assert was is p.grad or (was is not None and p.grad is not None and torch.equal(was, p.grad))
            return result

        vars(pipe).update(step=stepped, evaluate=evaluated)
        return pipe

    def _follow(self, pipe: Pipeline, model: nn.Module, single: nn.Module) -> None:
        """Weights of all ranks, what is frozen, modes, and whether gradients were let go."""
        states: list[Any] = [None] * pipe.ranks
        dist.all_gather_object(states, pipe.state_dict())
        for state in states:
            single.load_state_dict(state, strict=False)
        ours = dict(model.named_parameters(remove_duplicate=False))
        for name, p in single.named_parameters(remove_duplicate=False):
            p.requires_grad_(ours[name].requires_grad)
        for a, b in zip(model.modules(), single.modules(), strict=True):
            b.training = a.training
        if all(p.grad is None for p in pipe.parameters()):
            single.zero_grad()


def _run(rank: int, names: list[str]) -> dict[str, list[float]]:
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)), {}
    for name in names:
        beside = Beside()
        exec(blocks()[name], {"torch": torch, "ultraep_compile": beside, "mesh": mesh, **GIVEN[name][0]()})
        found[name] = beside.errors
    return found


def _compare(names: list[str]) -> None:
    for found in run_ranks(2, _run, names):
        for name in names:
            assert len(found[name]) == GIVEN[name][1] and max(found[name]) < 1e-5, (name, found[name])


QUICK = ["LLaVA, stages 1 and 2", "Generation with a frozen autoencoder", "Evaluation", "Sums over accumulated batches"]


def test_every_recipe_is_run():
    assert blocks().keys() == GIVEN.keys()
    for name in blocks():
        assert f"(#{name.lower().replace(',', '').replace(' ', '-')})" in PAGE.read_text()


def test_recipes():
    _compare(QUICK)


@pytest.mark.slow
def test_other_recipes():
    pytest.importorskip("peft")
    _compare([name for name in GIVEN if name not in QUICK])
