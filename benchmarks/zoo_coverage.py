"""What `explain` finds in models of many kinds: MoE families, layers written by hand, multimodal and dense models.

    python -m benchmarks.zoo_coverage [NAME ...] [--out FILE.md]

One line for each model: layers rewritten, unbalanceable and missed, the expert parameters inside rewritten graphs, seconds for
`explain` (preparation, tracing and proof), and the first reason given for what is not rewritten. With names, the lines of other
models stay in the file as they are.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import forms, forms_public, zoo, zoo_moe, zoo_wide
from ultraep_compile import explain


def everything() -> dict[str, tuple[str, ...]]:
    return {
        "MoE families": zoo.FAMILIES + zoo.OTHERS + zoo_wide.LOOPS,
        "more MoE families": tuple(zoo_moe.FAMILIES),
        "written by hand, traced": tuple(n for n in zoo.HANDWRITTEN if n != "GroupedUnsorted"),
        "written by hand, lifted": tuple(forms.LIFTED),
        "public forms, lifted": tuple(forms_public.LIFTED),
        "public forms, missed": tuple(forms_public.MISSED),
        "nothing to balance": (*forms.UNBALANCEABLE, *forms_public.UNBALANCEABLE),
        "multimodal": zoo_wide.MULTIMODAL,
        "no experts": (*zoo.NEGATIVES, *forms.NEGATIVES, *forms_public.NEGATIVES),
    }


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    known = forms.LIFTED | forms.UNBALANCEABLE | forms.NEGATIVES
    if name in zoo_moe.FAMILIES:
        return zoo_moe.build(name, "eager")  # the loop, which `prepare` replaces
    if name in forms_public.ALL:
        return forms_public.build(name)
    return forms.build(name) if name in known else zoo_wide.build(name)


def coverage(name: str) -> dict[str, Any]:
    """The line of one model."""
    model, inputs = build(name)
    started = time.perf_counter()
    found = explain(model, inputs)
    seconds = time.perf_counter() - started
    counts = Counter(s.status for s in found.moe_sites)
    return {
        "model": name,
        "rewritten": counts["rewritten"],
        "unbalanceable": counts["unbalanceable"],
        "missed": counts["missed"],
        "rungs": ", ".join(sorted({s.rung for s in found.moe_sites})),
        "gating": ", ".join(sorted({s.gating for s in found.moe_sites if s.gating})),
        "parameters": f"{found.rewritten_parameters:,} of {found.expert_parameters:,}",
        "seconds": round(seconds, 1),
        "reason": next((s.reason for s in found.moe_sites if s.status != "rewritten"), ""),
    }


def _lines_of(record: Path) -> dict[str, str]:
    """Model -> its line."""
    lines = record.read_text().splitlines() if record.exists() else []
    return {line.split("|")[2].strip(): line for line in lines if line.startswith("|")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)  # one form exchanges rows by itself
    lines: list[str] = [
        f"torch {torch.__version__}, {platform.machine()}, 1 thread; `python -m benchmarks.zoo_coverage`", "",
        "| kind | model | rewritten | unbalanceable | missed | rungs | gating | expert parameters rewritten | s | reason |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    earlier = _lines_of(arguments.out) if arguments.names and arguments.out else {}
    for kind, names in everything().items():
        for name in names:
            if not arguments.names or name in arguments.names:
                lines.append("| " + " | ".join([kind, *(str(v) for v in coverage(name).values())]) + " |")
                print(lines[-1], flush=True)
            elif name in earlier:
                lines.append(earlier[name])
    dist.destroy_process_group()
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
