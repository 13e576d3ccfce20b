"""`ultraep-compile demo`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 120,
    processes: Annotated[int, typer.Option(min=1, help="Real processes over gloo instead of 8 virtual ranks.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the report and the trace.")] = Path("ultraep-demo"),
    device: Annotated[str, typer.Option(help="cpu or cuda (virtual ranks).")] = "cpu",
    inner: Annotated[str, typer.Option(help="Inner compiler: aot_eager, inductor or eager.")] = "aot_eager",
) -> None:
    """Train an unmodified MoE language model on Python's own source, balanced beside not balanced, and report."""
    import warnings

    from rich.console import Console

    from ultraep_compile import demo as job
    from ultraep_compile.telemetry import read_trace, summarize, write_report
    from ultraep_compile.telemetry.recorder import get_recorder

    warnings.filterwarnings("ignore", category=FutureWarning)
    out.mkdir(parents=True, exist_ok=True)
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
    with _Bar(console, steps) as bar:
        if processes > 1:
            result = job.run_processes(settings, out, bar.show)
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


class _Bar:
    """A progress bar with the numbers of the step."""

    def __init__(self, console, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("training"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        ]
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("compiling", total=steps)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, p) -> None:
        layers = "  ".join(f"{b:.2f}->{a:.2f}" for b, a in zip(p.before, p.after, strict=True))
        text = f"loss {p.loss:.4f} | {p.loss_plain:.4f}  imbalance {layers}  tokens/s {p.tokens_per_second:,.0f} | {p.tokens_per_second_plain:,.0f}"
        self.progress.update(self.task, completed=p.step + 1, description=text)
