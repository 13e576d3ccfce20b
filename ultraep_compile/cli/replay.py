"""`ultraep-compile replay`: is balancing worth it, with which planner and how many slots?"""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultraep_compile.cli.output import writing
from ultraep_compile.errors import OptionError

if TYPE_CHECKING:
    from ultraep_compile.replay import Replayed, Source

DEFAULT_SLOTS = (1, 2, 4)

SourceName = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A trace (option trace=...), an .npz of load matrices, or a workload; `list` names them."
    ),
]
Planners = Annotated[
    str, typer.Option(help="Comma-separated; eplb@8 plans on the 8 microbatches before, and anew every 8.")
]
Slots = Annotated[str, typer.Option(help="Slots per rank to try, comma-separated (default: 1,2,4 as far as possible).")]
Domain = Annotated[int | None, typer.Option(help="Ranks that share fast links; copies never leave them.")]
Phase = Annotated[str, typer.Option(help="train (forward and backward) or forward.")]
RatesFile = Annotated[Path | None, typer.Option(help="JSON of measured rates; names left out keep H100 figures.")]
Microbatches = Annotated[int, typer.Option(help="Of a workload; of a file, at most so many.")]
Ranks = Annotated[int, typer.Option(help="Ranks of a workload.")]
Experts = Annotated[int, typer.Option(help="Experts of a workload.")]
TopK = Annotated[int, typer.Option(help="Experts per token; a trace knows its own.")]
Tokens = Annotated[int, typer.Option(help="Tokens per rank and microbatch of a workload.")]
Seed = Annotated[int, typer.Option(min=0, help="Of a workload.")]
Width = Annotated[int, typer.Option(help="Model width; a trace knows its own sizes.")]
Ffn = Annotated[int, typer.Option(help="Inner width of an expert (gate, up and down).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[Path | None, typer.Option(help="Write one self-contained HTML page to this file.")]
Rehome = Annotated[int, typer.Option(min=0, help="Deal the experts over domains and ranks anew, by so many first microbatches.")]
Explain = Annotated[bool, typer.Option("--explain", help="Print the formulas of the cost model.")]


def replay(
    source: SourceName,
    planners: Planners = "none,eplb@8,lplb@8,greedy,quota,ideal",
    slots: Slots = "",
    domain: Domain = None,
    phase: Phase = "train",
    rates: RatesFile = None,
    microbatches: Microbatches = 32,
    ranks: Ranks = 8,
    experts: Experts = 64,
    top_k: TopK = 8,
    tokens: Tokens = 4096,
    seed: Seed = 0,
    width: Width = 4096,
    ffn: Ffn = 1536,
    json: Json = False,
    rehome: Rehome = 0,
    html: Html = None,
    explain: Explain = False,
) -> None:
    """Replay loads through several planners: predicted step time, memory, traffic, break-even and best slots."""
    from ultraep_compile.cost_model import PHASES, Layer, Rates
    from ultraep_compile.cost_model import explain as explain_formulas
    from ultraep_compile.html import write_page
    from ultraep_compile.replay import Question, Spec, page, read_source, rehomed
    from ultraep_compile.replay import replay as run
    from ultraep_compile.workloads import Setting

    if source == "list":
        _list_workloads()
        return
    if phase not in PHASES:
        raise OptionError(f"--phase is {phase!r}. Give {' or '.join(PHASES)}.")
    for name, value in (("--width", width), ("--ffn", ffn)):
        if value < 1:
            raise OptionError(f"{name} is {value}. Give 1 or more.")
    specs = tuple(dict.fromkeys(Spec.parse(text) for text in planners.split(",")))
    setting = Setting(microbatches, ranks, experts, top_k, tokens, seed)
    found = read_source(source, setting, Layer.gated(width, ffn, top_k), microbatches)
    if rehome:
        found = rehomed(found, rehome, domain)
    question = Question(
        specs, _slots(slots, found, domain), Rates.load(rates) if rates else Rates(), phase, domain
    )
    result = run(found, question, _progress())
    if html is not None:
        with writing(html, "--html"):
            write_page(page(result), html)
    if json:
        typer.echo(json_module.dumps(result.to_json(), indent=2))
        return
    _print(result)
    if explain:
        typer.echo(explain_formulas(found.sequences[0].layer, question.rates, phase))
    if html is not None:
        typer.echo(f"wrote {html}", err=True)


def _slots(text: str, source: Source, domain: int | None) -> tuple[int, ...]:
    if text:
        try:
            given = tuple(sorted({int(part) for part in text.split(",")}))
        except ValueError:
            raise OptionError(f"--slots is {text!r}. Give whole numbers with commas, as in 1,2,4.") from None
        if given[0] < 0:
            raise OptionError(f"--slots has {given[0]}. Give numbers of slots per rank, 0 or more.")
        return given
    shapes = [s.counts_NRE.shape for s in source.sequences]
    foreign = min(experts // ranks * ((domain or ranks) - 1) for _, ranks, experts in shapes)
    return tuple(s for s in DEFAULT_SLOTS if s <= foreign) or (0,)


def _list_workloads() -> None:
    from ultraep_compile.workloads import WORKLOADS

    for name, make in WORKLOADS.items():
        typer.echo(f"{name:22} {' '.join((make.__doc__ or '').split())}")


def _progress() -> Callable[[list], Iterable[Any]]:
    """A bar on standard error where somebody watches."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda runs: track(runs, "replaying", console=console, transient=True, disable=not console.is_terminal)


def _print(result: Replayed) -> None:
    from rich.console import Console
    from rich.table import Table

    from ultraep_compile.replay.page import HEADS, about, cells, verdict

    before = f"imbalance without copies: median {_median(result.before):.3f}, worst {result.before.max():.3f}"
    bounds = ", ".join(f"{bound:.3f} with {slots}" for slots, bound in result.lower_bounds.items())
    table = Table(title=f"{result.source.title}: {about(result)}", caption=f"{before}; no plan below (mean): {bounds}")
    for n, head in enumerate(HEADS):
        table.add_column(head, justify="left" if n == 0 else "right", no_wrap=n == 0)
    for one in result.outcomes:
        best = one.spec.uses_slots and one is result.best(one.spec)
        table.add_row(*cells(result, one), style="bold" if best else None)
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a file or a pipe has no width of its own
    console.print(table)
    console.print(verdict(result), highlight=False, soft_wrap=True)


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values))
