"""Timeline, memory curves and comparison of schedules as one PNG (matplotlib, the extra `pictures`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultraep_compile.errors import OptionError, nearest
from ultraep_compile.schedules.memory import memory_curves
from ultraep_compile.schedules.report import Report

# Okabe-Ito colours: distinct also without red-green vision
COLOURS = {
    "F": "#56B4E9",
    "B": "#0072B2",
    "I": "#0072B2",
    "W": "#7FA8C9",
    "EF": "#F0E442",
    "EB": "#E69F00",
    "G": "#CC79A7",
}
LABELS = {
    "F": "LLM forward",
    "B": "LLM backward",
    "I": "backward, input part",
    "W": "backward, weight part",
    "EF": "encoder forward",
    "EB": "encoder backward",
    "G": "generator",
}
CURVES = {"encoder": "#E69F00", "LLM": "#0072B2", "generator": "#CC79A7"}
_NAMED = 900  # operations above which microbatch numbers would be unreadable


def pyplot() -> Any:
    """Import matplotlib's pyplot for drawing into files.

    Raises: OptionError where it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg", force=False)
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError(
            "PNG pictures need matplotlib. Install ultraep-compile[pictures], or use --html, which"
            " needs nothing."
        ) from error
    return pyplot


def check_kind(path: Path) -> None:
    """Refuse a picture file of a kind that matplotlib does not write (by its suffix), before anything is planned.

    Raises: OptionError.
    """
    pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind and kind not in kinds:
        raise OptionError(f"--png {path} is of an unknown kind. {nearest(kind, kinds)}")


def draw_png(reports: Sequence[Report], path: Path) -> None:
    """The first schedule's timeline and memory; the timelines of all the others below, on one time axis."""
    plots = pyplot()
    ranks = len(reports[0].schedule.ranks)
    heights = [max(1.6, 0.42 * ranks)] + [1.5] + [max(1.3, 0.26 * ranks)] * (len(reports) - 1)
    figure, axes = plots.subplots(
        len(heights),
        1,
        figsize=(15, sum(heights) + 0.75 * len(heights)),
        height_ratios=heights,
        squeeze=False,
    )
    longest = max(r.makespan for r in reports)
    _timeline(axes[0, 0], reports[0], longest, named=True)
    _memory(axes[1, 0], reports[0], longest)
    for axis, other in zip(axes[2:, 0], reports[1:], strict=True):
        _timeline(axis, other, longest, named=False)
    axes[-1, 0].set_xlabel("time (unit of the costs)")
    _legend(axes[0, 0], reports)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plots.close(figure)


def title(report: Report) -> str:
    return (
        f"{report.schedule.method}: makespan {report.makespan:.5g} ="
        f" {report.makespan / report.ideal:.3f} x ideal,"
        f" idle {report.timeline.bubble:.1%}, most held by a rank: encoder {max(report.peak.encoder):.3g},"
        f" LLM {max(report.peak.llm):.3g}"
    )


def _timeline(axis: Any, report: Report, longest: float, named: bool) -> None:
    schedule, timeline = report.schedule, report.timeline
    axis.set_facecolor("#F2F2F2")
    named = named and sum(map(len, schedule.ranks)) <= _NAMED
    for r, (ops, starts, ends) in enumerate(zip(schedule.ranks, timeline.start, timeline.end, strict=True)):
        for kind, colour in COLOURS.items():
            bars = [(s, e - s) for op, s, e in zip(ops, starts, ends, strict=True) if op.kind == kind]
            if bars:
                axis.broken_barh(bars, (r - 0.46, 0.92), facecolors=colour, edgecolors="white", linewidth=0.3)
        for op, start, end in zip(ops, starts, ends, strict=True) if named else ():
            if end - start > longest * 0.008:
                text = str(op.microbatch) if not op.items else "·".join(map(str, op.microbatches))
                fits = end - start > longest * 0.0045 * len(text)
                axis.text(
                    (start + end) / 2,
                    r,
                    text if fits else "",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if op.kind in ("B", "I") else "black",
                    clip_on=True,
                )
    axis.axvline(report.makespan, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, longest * 1.005)
    axis.set_ylim(len(schedule.ranks) - 0.5, -0.5)
    axis.set_yticks(range(len(schedule.ranks)))
    axis.set_ylabel("rank")
    axis.set_title(title(report), fontsize=9, loc="left")


def _memory(axis: Any, report: Report, longest: float) -> None:
    """Faint: each rank. Strong: the most that any rank holds."""
    curves = memory_curves(report.timeline)
    for what, colour in CURVES.items():
        rows = [rank[what] for rank in curves if what in rank]
        for points in rows:
            axis.step(*zip(*points, strict=True), where="post", color=colour, alpha=0.25, linewidth=0.7)
        if rows:
            changes = sorted((t, r, held) for r, points in enumerate(rows) for t, held in points)
            now, top = [0.0] * len(rows), []
            for t, r, held in changes:
                now[r] = held
                top.append((t, max(now)))
            unit = "stage activations" if what == "LLM" else "microbatches"
            axis.step(
                *zip(*top, strict=True), where="post", color=colour, linewidth=1.6, label=f"{what} ({unit})"
            )
    axis.set_xlim(0, longest * 1.005)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("held")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right", ncols=3, bbox_to_anchor=(1, 1.0), frameon=False)
    axis.set_title("memory: most held by any rank (faint: each rank)", fontsize=9, loc="left")


def _legend(axis: Any, reports: Sequence[Report]) -> None:
    from matplotlib.patches import Patch

    used = {op.kind for report in reports for ops in report.schedule.ranks for op in ops}
    patches = [Patch(color=COLOURS[k], label=LABELS[k]) for k in COLOURS if k in used]
    patches.append(Patch(facecolor="#F2F2F2", edgecolor="#BBBBBB", label="idle"))
    axis.legend(
        handles=patches,
        fontsize=7,
        ncols=len(patches),
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        frameon=False,
    )
