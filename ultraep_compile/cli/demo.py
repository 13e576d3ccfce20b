"""`ultraep-compile demo`"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ultraep_compile.cli.output import make_folder
from ultraep_compile.errors import OptionError, nearest

DEFAULT_STEPS, DEFAULT_STEPS_MULTIMODAL, DEFAULT_PROCESSES_MULTIMODAL = 120, 250, 4


def demo(
    steps: Annotated[
        int | None,
        typer.Option(min=1, help=f"Training steps: {DEFAULT_STEPS}, or {DEFAULT_STEPS_MULTIMODAL} with --multimodal."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Real processes over gloo instead of 8 virtual ranks; {DEFAULT_PROCESSES_MULTIMODAL} with --multimodal."
        ),
    ] = None,
    multimodal: Annotated[
        bool, typer.Option("--multimodal", help="A vision-language model reads digits, as a nested pipeline.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the report and the trace.")] = Path("ultraep-demo"),
    device: Annotated[str, typer.Option(help="cpu or cuda (virtual ranks).")] = "cpu",
    inner: Annotated[str, typer.Option(help="Inner compiler: aot_eager, inductor or eager.")] = "aot_eager",
) -> None:
    """Train an unmodified MoE language model on Python's own source, balanced beside not balanced, and report."""
    if multimodal:
        if device != "cpu" or inner != "aot_eager":
            raise OptionError("demo --multimodal runs on the CPU and compiles nothing. Leave --device and --inner out.")
        _multimodal(steps or DEFAULT_STEPS_MULTIMODAL, processes or DEFAULT_PROCESSES_MULTIMODAL, out)
    else:
        _experts(steps or DEFAULT_STEPS, processes or 1, out, device, inner)


def _experts(steps: int, processes: int, out: Path, device: str, inner: str) -> None:
    import warnings

    from rich.console import Console

    from ultraep_compile import demo as job
    from ultraep_compile.config import INNER_BACKENDS
    from ultraep_compile.telemetry import read_trace, summarize, write_report
    from ultraep_compile.telemetry.recorder import get_recorder

    warnings.filterwarnings("ignore", category=FutureWarning)
    _check_device(device)
    if inner not in INNER_BACKENDS:
        raise OptionError(f"--inner is {inner!r}. {nearest(inner, INNER_BACKENDS)}")
    make_folder(out, "--out")
    trace_file = out / "trace.npz"
    trace_file.unlink(missing_ok=True)
    ranks = processes if processes > 1 else job.VIRTUAL_RANKS
    settings = job.Settings(steps=steps, trace=str(trace_file), device=device, inner=inner, ranks=ranks)
    console = Console()
    kind = f"{processes} processes (gloo)" if processes > 1 else f"{ranks} virtual ranks"
    console.print(
        f"Mixtral with {job.EXPERTS} experts, top-{job.TOP_K}, over {kind}, {settings.slots} redundant experts a rank; {steps} steps on {device}"
    )
    started = time.perf_counter()
    with _Bar(console, steps, _experts_text) as bar:
        if processes > 1:
            result = job.run_processes(settings, bar.show)
        else:
            result = job.run_virtual(settings, bar.show)
            get_recorder(settings.trace).close()
    elapsed = time.perf_counter() - started
    trace = read_trace(trace_file)
    loads = summarize(trace).loads
    worst = job.worst_where_reachable(trace)
    notes = [
        f"run: {job.EXPERTS} experts, top-{job.TOP_K}, {kind}, {settings.slots} redundant experts a rank, {steps} steps, {elapsed:.0f} s",
        f"imbalance: median {loads.before_p50:.3f} before, {loads.after_p50:.3f} after, worst {loads.after_max:.3f} after; no plan could beat {loads.lower_bound:.3f} (median bound)",
        f"loss: {result.losses[-1]:.4f} balanced, {result.losses_plain[-1]:.4f} without; largest relative difference over all steps {result.worst_difference:.1e}",
        f"tokens/s: {result.tokens_per_second:,.0f} balanced, {result.tokens_per_second_plain:,.0f} without (one machine plays all ranks, so this shows overhead, not the gain)",
    ]
    report = out / "report.html"
    x = list(range(steps))
    curves = {"loss: balanced": (x, result.losses), "loss: without": (x, result.losses_plain)}
    write_report(trace, report, title="ultraep_compile demo", curves=curves, notes=notes)
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"imbalance where 2 slots a rank allow 1.02: worst {worst:.3f}", highlight=False)
    console.print(f"report: {report}\ntrace:  {trace_file}", highlight=False)


def _experts_text(p: Any) -> str:
    layers = "  ".join(f"{b:.2f}->{a:.2f}" for b, a in zip(p.before, p.after, strict=True))
    speeds = f"{p.tokens_per_second:,.0f} | {p.tokens_per_second_plain:,.0f}"
    return f"loss {p.loss:.4f} | {p.loss_plain:.4f}  imbalance {layers}  tokens/s {speeds}"


def _multimodal(steps: int, processes: int, out: Path) -> None:
    import json

    from rich.console import Console

    from ultraep_compile import demo_multimodal as job
    from ultraep_compile.demo_page import demo_page
    from ultraep_compile.executor.timeline import trace
    from ultraep_compile.html import write_page

    settings = job.Settings(steps, processes)
    make_folder(out, "--out")
    console = Console()
    console.print(
        f"LLaVA (CLIP and Llama) reads scikit-learn's digits over {processes} processes (gloo),"
        f" {settings.microbatches} microbatches a step; {steps} steps"
    )
    started = time.perf_counter()
    with _Bar(console, steps, _multimodal_text) as bar:
        result = job.run(settings, bar.show)
    summary = job.summary(settings, result, time.perf_counter() - started)
    write_page(demo_page(result, [summary]), out / "report.html")
    (out / "trace.json").write_text(json.dumps(trace(*result.shown)))
    console.print(result.explanation, highlight=False)
    console.print(summary, highlight=False)
    console.print(f"report: {out / 'report.html'}\ntrace:  {out / 'trace.json'} (ui.perfetto.dev)", highlight=False)


def _multimodal_text(p: Any) -> str:
    single = "" if p.loss_single is None else f" | {p.loss_single:.4f} in one process"
    accuracy = "" if p.accuracy is None else f"  accuracy {p.accuracy:.1%}"
    encoder, llm = (" ".join(f"{n / 1e6:.1f}" for n in row) for row in (p.encoder_bytes, p.llm_bytes))
    return f"loss {p.loss:.4f}{single}{accuracy}  peak MB by rank: encoder {encoder}, LLM {llm}"


def _check_device(name: str) -> None:
    """Refuse a device that this machine does not have."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device is {name!r}, which torch does not know. Give cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device is {name!r}. The demo runs on cpu or cuda: give one of them.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(
            f"--device is {name!r}, but torch sees {count} CUDA device(s) here. Leave --device out to run on the CPU; "
            "`ultraep-compile doctor` lists what there is."
        )


class _Bar:
    """A progress bar with the numbers of the step."""

    def __init__(self, console: Any, steps: int, text: Callable[[Any], str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("training"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        ]
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("preparing", total=steps)
        self.text = text

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, p: Any) -> None:
        self.progress.update(self.task, completed=p.step + 1, description=self.text(p))
