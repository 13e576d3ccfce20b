"""All planners on all workloads, and exact against stale plans on loads that drift: figures and their numbers.

    python -m benchmarks.planner_peers [--ranks 64] [--experts 256] [--slots 2] [--out benchmarks/results/planner]

Writes peers.png, drift.png and peers.json. Imbalance, copies and traffic are those of the plans; times are the
cost model's with its H100 rates. Every plan is validated before it counts. eplb@8 plans on the 8 microbatches
before, and anew every 8; all planners are compared on the microbatches after the first 8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import scipy
import torch

from ultraep_compile.cost_model import Layer, Rates
from ultraep_compile.planner import imbalance, loads_after, validate_plan
from ultraep_compile.planner.registry import IDEAL
from ultraep_compile.replay import Question, Sequence, Source, Spec, replay
from ultraep_compile.replay.page import COLOURS
from ultraep_compile.replay.run import plans
from ultraep_compile.workloads import WORKLOADS, Setting, generate

SPECS = tuple(Spec.parse(text) for text in ("none", "eplb@8", "lplb@8", "greedy", "quota", "ideal"))
MARKERS = {"none": "_", "eplb": "v", "lplb": "^", "greedy": "D", "quota": "o", "ideal": "_"}
PANELS = {  # key: (label, logarithmic)
    "after_p50": ("imbalance\nmax / mean, median", True),
    "replicas": ("copies\nper microbatch", False),
    "remote_share": ("rows that leave\ntheir rank", False),
    "step": ("predicted time of a\ntraining step / ideal", True),
    "step_hidden": ("the same, copies relayed\nand 60% of them hidden", True),
}
HIDDEN = Rates(relay_from=4, exposed=0.4)
HISTORIES = (1, 2, 4, 8, 16, 32)


def compare(setting: Setting, slots: int, layer: Layer) -> dict[str, list[dict[str, Any]]]:
    """Per workload the figures of every planner; `step` is the predicted time over that of even routing.

    `step_hidden` is the same where hot experts are passed on by their copies (a tree of depth two) and a product
    hides 60% of the copies' time, the share measured on H100.
    """
    out = {}
    for name in WORKLOADS:
        counts_NRE = generate(name, setting)
        sequence = Sequence(name, counts_NRE, layer)
        for spec in SPECS:
            if spec.planner != IDEAL:
                for counts_RE, plan in plans(sequence, spec, slots, 8):
                    validate_plan(counts_RE, plan, never_worse=False)
        source = Source(name, [sequence])
        rows, hidden = (replay(source, Question(SPECS, (slots,), r)).to_json()["results"] for r in (Rates(), HIDDEN))
        ideal = next(row["step_us"] for row in rows if row["planner"] == IDEAL)
        out[name] = [
            row | {"step": row["step_us"] / ideal, "step_hidden": other["step_us"] / ideal}
            for row, other in zip(rows, hidden, strict=True)
        ]
        texts = (f"{r['planner']} {r['after_p50']:.3f} {r['step']:.2f} {r['step_hidden']:.2f}" for r in out[name])
        print(f"{name:22}", "  ".join(texts))
    return out


def drift(setting: Setting, slots: int, layer: Layer) -> dict[str, Any]:
    """On the workload `drift`: imbalance over time, and its mean by length of history."""
    sequence = Sequence("drift", generate("drift", setting), layer)
    start = max(HISTORIES)

    def series(text: str) -> list[float]:
        return [imbalance(loads_after(plan)) for _, plan in plans(sequence, Spec.parse(text), slots, start)]

    shown = ("none", "eplb@8", "lplb@8", "quota@8", "quota")
    by_history = {
        planner: [float(np.mean(series(f"{planner}@{history}"))) for history in HISTORIES]
        for planner in ("eplb", "lplb", "greedy", "quota")
    }
    exact = {planner: float(np.mean(series(planner))) for planner in ("none", "eplb", "lplb", "greedy", "quota")}
    return {"over_time": {t: series(t) for t in shown}, "by_history": by_history, "exact": exact, "start": start}


def draw_peers(found: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(13, 13.5), sharex=True)
    names = list(found)
    for axis, (key, (label, logarithmic)) in zip(axes, PANELS.items(), strict=True):
        for n in range(0, len(names), 2):
            axis.axvspan(n - 0.5, n + 0.5, color="#f4f4f1", zorder=0)
        for place, spec in enumerate(SPECS):
            if key == "replicas" and not spec.uses_slots:
                continue
            values = [next(r[key] for r in found[name] if r["planner"] == str(spec)) for name in names]
            x = np.arange(len(names)) + (place - (len(SPECS) - 1) / 2) * 0.13
            wide = spec.uses_slots
            axis.scatter(
                x, values, s=42 if wide else 110, marker=MARKERS[spec.planner], color=COLOURS[spec.planner],
                linewidths=0 if wide else 2.2, label=str(spec), zorder=3,
            )  # fmt: skip
        if logarithmic:
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            ticks = [t for t in (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if low <= t <= high * 1.02]
            axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
            axis.minorticks_off()
        elif key == "remote_share":
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        else:
            axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#dcdcd8", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(names)), [name.replace("_", " ", 1) for name in names], rotation=35, ha="right")
    axes[-1].set_xlim(-0.5, len(names) - 0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axes[0].legend(ncols=len(SPECS), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_drift(found: dict[str, Any], title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(3, 2))
    styles = {"none": (COLOURS["none"], "-"), "quota@8": (COLOURS["quota"], "--"), "quota": (COLOURS["quota"], "-")}
    for name, values in found["over_time"].items():
        colour, dash = styles.get(name, (COLOURS[name.partition("@")[0]], "-"))
        x = np.arange(len(values)) + found["start"]
        left.step(x, values, where="mid", color=colour, linestyle=dash, label=name, linewidth=1.8)
    left.set_xlabel("microbatch")
    left.set_ylabel("imbalance, max / mean")
    left.legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    x = np.arange(len(HISTORIES) + 1)
    for planner, values in found["by_history"].items():
        style = {"color": COLOURS[planner], "marker": MARKERS[planner], "linewidth": 1.8, "markersize": 6}
        right.plot(x, [found["exact"][planner], *values], label=planner, **style)
    right.axhline(found["exact"]["none"], color=COLOURS["none"], linewidth=1.8, label="none")
    right.set_xticks(x, ["exact", *map(str, HISTORIES)])
    right.set_xlabel("microbatches planned on, and between two plans")
    right.set_ylabel("mean imbalance")
    right.legend(ncols=5, loc="lower left", bbox_to_anchor=(-0.08, 1.0), frameon=False, columnspacing=1.0, handlelength=1.4)
    for axis in (left, right):
        axis.grid(axis="y", color="#dcdcd8", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0.9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    setting = Setting(args.microbatches, args.ranks, args.experts, 8, args.tokens)
    layer = Layer.gated(4096, 1536, 8)
    peers = compare(setting, args.slots, layer)
    drifting = drift(dataclasses.replace(setting, microbatches=96), args.slots, layer)
    print("drift", {name: round(value, 3) for name, value in drifting["exact"].items()}, drifting["by_history"])
    size = f"{args.ranks} ranks, {args.experts} experts, top-8, {args.tokens} tokens a rank, {args.slots} slots a rank"
    draw_peers(peers, f"Planners on synthetic loads: {size}", args.out / "peers.png")
    draw_drift(drifting, f"What history costs when the load drifts: {size}", args.out / "drift.png")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {
        "setting": dataclasses.asdict(setting), "slots": args.slots, "layer": dataclasses.asdict(layer),
        "rates": dataclasses.asdict(Rates()), "versions": versions | {"scipy": scipy.__version__},
        "peers": peers, "drift": drifting,
    }  # fmt: skip
    (args.out / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}/peers.png, drift.png and peers.json")


if __name__ == "__main__":
    main()
