"""Mistakes of users: an error of ours that names what was given and what to do, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.executor import toys, vlm
from tests.multirank import run_ranks
from ultraep_compile.errors import OptionError, PartsError, PipelineError, ScheduleError, UltraEPError
from ultraep_compile.schedules import plan, uniform_problem


def _text_only() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def _mistakes(rank: int) -> dict[str, tuple[str, str]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    unnamed = init_device_mesh("cpu", (2, 1))
    model, batch = vlm.llava(2), vlm.batch(4, 0)
    pipe = ultraep_compile.pipeline(model, mesh, 2, batch)
    toy = ultraep_compile.pipeline(toys.parts(2), mesh, 4)
    text = {k: v for k, v in vlm.batch(4, 0, images=(False,) * 4).items() if k != "pixel_values"}
    blind = {k: v for k, v in batch.items() if k != "pixel_values"}
    foreign = plan(uniform_problem(3, 6, encoder=(1.0, 2.0)))
    short = plan(uniform_problem(2, 6, encoder=(1.0, 2.0)))
    calls: dict[str, Callable[[], Any]] = {
        "layers": lambda: ultraep_compile.pipeline(vlm.llava(2), mesh, 2, batch, virtual=2),
        "text": lambda: ultraep_compile.pipeline(_text_only(), mesh, 2, text),
        "mesh": lambda: ultraep_compile.pipeline(vlm.llava(2), mesh, 2, batch, pipeline_dim="stages"),
        "unnamed": lambda: ultraep_compile.pipeline(vlm.llava(2), unnamed, 2, batch),
        "stages": lambda: ultraep_compile.pipeline(toys.parts(3), mesh, 2),
        "example": lambda: ultraep_compile.pipeline(vlm.llava(2), mesh, 2),
        "method": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 2, method="nestd"),
        "setting": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 2, dedline=3),
        "count": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 0),
        "disttrain": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 2, method="disttrain"),
        "split": lambda: pipe.step(vlm.batch(1, 0)),
        "blind": lambda: pipe.step(blind),
        "foreign": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 6, schedule=foreign).step(
            {"microbatches": toys.microbatches(6, 0)}
        ),
        "short": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 4, schedule=short).step(
            {"microbatches": toys.microbatches(4, 0)}
        ),
        "few": lambda: ultraep_compile.pipeline(toys.parts(2), mesh, 1).step({"microbatches": toys.microbatches(1, 0)}),
        "unequal": lambda: toy.step({"microbatches": toys.microbatches(4, rank)}),
        "untraced": lambda: toy.write_trace("trace.json"),
        "state": lambda: toy.load_state_dict({}),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ("none", "")
        except UltraEPError as error:
            found[name] = (type(error).__name__, str(error))
    return found


EXPECTED: dict[str, tuple[type[UltraEPError], str]] = {
    "layers": (PartsError, "layers"),
    "text": (PartsError, ""),
    "mesh": (OptionError, "none of them 'stages'"),
    "unnamed": (OptionError, "mesh_dim_names"),
    "stages": (OptionError, "3 stages, the mesh 2 ranks"),
    "example": (OptionError, "inputs=batch"),
    "method": (OptionError, "Did you mean 'nested'?"),
    "setting": (OptionError, "Did you mean 'deadline'?"),
    "count": (OptionError, "'microbatches' is 0"),
    "disttrain": (OptionError, "planned, not run"),
    "split": (PartsError, "cannot split a batch of 1 samples into 2 microbatches"),
    "blind": (PartsError, "pixel_values"),
    "foreign": (ScheduleError, "ranks 3; this pipeline has 2"),
    "short": (ScheduleError, "microbatches 6; this pipeline has 4"),
    "few": (ScheduleError, "do not fill one group"),
    "unequal": (PipelineError, "Give every rank the same batch"),
    "untraced": (PipelineError, "trace=True"),
    "state": (PipelineError, "lacks"),
}


@pytest.fixture(scope="module")
def messages() -> list[dict[str, tuple[str, str]]]:
    return run_ranks(2, _mistakes)


@pytest.mark.parametrize("name", EXPECTED)
def test_mistake(name: str, messages: list[dict[str, tuple[str, str]]]) -> None:
    kind, part = EXPECTED[name]
    for row in messages:
        assert row[name][0] == kind.__name__, row[name]
        assert part in row[name][1], row[name]
