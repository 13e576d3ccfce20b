"""The report of `demo --multimodal`: curves, memory, and the timeline of a step, measured beside predicted."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace

from ultraep_compile.demo_multimodal import Result
from ultraep_compile.schedules import report
from ultraep_compile.schedules.page import page
from ultraep_compile.schedules.picture import CURVES
from ultraep_compile.schedules.report import Report
from ultraep_compile.schedules.simulate import Timeline

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _BELOW = 520, 190, 46, 22  # pixels of a chart, of its margins


def beside(measured: Timeline, predicted: Timeline) -> list[Report]:
    """The two as reports against the same bounds: those of the operations' measured mean times."""
    bounds = report(predicted.schedule)
    return [
        replace(bounds, timeline=replace(t, schedule=replace(t.schedule, method=f"{name}: {t.schedule.method}")))
        for name, t in (("measured", measured), ("predicted", predicted))
    ]


def demo_page(result: Result, notes: Sequence[str]) -> str:
    """The whole page, one self-contained file."""
    losses = [(n + 1, loss) for n, loss in enumerate(result.losses)]
    single = [(n + 1, loss) for n, loss in enumerate(result.losses_single)]
    charts = [
        chart("loss", {"pipeline": losses, f"one process, first {len(single)} steps": single}),
        chart("accuracy on held-out digits", {"pipeline": result.looks}, top=1.0),
    ]
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    row = "".join(f'<div style="margin-right:24px">{c}</div>' for c in charts)
    above = (
        f'{paragraphs}<div style="display:flex;flex-wrap:wrap">{row}{memory_table(result)}</div>'
        "<h2>One step, measured beside predicted (seconds)</h2>"
    )
    return page(beside(*result.shown), "A pipeline learns to read digits", above, compare=False)


def memory_table(result: Result) -> str:
    """Most activation bytes of every rank, with bars on one scale."""
    most = max(*result.encoder_bytes, *result.llm_bytes)

    def cell(size: int, colour: str) -> str:
        bar = f"display:inline-block;height:9px;width:{max(1, round(110 * size / most))}px;background:{colour}"
        return f'<td style="text-align:left"><i style="{bar}"></i> {size / 1e6:.2f} MB</td>'

    rows = "".join(
        f'<tr><td class="name">rank {r}</td>{cell(e, CURVES["encoder"])}{cell(llm, CURVES["LLM"])}</tr>'
        for r, (e, llm) in enumerate(zip(result.encoder_bytes, result.llm_bytes, strict=True))
    )
    return (
        "<div><h2>most activation memory in any step</h2>"
        f"<table><tr><th></th><th>encoder</th><th>LLM</th></tr>{rows}</table></div>"
    )


def chart(title: str, lines: dict[str, Points], top: float | None = None) -> str:
    """Lines over steps, from zero up, as SVG. The second line is dashed, so that it is seen on top of the first.

    >>> chart("loss", {"a": [(1, 2.0), (3, 1.0)]}, top=2.0).count("<polyline")
    1
    """
    points = [p for line in lines.values() for p in line]
    last = max((x for x, _ in points), default=1) or 1
    highest = top or max((y for _, y in points), default=1) * 1.05 or 1
    right, floor = _WIDTH - 8, _HEIGHT - _BELOW

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + x / last * (right - _LEFT), 1), round(floor - y / highest * (floor - 24), 1)

    marks = []
    for share in (0.0, 0.5, 1.0):
        y = place(0, share * highest)[1]
        marks.append(f'<path d="M{_LEFT} {y}H{right}" stroke="#8884"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{share * highest:.3g}</text>')
    marks.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">step {last:.0f}</text>')
    looks = [("#0072B2", 'stroke-width="1.6"'), ("#E69F00", 'stroke-width="2.2" stroke-dasharray="5 4"')]
    for n, ((name, line), (colour, style)) in enumerate(zip(lines.items(), looks, strict=False)):
        drawn = " ".join(f"{x},{y}" for x, y in (place(*p) for p in line))
        marks.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" {style}/>')
        at = right - 190 * (len(lines) - 1 - n)
        marks.append(f'<text x="{at}" y="12" text-anchor="end" style="fill:{colour}">{html.escape(name)}</text>')
    style = f'width="{_WIDTH}" height="{_HEIGHT}" style="font-size:11px;fill:currentColor"'
    return f"<div><h2>{html.escape(title)}</h2><svg {style}>{''.join(marks)}</svg></div>"
