"""Stages and schedule of a model without running a pipeline; the measured step beside the predicted one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from torch.distributed.device_mesh import init_device_mesh

import ultraep_compile
from tests.executor import toys, vlm
from tests.multirank import run_ranks
from ultraep_compile.cli.dump import _write_pipeline
from ultraep_compile.errors import PartsError
from ultraep_compile.schedules import parse_schedule, validate


def test_dump_writes_stages_and_schedule(tmp_path: Path) -> None:
    _write_pipeline(vlm.llava(4), vlm.batch(6, 0), 2, 6, tmp_path)
    text = (tmp_path / "pipeline.txt").read_text()
    assert "stage 0 on rank 0: layers 0 to 1" in text and "encoder model.vision_tower on every rank" in text
    schedule = parse_schedule((tmp_path / "pipeline_schedule.txt").read_text())
    validate(schedule)
    assert len(schedule.ranks) == 2 and schedule.problem.microbatches == 6
    assert json.loads((tmp_path / "pipeline_trace.json").read_text())["traceEvents"]
    with pytest.raises(PartsError, match="cannot split a batch of 6 samples"):
        _write_pipeline(vlm.llava(4), vlm.batch(6, 0), 2, 7, tmp_path)


def _traced(rank: int, folder: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    pipe = ultraep_compile.pipeline(toys.parts(2), mesh, 5, trace=True, costs="measured", deadline=60.0)
    before = pipe.rates
    for turn in range(4):
        pipe.step({"microbatches": toys.microbatches(5, turn)})
        assert (pipe.rates == before) == (turn < 1), "rates change once, after the second step"
    timeline, predicted = pipe.timeline, pipe.predicted
    assert timeline is not None and predicted is not None and pipe.schedule is not None
    assert timeline.schedule.ranks == predicted.schedule.ranks == pipe.schedule.ranks
    assert all(a <= b for row in timeline.start for a, b in pairwise(row))
    pipe.write_trace(Path(folder) / "trace.json")
    return pipe.explain()


def test_one_file_holds_the_measured_and_the_predicted_step(tmp_path: Path) -> None:
    told = run_ranks(2, _traced, str(tmp_path))
    assert "last step" in told[0] and "rates seconds" in told[1] and "tied on ranks (0, 1)" in told[0]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"measured: nested", "predicted: nested"}
    runs = [e for e in events if e["ph"] == "X"]
    ours = [e["name"] for e in runs if e["pid"] == 0]
    assert ours == [e["name"] for e in runs if e["pid"] == 1] and "0F0" in ours
