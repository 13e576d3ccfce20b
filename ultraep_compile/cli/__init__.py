"""The command `ultraep-compile`. Exit codes: 0 ok, 1 the check asked for failed, 2 bad usage or bad input."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer

from ultraep_compile.errors import SiteCountError, UltraEPError, VerificationError

app = typer.Typer(
    name="ultraep-compile",
    help="Make an unmodified PyTorch model run as if its load were perfectly balanced.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMMANDS = ("doctor", "demo", "explain", "dump", "plan", "replay", "view", "schedule")


def _print_version(asked: bool) -> None:
    if asked:
        import ultraep_compile

        typer.echo(f"ultraep_compile {ultraep_compile.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _register() -> None:
    for name in COMMANDS:
        module = importlib.import_module(f"ultraep_compile.cli.{name}")
        app.command(name)(getattr(module, name))


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a mistake of the user becomes one sentence and exit code 2, never a traceback."""
    _register()
    try:
        app(args=arguments)
    except (SiteCountError, VerificationError) as failed:
        print(f"ultraep-compile: {failed}", file=sys.stderr)
        raise SystemExit(1) from None
    except UltraEPError as mistake:
        print(f"ultraep-compile: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
