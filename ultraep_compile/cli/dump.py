"""`ultraep-compile dump`"""

from __future__ import annotations

import html
import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultraep_compile.cli.output import file_names, make_folder, writing
from ultraep_compile.errors import TargetError

if TYPE_CHECKING:
    from ultraep_compile.codegen.row_function import RowProgram
    from ultraep_compile.explanation import Explanation

_STYLE = """
:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem }
nav a { margin-right: 1rem } pre { font: 12.5px/1.45 ui-monospace, monospace; overflow-x: auto; padding: 1rem; border: 1px solid #8884;
border-radius: 6px } .columns { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .added { background: #2a92 } .removed { background: #e442 }
.muted { opacity: .7 }
"""


def dump(
    target: Annotated[str, typer.Argument(help="package.module:factory or path/to/file.py:factory")],
    out: Annotated[Path, typer.Option(help="Folder for the files; made if missing.")],
    stages: Annotated[int, typer.Option(min=0, help="Write a pipeline of so many stages of a multimodal model, too.")] = 0,
    microbatches: Annotated[int, typer.Option(min=0, help="Microbatches of that pipeline; 0: two for each stage.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks at most for which streaming kernels are shown.")] = 8,
    slots: Annotated[int, typer.Option(min=1, help="Redundant experts a rank, likewise.")] = 2,
) -> None:
    """Write the graph before and after every pass, as text and HTML, the generated row programs and streaming kernels, and
    the report of explain."""
    from ultraep_compile.cli.target import load_target, need_inputs
    from ultraep_compile.explanation import explain as run

    make_folder(out, "--out")  # before the work, so that a wrong name costs none
    model, inputs = load_target(target)
    found = run(model, need_inputs(target, inputs), snapshots=True)
    with writing(out, "--out"):
        _write_all(target, model, inputs, found, out, stages, microbatches or 2 * stages, ranks, slots)
    typer.echo(f"wrote {out / 'index.html'}")


def _write_all(
    target: str,
    model: Any,
    inputs: Any,
    found: Explanation,
    out: Path,
    stages: int,
    microbatches: int,
    ranks: int,
    slots: int,
) -> None:
    from ultraep_compile.explanation import dumps

    (out / "explain.json").write_text(dumps(found))
    (out / "explain.txt").write_text(str(found) + "\n")
    if stages:
        _write_pipeline(model, inputs, stages, microbatches, out)
    pages = []
    for index, snapshots in enumerate(found.snapshots):
        for step, (name, text) in enumerate(snapshots):
            (out / f"graph{index}_{step}_{name}.txt").write_text(text)
        page = f"graph{index}.html"
        (out / page).write_text(_graph_page(index, snapshots))
        pages.append(
            (
                page,
                f"graph {index}: {sum('ultraep.experts' in line for line in snapshots[-1][1].splitlines())} rewritten layers",
            )
        )
    written: set[str] = set()
    files = file_names(list(found.programs))
    for name, program in found.programs.items():
        file = f"{files[name]}.py"
        forward, backward = program.forward_module.code, program.backward_module.code
        text = f'"""Row program of {name}: explicit forward and backward over masters and slots."""\nimport torch\n\n{forward}\n{backward}\n'
        (out / f"row_program_{file}").write_text(text)
        for kernel, text in _streaming_kernels(program, ranks, slots).items():
            if text not in written:  # layers alike share theirs
                written.add(text)
                (out / f"kernel_{kernel}_{file}").write_text(text)
    (out / "index.html").write_text(_index_page(target, str(found), pages, sorted(p.name for p in out.iterdir())))


def _streaming_kernels(program: RowProgram, ranks: int, slots: int) -> dict[str, str]:
    """Those for the largest number of ranks, `ranks` at most, that divides the experts; none where Triton is missing."""
    if find_spec("triton") is None or not program.signature.params:
        return {}
    from ultraep_compile.codegen.streams import streaming_kernels

    experts = program.signature.masters
    return streaming_kernels(program, max(r for r in range(1, ranks + 1) if experts % r == 0), slots)


def _write_pipeline(model: Any, inputs: Any, stages: int, microbatches: int, out: Path) -> None:
    """Stages and schedule as text, and the schedule for ui.perfetto.dev. The sizes are those of the example inputs, which
    must have as many samples as microbatches."""
    from ultraep_compile.executor.outline import outline
    from ultraep_compile.preparation import as_call
    from ultraep_compile.schedules import report
    from ultraep_compile.schedules.trace import perfetto

    args, kwargs = as_call(inputs)
    if args:
        raise TargetError("a pipeline divides inputs by name. Let the factory return them as a dict of keyword arguments.")
    text, schedule = outline(model, kwargs, stages, microbatches)
    (out / "pipeline.txt").write_text(text + "\n")
    (out / "pipeline_schedule.txt").write_text(str(schedule))
    (out / "pipeline_trace.json").write_text(json.dumps(perfetto([report(schedule)])))


def _page(title: str, body: str) -> str:
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style><body><h1>{html.escape(title)}</h1>{body}"


def _index_page(target: str, report: str, pages: list[tuple[str, str]], files: list[str]) -> str:
    links = "".join(f"<li><a href='{page}'>{html.escape(text)}</a>" for page, text in pages)
    rest = "".join(f"<li><a href='{html.escape(f)}'>{html.escape(f)}</a>" for f in files)
    return _page(
        f"ultraep dump of {target}",
        f"<ul>{links}</ul><pre>{html.escape(report)}</pre><details><summary>All files</summary><ul>{rest}</ul></details>",
    )


def _graph_page(index: int, snapshots: list[tuple[str, str]]) -> str:
    """Every pass that changed the graph as a side-by-side difference; the others by name."""
    parts = [f"<p class=muted>Passes in order: {', '.join(html.escape(name) for name, _ in snapshots[1:])}</p>"]
    for (_, before), (name, after) in itertools.pairwise(snapshots):
        if before == after:
            parts.append(f"<h2>{html.escape(name)}</h2><p class=muted>analysis only: the graph is unchanged</p>")
            continue
        removed, added = set(before.splitlines()), set(after.splitlines())
        left = "\n".join(_line(line, "" if line in added else "removed") for line in before.splitlines())
        right = "\n".join(_line(line, "" if line in removed else "added") for line in after.splitlines())
        parts.append(f"<h2>{html.escape(name)}</h2><div class=columns><pre>{left}</pre><pre>{right}</pre></div>")
    if len(snapshots) == 1 or all(a[1] == b[1] for a, b in itertools.pairwise(snapshots)):
        parts.append(f"<h2>The graph</h2><pre>{html.escape(snapshots[0][1])}</pre>")
    return _page(f"Graph {index}", "".join(parts))


def _line(text: str, kind: str) -> str:
    escaped = html.escape(text)
    return f"<span class={kind}>{escaped}</span>" if kind else escaped
