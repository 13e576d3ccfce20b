"""`demo --multimodal`: a short run's outputs, its loss against one process, and what it says about mistakes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_cli import run_alone
from ultraep_compile import digits
from ultraep_compile.cli import main
from ultraep_compile.demo_page import chart
from ultraep_compile.errors import OptionError
from ultraep_compile.local_processes import run_local


def test_short_run(tmp_path: Path) -> None:
    done = run_alone("demo", "--multimodal", "--steps", "3", "--processes", "2", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    (difference,) = re.findall(r"differs from that of one process, .* by at most (\S+) \(relative\)", said)
    assert 0 <= float(difference) < 1e-5
    held, microbatches, planned = map(
        float, re.findall(r"than (\S+) of the (\d+) microbatches leave \((\S+) ", said)[0]
    )
    assert microbatches == 8 and held == pytest.approx(planned, rel=0.02) and held < 4
    assert re.search(r"reads \d+\.\d% of 360 held-out digits", said)

    report = (tmp_path / "out" / "report.html").read_text()
    assert "After 3 steps" in report and report.count("<polyline") == 3 and report.count("rank 1</td>") == 1
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", report)
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["name"].split(":")[0] for e in events if e["name"] == "process_name"} == {"measured", "predicted"}
    kinds = [[e["cat"] for e in events if e["ph"] == "X" and e["pid"] == pid] for pid in (0, 1)]
    assert sorted(kinds[0]) == sorted(kinds[1]) and kinds[0].count("LLM forward") == 16  # 8 microbatches, 2 stages


@pytest.mark.slow
def test_learns(tmp_path: Path) -> None:
    done = run_alone("demo", "--multimodal", "--out", "out", cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr
    (share,) = re.findall(r"reads (\d+\.\d)% of", " ".join(done.stdout.split()))
    assert float(share) > 90


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--processes", "5"], "--processes 5 does not fit"),
        (["--processes", "1"], "Use 2 to 4."),
        (["--device", "cuda"], "Leave --device and --inner out."),
        (["--out", "taken/x"], "taken/x cannot be written"),
    ],
)
def test_mistakes(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--multimodal", *arguments])
    assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn.datasets", "transformers"])
def test_missing_extra(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--multimodal", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "pip install 'ultraep-compile[demo]'" in capsys.readouterr().err


def test_batches_are_rows_of_images_with_answers() -> None:
    data = digits.Digits(torch.arange(4.0)[:, None, None, None].expand(-1, 3, 8, 8), torch.tensor([7, 3, 5, 0]))
    batch = digits.make_batch(data, torch.tensor([2, 0, 1]), [1, 2])
    assert batch["input_ids"].shape == (2, 36) and batch["labels"][batch["labels"] >= 0].tolist() == [5, 7, 3]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [18, 36]
    assert (batch["input_ids"] == digits.IMAGE).sum(1).tolist() == [16, 32]


class _Reader(nn.Module):
    """Answers with the pixels' value."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> _Reader:
        self.logits = torch.zeros(*input_ids.shape, digits.PAD)
        self.logits[:, digits.PATCHES] = nn.functional.one_hot(pixel_values[:, 0, 0, 0].long(), digits.PAD).float()
        return self


def test_accuracy_counts_the_answers_behind_the_question() -> None:
    truth = torch.arange(250) % 10
    seen = torch.where(torch.arange(250) < 50, (truth + 1) % 10, truth)
    pixels = seen.float()[:, None, None, None].expand(-1, 3, 8, 8)
    assert digits.accuracy(_Reader(), digits.Digits(pixels, truth)) == pytest.approx(0.8)


def test_held_out_digits_are_not_learned() -> None:
    learned, held_out = digits.load()
    assert len(learned.digits) == 1797 - 360 and len(held_out.digits) == len(held_out.pixels) == 360
    assert set(held_out.digits.tolist()) == set(range(10)) and -1 <= held_out.pixels.min() < held_out.pixels.max() <= 1
    both = torch.cat([learned.pixels, held_out.pixels])[:, 0].flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # no image is in both


def test_chart_starts_at_zero() -> None:
    drawn = chart("loss", {"a": [(0, 0.0), (10, 2.0)]}, top=2.0)
    assert 'points="46.0,168.0 512.0,24.0"' in drawn


def _acts(rank: int, send: object, how: str) -> int:
    if rank == 1 and how == "mistake":
        raise OptionError("give more")
    if rank == 1:
        os._exit(3)
    return torch.distributed.barrier() or rank


@pytest.mark.parametrize(
    ("how", "error", "told"), [("mistake", OptionError, "give more"), ("death", RuntimeError, "died")]
)
def test_a_failed_rank_ends_the_run(how: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        run_local(2, _acts, (how,), print)
