"""What ranks of one pipeline must have alike, and what users change between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.executor import toys
from tests.executor.test_values import worst_difference
from tests.multirank import run_ranks
from ultraep_compile.errors import PipelineError
from ultraep_compile.executor.agreement import batch_facts
from ultraep_compile.executor.pipeline import Pipeline
from ultraep_compile.executor.settings import Settings
from ultraep_compile.ops.alike import ordered_digest

DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.complex64)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 3, 1024, 600_000]),
    kind=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_a_digest_sees_a_value_and_its_place(rows: int, columns: int, kind: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, (rows, columns), generator=g)
    values = values.to(kind)
    assert int(ordered_digest(values)) == int(ordered_digest(values.clone().T.contiguous().T))
    at, other = (int(x) for x in torch.randint(0, values.numel(), (2,), generator=g))
    changed = values.clone()
    flat = changed.view(-1)
    flat[at] = 1 - int(values.view(-1)[at].real)
    assert int(ordered_digest(changed)) != int(ordered_digest(values))
    swapped = values.clone()
    swapped.view(-1)[at], swapped.view(-1)[other] = values.view(-1)[other].clone(), values.view(-1)[at].clone()
    assert (int(ordered_digest(swapped)) == int(ordered_digest(values))) == torch.equal(swapped, values)


def test_facts_name_what_differs() -> None:
    one = {"ids": torch.arange(4), "more": [{"flag": True}, None], "text": "a"}
    other = {"ids": torch.arange(4).int(), "more": [{"flag": False}, None], "text": "a"}
    first, second = batch_facts(one), batch_facts(other)
    assert {k for k in first if first[k] != second[k]} == {"ids", "more[0].flag"}
    assert batch_facts({"ids": torch.arange(4)}) == {"ids": first["ids"]}


def _towers(parts: toys.Parts) -> nn.Module:
    return parts.encoders[0].module


def _trained(model: toys.Parts, wanted: dict[str, bool]) -> None:
    """Freeze or unfreeze the tower, the first stage's layer, the (tied) embedding."""
    places = {
        "tower": _towers(model),
        "layer": model.stages[0].module.layer,
        "embedding": model.stages[0].module.embedding,
    }
    for name, on in wanted.items():
        places[name].requires_grad_(on)


STAGES: dict[str, list[dict[str, bool]]] = {
    "tower unfrozen": [{"tower": False}, {"tower": True}],
    "tower frozen": [{}, {"tower": False}, {"tower": True}],
    "layer": [{"layer": False}, {"layer": True}, {"layer": False}],
    "tied embedding unfrozen": [{"embedding": False}, {"embedding": True}],
    "tied embedding frozen": [{}, {"embedding": False}],
    "all but the head": [{"tower": False, "layer": False, "embedding": False}, {"tower": True, "layer": True}],
}


def _in_stages(rank: int) -> dict[str, list[float]]:
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, changes in STAGES.items():
        model = toys.parts(2)
        pipe = single = None
        found[name] = []
        for n, change in enumerate(changes):
            _trained(model, change)
            if pipe is None:
                pipe = Pipeline(None, model, mesh, Settings(4, deadline=60.0))
            pipe.zero_grad()
            single = toys.copied(model)
            found[name].append(worst_difference(pipe, single, toys.microbatches(4, n), steps=1))
    return found


def test_training_in_stages_equals_one_process() -> None:
    for row in run_ranks(2, _in_stages):
        assert all(x < 1e-5 for several in row.values() for x in several), row


def _changed(rank: int) -> dict[str, str]:
    """Per case the error of a second step, before which something has changed on rank 1 or everywhere."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    first, other = toys.microbatches(4, 1), toys.microbatches(4, 2)

    def new_parameter(model: toys.Parts) -> None:
        _towers(model).adapter = nn.Linear(2, 2)

    def tie(model: toys.Parts) -> None:
        model.stages[1].module.layer[2].weight = nn.Parameter(model.stages[1].module.layer[2].weight.detach().clone())
        model.stages[1].module.norm.bias = model.stages[1].module.norm.weight

    def replace(model: toys.Parts) -> None:
        layer = model.stages[1].module.layer
        layer[2].weight = nn.Parameter(layer[2].weight.detach().clone())

    def here(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda model: change(model) if rank else None

    changes: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "nothing": (lambda model: None, first),
        "replaced": (replace, first),
        "other batch": (lambda model: None, other if rank else first),
        "other order": (lambda model: None, [first[1], first[0], *first[2:]] if rank else first),
        "frozen on one rank": (here(lambda model: _towers(model).requires_grad_(False)), first),
        "tied frozen on one rank": (here(lambda model: _trained(model, {"embedding": False})), first),
        "eval on one rank": (here(lambda model: _towers(model).eval()), first),
        "adapter": (new_parameter, first),
        "tie": (tie, first),
    }
    for name, (change, batch) in changes.items():
        model = toys.parts(2)
        pipe = Pipeline(None, model, mesh, Settings(4, deadline=30.0))
        pipe.step({"microbatches": first})
        change(model)
        try:
            pipe.step({"microbatches": batch})
            found[name] = ""
        except PipelineError as error:
            found[name] = str(error)
    pipe = Pipeline(None, toys.parts(2), mesh, Settings(4, deadline=30.0, compare_batches=False))
    changed = [toys.Microbatch({**m.inputs, "labels": m.inputs["labels"].flip(0)}, m.items, m.weight) for m in first]
    pipe.step({"microbatches": changed if rank else first})
    return found


SAID = {
    "nothing": "",
    "replaced": "",
    "other batch": "ids",
    "other order": "microbatches[0]",
    "frozen on one rank": "whether encoders.image.tower.0.weight is frozen",
    "tied frozen on one rank": "is frozen on ranks [1]",
    "eval on one rank": "modes (train or eval) on ranks [1]",
    "adapter": "adapter.weight, encoders.image.adapter.bias came",
    "tie": "norm.bias were tied or untied",
}


@pytest.fixture(scope="module")
def errors() -> list[dict[str, str]]:
    return run_ranks(2, _changed)


@pytest.mark.parametrize("name", SAID)
def test_changes_between_steps(name: str, errors: list[dict[str, str]]) -> None:
    for row in errors:
        assert SAID[name] in row[name] and bool(SAID[name]) == bool(row[name]), row[name]
