"""Writes docs/reference.md from the code: options, environment, commands, errors.

    python docs/generate_reference.py          # after any change to one of them; a test compares

Nothing in that file is written by hand. The meaning of an option is the docstring under its field, that of a
command and of its arguments is what `--help` prints, that of an error is the docstring of its class.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

from ultraep_compile import config, errors
from ultraep_compile.cli import COMMANDS
from ultraep_compile.config import Options
from ultraep_compile.executor.settings import Settings

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "reference.md"
SOURCES = ("ultraep_compile", "passes", "codegen")


def options(class_: type) -> list[tuple[str, str, str]]:
    """(name, default, meaning) of every field of a dataclass whose fields have docstrings."""
    (tree,) = (n for n in ast.parse(inspect.getsource(class_)).body if isinstance(n, ast.ClassDef))
    meaning = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                meaning[name] = _one_line(text)
    fields = dataclasses.fields(class_)
    return [
        (f.name, "required" if f.default is dataclasses.MISSING else repr(f.default), meaning[f.name]) for f in fields
    ]


def environment() -> list[tuple[str, str]]:
    """(variable, meaning) of every environment variable of ours that a source names."""
    names: set[str] = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(re.findall(r"ULTRAEP_COMPILE_[A-Z_]+", path.read_text()))
    documented = [d.body[0].value.value for d in _functions(config) if ast.get_docstring(d)]  # type: ignore[attr-defined]
    found = [(name, _one_line(next(text for text in documented if name in text))) for name in sorted(names)]
    return found + [(v, f"Option `{name}`, where the code does not give it.") for name, v in config.VARIABLES.items()]


def _functions(module: object) -> Iterable[ast.FunctionDef]:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))


def commands() -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """(name, meaning, [(argument, default, meaning)]) of every command."""
    out = []
    for name in COMMANDS:
        function = getattr(importlib.import_module(f"ultraep_compile.cli.{name}"), name)
        out.append((name, _one_line(function.__doc__), _arguments(function)))
    return out


def _arguments(function: Callable[..., None]) -> list[tuple[str, str, str]]:
    hints = typing.get_type_hints(function, include_extras=True)
    out = []
    for parameter in inspect.signature(function).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])
        shown = _shown(parameter.name, kind, info)
        default = parameter.default
        required = "required" if default is inspect.Parameter.empty else ""
        hidden = required or default is None or default == "" or default is False
        out.append((shown, required if hidden else str(default), _one_line(info.help or "")))
    return out


def _shown(name: str, kind: typing.Any, info: typing.Any) -> str:
    """As it is typed: `TARGET`, `--steps N`, `--json`."""
    if type(info).__name__ == "ArgumentInfo":
        return name.upper()
    flag = next(iter(info.param_decls or ()), "--" + name.replace("_", "-"))
    kinds = {k for k in typing.get_args(kind) if k is not type(None)} or {kind}
    if kinds == {bool}:
        return flag
    metavar = {int: "N", float: "X", Path: "PATH"}.get(kinds.pop(), "TEXT")
    return f"{flag} {info.metavar or metavar}"


def error_classes() -> list[type[errors.UltraEPError]]:
    """Every error of ours, the base first, then as they stand in errors.py."""
    found = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.UltraEPError)]
    return found


def render() -> str:
    """The text of docs/reference.md."""
    lines = [
        "# Reference",
        "Written by `docs/generate_reference.py` from the code; a test keeps it so. Do not edit.",
        "",
        "## Options",
        'Of `model.compile(backend="ultraep", options={...})` and of `@ultraep_compile.balance(...)`.',
        "An unknown name or a wrong value is an error that names the nearest right one.",
        "",
        *_table(("option", "default", "meaning"), options(Options)),
        "",
        "## Pipelines",
        "Settings of `ultraep_compile.pipeline(model, mesh, microbatches, inputs, ...)`; see [pipelines](pipelines.md).",
        "",
        *_table(("setting", "default", "meaning"), options(Settings)),
        "",
        "## Environment",
        *_table(("variable", "meaning"), environment()),
        "",
        "## Commands",
        "`ultraep-compile COMMAND`, or `python -m ultraep_compile COMMAND` where nothing is installed.",
        "Exit codes: 0 ok, 1 the check asked for failed, 2 bad usage or bad input.",
    ]
    for name, meaning, arguments in commands():
        lines += ["", f"### {name}", meaning, ""]
        lines += _table(("argument", "default", "meaning"), arguments)
    lines += ["", "## Errors", "All are in `ultraep_compile.errors`.", ""]
    rows = [(c.__name__, _bases(c), _one_line(c.__doc__ or "")) for c in error_classes()]
    return "\n".join([*lines, *_table(("error", "is also a", "meaning"), rows), ""])


def _bases(error: type) -> str:
    return ", ".join(b.__name__ for b in error.__bases__ if b is not errors.UltraEPError)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table; all but the last column as code."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [*(f"`{cell}`" if cell else "" for cell in row[:-1]), row[-1]]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return lines


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    TARGET.write_text(render())
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
