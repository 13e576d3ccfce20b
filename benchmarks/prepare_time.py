"""CPU time that `prepare` takes to lift the experts of models of growing depth.

    python -m benchmarks.prepare_time [FAMILY ...] [--layers 2 8 32] [--repetitions 3] [--out FILE.json]

Families are those of tests/zoo_moe.py whose experts no compiler sees; every layer must be lifted before a time counts. The first
layer of a kind is recorded and written anew, the others are checked against their own forward each: the time of one more layer is
that of its check. Waiting for a busy machine does not count. What the first call in a process imports is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

from tests import zoo_moe
from ultraep_compile.preparation import as_call, prepare_call

FAMILIES = ("aria_text", "llama4", "longcat_flash", "nllb_moe")


def prepare_seconds(family: str, layers: int) -> tuple[float, int]:
    """CPU seconds of one `prepare`, and the number of places that were lifted."""
    model, inputs = zoo_moe.build(family, "eager", layers=layers)
    args, kwargs = as_call(inputs)
    started = time.process_time()
    found = prepare_call(model, *args, **kwargs)
    seconds = time.process_time() - started
    assert [f.rung for f in found] == ["lifted"] * len(found) and len(found) >= layers // 2, found
    return seconds, len(found)


def measure(family: str, depths: list[int], repetitions: int) -> dict:
    prepare_seconds(family, depths[0])
    rows = []
    for layers in depths:
        runs = [prepare_seconds(family, layers) for _ in range(repetitions)]
        seconds = [s for s, _ in runs]
        rows.append(
            {"layers": layers, "sites": runs[0][1], "median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
        )
    more = [
        1e3 * (b["median_s"] - a["median_s"]) / (b["sites"] - a["sites"]) for a, b in itertools.pairwise(rows)
    ]
    return {"family": family, "results": rows, "ms_per_further_site": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    record = {
        "command": "python -m benchmarks.prepare_time",
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repetitions": arguments.repetitions,
        "families": [measure(f, arguments.layers, arguments.repetitions) for f in arguments.families],
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
