"""Random changes of Python's state on compiled models and their eager twins: how many steps, and how many wrong answers.

    python -m benchmarks.random_changes [--steps 2000] [--life 40] [--seed 0] [--out FILE.json]

Lives of `tests/ladder/random_changes.py` in turn: after every change outputs, gradients and buffers are compared with eager. A
wrong answer or an error prints the model, the seed and what happened before. Prints a JSON record.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import platform
import time
import warnings
from pathlib import Path

import torch
from rich.progress import Progress

from tests.ladder.random_changes import MODELS, Life


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--life", type=int, default=40, help="steps of one model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started, wrong, kinds = time.monotonic(), [], collections.Counter()
    with Progress() as progress:
        bar = progress.add_task("steps", total=args.steps)
        for turn in itertools.count():
            model, seed = list(MODELS)[turn % len(MODELS)], args.seed + turn // len(MODELS)
            if (left := args.steps - sum(kinds.values())) <= 0:
                break
            torch._dynamo.reset()
            life = Life(model, seed)
            for _ in range(min(args.life, left)):
                try:
                    found = life.step()
                except Exception as error:  # of a run that is to go on: it counts as wrong
                    found = f"{type(error).__name__}: {error}"
                progress.advance(bar)
                if found:
                    wrong.append({"model": model, "seed": seed, "history": life.history, "found": found[:500]})
                    progress.console.print(f"{model}, seed {seed}: {found[:200]} after {' -> '.join(life.history[-6:])}")
                    break
            kinds.update(f"{model}: {name}" for name in life.history)
    record = {
        "benchmark": "random_changes",
        "device": platform.machine(),
        "torch": torch.__version__,
        "steps": sum(kinds.values()),
        "wrong": wrong,
        "changes": dict(sorted(kinds.items())),
        "seconds": time.monotonic() - started,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
