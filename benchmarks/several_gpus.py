"""All measurements on several GPUs, one after another, each under torchrun with one GPU a process.

    python -m benchmarks.several_gpus --out DIR [--gpus N] [--only wire tokens counts layer training pipeline]

Every part checks its results before it times them, writes DIR/PART.json and is stopped at its limit; what it printed is
in DIR/PART.log. The order is that of the first thing to break: wire, tokens, one layer, whole models. A part that fails
or runs out of time does not stop the others; the exit code says whether any did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Part:
    module: str
    seconds: int
    """Limit, several times what it takes on 2 H100."""
    arguments: tuple[str, ...] = ()


PARTS = {
    "wire": Part("data_plane", 90),
    "tokens": Part("data_plane_tokens", 90),
    "counts": Part("count_exchange", 60, ("--experts", "128")),
    "layer": Part("moe_layer", 240),
    "training": Part("training_steps", 600),
    "training_collective": Part("training_steps", 300, ("--transport", "collective", "--steps", "60")),
    "pipeline": Part("pipeline_steps", 180, ("--device", "cuda")),
}


def run_part(name: str, gpus: int, out: Path) -> tuple[str, float]:
    """Outcome in a word, and seconds."""
    part, started = PARTS[name], time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus), "-m"]
    command += [f"benchmarks.{part.module}", *part.arguments, "--json", str(out / f"{name}.json")]
    environment = {"OMP_NUM_THREADS": "4", **os.environ, "PYTHONUNBUFFERED": "1"}
    with (out / f"{name}.log").open("w") as log:
        print("$", " ".join(command[1:]), file=log, flush=True)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"stopped after {part.seconds} s", time.monotonic() - started
    return "ok" if code == 0 else f"failed ({code})", time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not 1 <= arguments.gpus <= torch.cuda.device_count():
        parser.error(f"--gpus {arguments.gpus}, but {torch.cuda.device_count()} are here")
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    summary = Table("part", "outcome", "seconds", "last line", title=f"{arguments.gpus} x {torch.cuda.get_device_name()}")
    outcomes = []
    for name in arguments.only:
        console.print(f"{name} ...")
        outcome, seconds = run_part(name, arguments.gpus, arguments.out)
        lines = (arguments.out / f"{name}.log").read_text().strip().splitlines()
        summary.add_row(name, outcome, f"{seconds:.0f}", lines[-1][:100])
        outcomes.append(outcome)
        console.print("\n".join(line[:160] for line in lines[-25:]), markup=False, highlight=False)
    console.print(summary)
    sys.exit(any(outcome != "ok" for outcome in outcomes))


if __name__ == "__main__":
    main()
