"""Every example runs as its own first lines say, and its own checks pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "five_lines.py": [],
    "decorator.py": [],
    "train_multimodal_torchrun.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "train_torchrun.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def test_none_is_forgotten() -> None:
    assert sorted(p.name for p in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    command = [sys.executable, *EXAMPLES[name], str(ROOT / "examples" / name)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("ok"), done.stdout
