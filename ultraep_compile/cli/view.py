"""`ultraep-compile view`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultraep_compile.cli.output import writing


def view(
    trace: Annotated[Path, typer.Argument(help="File written by the option trace=...")],
    out: Annotated[Path | None, typer.Option(help="Where to write the report; default: beside the trace.")] = None,
) -> None:
    """Render a recorded run as one self-contained HTML report."""
    from ultraep_compile.telemetry import read_trace, write_report

    target = out or trace.with_suffix(".html")
    recorded = read_trace(trace)
    with writing(target, "--out"):
        write_report(recorded, target)
    typer.echo(f"wrote {target}")
