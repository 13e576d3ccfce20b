"""One self-contained HTML page for a trace. It loads nothing: scripts, styles and data are in the file.

A Content-Security-Policy inside the page lets the browser run only the two scripts whose hashes it names,
and fetch nothing at all. Data from the trace reaches the page as JSON that cannot end its own element, and
is shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable
from importlib import resources

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
    page = render(report_data(trace, title, curves, lines))
    target = os.path.abspath(os.fspath(path))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    part = f"{target}.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(part, target)


def render(data: dict) -> str:
    """The page for what `report_data` returned."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs().replace("\r\n", "\n").replace("</script", "<\\/script")
    app = "\n".join(_read(name) for name in SCRIPTS)
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = {
        "@CSP@": " ".join(f"'sha256-{_hash(script)}'" for script in (plotly, app)),
        "@TITLE@": html.escape(str(data["title"])),
        "@STYLE@": _read("page.css"),
        "@DATA@": text,
        "@PLOTLY@": plotly,
        "@APP@": app,
    }
    pieces = re.split("(@[A-Z]+@)", _read("page.html"))
    return "".join(parts.get(piece, piece) for piece in pieces)


def _read(name: str) -> str:
    return resources.files("ultraep_compile.telemetry").joinpath("page", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
