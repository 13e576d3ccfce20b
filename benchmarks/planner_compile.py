"""How long the planner's kernels compile, and how much code they are: ahead of time, for Hopper, without a GPU.

    python -m benchmarks.planner_compile [--out RESULTS.json]

Seconds of CPU time (Triton's compiler and ptxas) with an empty cache, instructions of the generated PTX: of `search`,
and of `prepare` and `finish` for the shares of all ranks. 2 slots a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import triton

from benchmarks.planner_gpu import MANY_EXPERTS, SHAPES
from tests.codegen.ahead_of_time import compiled
from ultraep_compile.codegen import search_kernel, share_kernels
from ultraep_compile.codegen.hottest_kernels import in_registers

SLOTS, HOPPER = 2, 90


def measured(kernel: Any, warps: int, **constants: Any) -> tuple[float, int]:
    """Seconds and instructions."""
    before = os.times()
    asm = compiled(kernel, HOPPER, warps, **constants, PDL=True)
    return sum(os.times()[:4]) - sum(before[:4]), asm["ptx"].count(";\n")


def power(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def shape(ranks: int, experts: int) -> dict[str, Any]:
    """All three kernels of one shape, as `planning_stages` launches them."""
    masters = experts // ranks
    lanes, rows = max(32, power(ranks)), power(masters)
    in_memory = not in_registers(masters, lanes)
    sizes = {"D": ranks, "M": masters, "M_BITS": rows.bit_length() - 1}
    lane_bits, tables = {"G_BITS": lanes.bit_length() - 1}, {"S": SLOTS, "ALL_C": search_kernel.CANDIDATES}
    block = rows if in_memory else 4
    warps = min(max(power(ranks) * block // 1024, 1), 8)
    whole = {"DOMAINS": 1, "RP": power(ranks), "BLOCK": block, "ALL": True, "KEYS": in_memory}
    parts = {"BLOCK": 8, "PER_DOMAIN": triton.cdiv(ranks * (masters + SLOTS), 8), "XP": power(ranks * SLOTS), "ALL": True}
    search_s, instructions = measured(
        search_kernel.search, 1, **sizes, **tables, **lane_bits, SP=power(SLOTS), EVEN=True, TIMED=False
    )
    prepare_s, _ = measured(share_kernels.prepare, warps, **sizes, **lane_bits, **whole)
    finish_s, _ = measured(share_kernels.finish, 4, **sizes, **tables, **parts)
    seconds = {"search": search_s, "prepare": prepare_s, "finish": finish_s}
    return {"in_registers": not in_memory, "seconds": seconds, "instructions": instructions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        shape(4, 4)  # what the first call brings with it
        for ranks, experts in SHAPES + MANY_EXPERTS:
            found[f"{ranks} x {experts}"] = made = shape(ranks, experts)
            seconds = ", ".join(f"{name} {s:.1f} s" for name, s in made["seconds"].items())
            place = "registers" if made["in_registers"] else "memory"
            print(f"{ranks:3} x {experts:4}, experts in {place}: {seconds}, {made['instructions']} instructions", flush=True)
    record = {
        "command": "python -m benchmarks.planner_compile",
        "device": f"CPU, for sm_{HOPPER}",
        "versions": {"python": platform.python_version(), "triton": triton.__version__},
        "shapes": found,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
