"""One self-contained HTML page for a trace. It loads nothing: scripts, styles and data are in the file.

A Content-Security-Policy inside the page lets the browser run only the two scripts whose hashes it names,
and fetch nothing at all. Data from the trace reaches the page as JSON that cannot end its own element, and
is shown as text.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable
from importlib import resources

from ultraep_compile.html import json_text, plotly_script, script_policy, write_page
from ultraep_compile.telemetry.report_data import Curves, report_data
from ultraep_compile.telemetry.trace import Trace

SCRIPTS = ("core.js", "overview.js", "loads.js", "costs.js", "main.js")  # in this order


def write_report(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    curves: Curves | None = None,
    notes: Iterable[str] = (),
) -> None:
    """Write the report of `trace` to `path`.

    `curves` maps a name to (x, y): `{"loss: balanced": (steps, losses), "loss: plain": ..., "tokens/s:
    ..."}`; the part before ": " names the chart, so curves that share it are drawn together. `notes` are
    lines of text about the run; "name: value" is set as a small table. Title and notes default to those
    recorded in the trace.
    """
    title = title or str(trace.info.get("title") or "How balanced were the experts?")
    recorded = trace.info.get("notes") or ()
    lines = list(notes) or ([recorded] if isinstance(recorded, str) else list(recorded))
    write_page(render(report_data(trace, title, curves, lines)), path)


def render(data: dict) -> str:
    """The page for what `report_data` returned."""
    plotly, app = plotly_script(), "\n".join(_read(name) for name in SCRIPTS)
    parts = {
        "@CSP@": script_policy(plotly, app),
        "@TITLE@": html.escape(str(data["title"])),
        "@STYLE@": _read("page.css"),
        "@DATA@": json_text(data),
        "@PLOTLY@": plotly,
        "@APP@": app,
    }
    pieces = re.split("(@[A-Z]+@)", _read("page.html"))
    return "".join(parts.get(piece, piece) for piece in pieces)


def _read(name: str) -> str:
    return resources.files("ultraep_compile.telemetry").joinpath("page", name).read_text(encoding="utf-8")
