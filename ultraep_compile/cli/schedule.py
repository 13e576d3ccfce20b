"""`ultraep-compile schedule`: plan, prove, measure and draw a pipeline schedule."""

from __future__ import annotations

import json as json_module
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultraep_compile.cli.output import write_text, writing
from ultraep_compile.errors import OptionError, UltraEPError

if TYPE_CHECKING:
    from ultraep_compile.schedules.problem import Problem
    from ultraep_compile.schedules.report import Report


Stages = Annotated[int, typer.Option(help="Pipeline stages P, one per rank.")]
Microbatches = Annotated[int, typer.Option(help="Microbatches M of a step.")]
Virtual = Annotated[int, typer.Option(help="Virtual stages per rank; each costs 1/V of a stage.")]
LlmCost = Annotated[str, typer.Option(metavar="F,B", help="LLM, per microbatch and stage (1,2).")]
EncoderCost = Annotated[str, typer.Option(metavar="F,B", help="Encoder, per microbatch on one rank.")]
GeneratorCost = Annotated[str, typer.Option(metavar="F,B", help="Generator, per microbatch on one rank.")]
Costs = Annotated[Path | None, typer.Option(help="JSON file: lists of length M, like encoder_forward.")]
EncoderMemory = Annotated[
    int | None, typer.Option(help="Encoder microbatches that a rank may hold (default: the fewest).")
]
Method = Annotated[
    str,
    typer.Option(help="nested, colocated, uneven, encoder-first, flush, optimus, disttrain or recompute."),
]
Latency = Annotated[float, typer.Option(help="From the end of an operation to its use on another rank.")]
Base = Annotated[
    str,
    typer.Option(help="1f1b, interleaved, gpipe, zero-bubble or dualpipev (default: by virtual stages)."),
]
GeneratorGroup = Annotated[
    int, typer.Option(help="Microbatches that wait for the generator together (0: P).")
]
Auto = Annotated[bool, typer.Option("--auto", help="Choose base, virtual stages and groups, and say why.")]
LlmMemory = Annotated[
    float | None, typer.Option(help="With --auto: LLM stage activations that a rank may hold.")
]
Noise = Annotated[float, typer.Option(help="Also play it with costs that vary by this share.")]
Compare = Annotated[bool, typer.Option("--compare", help="Put all other methods beside it.")]
Json = Annotated[Path | None, typer.Option(help="Write schedule and numbers to this file (-: print).")]
Png = Annotated[Path | None, typer.Option(help="Draw timeline and memory to this file.")]
Html = Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")]
Trace = Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev to this file.")]


def schedule(
    stages: Stages,
    microbatches: Microbatches,
    virtual: Virtual = 1,
    llm_cost: LlmCost = "",
    encoder_cost: EncoderCost = "",
    generator_cost: GeneratorCost = "",
    costs: Costs = None,
    encoder_memory: EncoderMemory = None,
    method: Method = "nested",
    latency: Latency = 0.0,
    base: Base = "",
    generator_group: GeneratorGroup = 0,
    auto: Auto = False,
    llm_memory: LlmMemory = None,
    noise: Noise = 0.0,
    compare: Compare = False,
    json: Json = None,
    png: Png = None,
    html: Html = None,
    trace: Trace = None,
) -> None:
    """Plan a nested pipeline (or a baseline), prove that it runs, and say what it costs."""
    from ultraep_compile.schedules.auto import choose
    from ultraep_compile.schedules.picture import check_kind
    from ultraep_compile.schedules.plan import plan
    from ultraep_compile.schedules.report import report, report_json
    from ultraep_compile.schedules.simulate import simulate
    from ultraep_compile.schedules.validate import validate

    _check(encoder_memory, llm_memory, noise)
    if auto:
        _check_left_to_auto(method, base, virtual, generator_group)
    elif llm_memory is not None:
        raise OptionError("--llm-memory limits what --auto may choose. Add --auto.")
    if png is not None:
        check_kind(png)
    base = base or ("interleaved" if virtual > 1 else "1f1b")
    pairs = {"llm": llm_cost, "encoder": encoder_cost, "generator": generator_cost}
    problem = _problem(stages, microbatches, virtual, base, pairs, costs, latency)
    why = ""
    if auto:
        choice = choose(problem, encoder_memory, llm_memory)
        made, problem, base, why = choice.schedule, choice.problem, choice.base, choice.why()
    else:
        made = plan(problem, method, base, encoder_memory, generator_group)
    validate(made)
    result = report(made, problem, base, encoder_memory)
    shown = [result, *(_others(problem, base, method, encoder_memory) if compare else ())]
    if str(json) == "-":
        typer.echo(json_module.dumps(report_json(result)))
    else:
        noisy = simulate(made, noise).makespan if noise else None
        typer.echo(_summary(result, why, noise, noisy) + ("\n" + _table(shown) if compare else ""))
        if json is not None:
            write_text(json, json_module.dumps(report_json(result)), "--json")
    if encoder_memory is not None and max(result.peak.encoder) > encoder_memory + 1e-6:
        typer.echo(
            f"warning: the method {method} holds more than --encoder-memory {encoder_memory}.", err=True
        )
    _draw(shown, png, html, trace)


def _check(
    encoder_memory: int | None, llm_memory: float | None, noise: float
) -> None:
    if encoder_memory is not None and encoder_memory < 1:
        raise OptionError(f"--encoder-memory is {encoder_memory}. Give at least 1 microbatch.")
    if llm_memory is not None and not llm_memory > 0:
        raise OptionError(f"--llm-memory is {llm_memory!r}. Give a positive number of stage activations.")
    if not (math.isfinite(noise) and noise >= 0):
        raise OptionError(f"--noise is {noise!r}. Give a share >= 0, for example 0.1.")


def _check_left_to_auto(method: str, base: str, virtual: int, generator_group: int) -> None:
    """Refuse beside --auto what it would not look at."""
    if method != "nested":
        raise OptionError(
            f"--auto chooses a nested schedule; --method {method} leaves nothing to choose. Drop one."
        )
    if base:
        raise OptionError(f"--auto chooses the base schedule, and --base {base} names one. Drop one of the two.")
    if virtual != 1:
        raise OptionError(f"--auto chooses virtual stages, and --virtual {virtual} names them. Drop one of the two.")
    if generator_group:
        raise OptionError(
            f"--auto chooses groups, and --generator-group {generator_group} names one. Drop one of the two."
        )


def _problem(
    stages: int,
    microbatches: int,
    virtual: int,
    base: str,
    pairs: dict[str, str],
    costs: Path | None,
    latency: float,
) -> Problem:
    from ultraep_compile.schedules.cost_table import add_pair, problem_from_table, read_costs

    table = read_costs(costs) if costs is not None else {}
    for unit, text in pairs.items():
        if text:
            add_pair(table, unit, f"--{unit}-cost", text, microbatches)
    placement = "vee" if base == "dualpipev" else "loop"
    return problem_from_table(table, stages, microbatches, virtual, placement, latency)


def _others(problem: Problem, base: str, method: str, memory: int | None) -> list[Report]:
    """The other methods that can do the problem."""
    from ultraep_compile.schedules.plan import METHODS, plan
    from ultraep_compile.schedules.report import report

    reports = []
    for name in METHODS:
        if name != method:
            try:
                reports.append(report(plan(problem, name, base), problem, base, memory))
            except UltraEPError as error:
                typer.echo(f"not compared: {name}: {error}", err=True)
    return reports


def _summary(result: Report, why: str, noise: float, noisy: float | None) -> str:
    peak, made = result.peak, result.schedule
    lines = [f"{made.method}: {made.note}", *([why] if why else [])]
    lines.append(f"makespan {result.makespan:.6g}   bubble {result.timeline.bubble:.1%}")
    lines.append(
        f"unlimited memory, phase after phase {result.ideal:.6g}   ratio {result.makespan / result.ideal:.4f}"
    )
    lines.append(
        f"no schedule below {result.lower_bound:.6g}   ratio {result.makespan / result.lower_bound:.4f}"
    )
    if result.lower_bound_capped is not None:
        ratio = result.makespan / result.lower_bound_capped
        lines.append(f"none within this memory below {result.lower_bound_capped:.6g}   ratio {ratio:.4f}")
    lines.append(
        f"most held by a rank: encoder {max(peak.encoder):.4g} microbatches,"
        f" generator {max(peak.generator):.4g},"
        f" LLM {max(peak.llm):.4g} stage activations"
    )
    if noisy is not None:
        lines.append(f"makespan with costs varying by {noise:g}: {noisy:.6g}")
    return "\n".join(lines)


def _table(shown: list[Report]) -> str:
    first = shown[0].makespan
    lines = [
        f"{'method':14} {'makespan':>10} {'/ ideal':>8} {'bubble':>7} {'encoder':>8} {'LLM':>6}"
        f" {'speedup of first':>17}"
    ]
    for r in shown:
        lines.append(
            f"{r.schedule.method:14} {r.makespan:10.5g} {r.makespan / r.ideal:8.3f} {r.timeline.bubble:7.1%}"
            f" {max(r.peak.encoder):8.3g} {max(r.peak.llm):6.3g} {r.makespan / first:16.2f}x"
        )
    return "\n".join(lines)


def _draw(shown: list[Report], png: Path | None, html: Path | None, trace: Path | None) -> None:
    if png is not None:
        from ultraep_compile.schedules.picture import draw_png

        with writing(png, "--png"):
            draw_png(shown, png)
    if html is not None:
        from ultraep_compile.schedules.page import page

        write_text(html, page(shown), "--html")
    if trace is not None:
        from ultraep_compile.schedules.trace import perfetto

        write_text(trace, json_module.dumps(perfetto(shown)), "--trace")
