"""`ultraep-compile plan`: plan load matrices from a file and say how good the plans are."""

from __future__ import annotations

import json as json_module
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ultraep_compile.errors import LoadsError, OptionError, TopologyError, UltraEPError, nearest

REPEATS = 3  # `microseconds` is the fastest of so many plans
EXACT_LIMIT = 400  # ranks x experts that the exact optimum is attempted for


def plan(
    loads: Annotated[Path, typer.Argument(help="An .npz of int arrays [ranks, experts], a row per source rank.")],
    redundant_experts: Annotated[int, typer.Option(help="Slots per rank for copies of experts.")],
    domain: Annotated[
        int | None, typer.Option(help="Consecutive ranks that copies never leave, e.g. 8 for NVLink in a node.")
    ] = None,
    planner: Annotated[str, typer.Option(help="quota (or quota:N, a copy costs N tokens), greedy, eplb, lplb, none or ideal.")] = "quota",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry per array.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write instances and shares to this .npz.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Add the exact optimum of small cases (MILP).")] = False,
    rehome: Annotated[
        bool, typer.Option("--rehome", help="First deal the experts over domains and ranks anew, for these very loads.")
    ] = False,
) -> None:
    """Plan recorded loads: imbalance before and after, what no plan can beat, copies, traffic and time."""
    from ultraep_compile.loads_file import read_loads

    _check(planner, domain, out)
    cases = read_loads(loads)
    rows, tables = [], {}
    for name, counts in _progress(cases):
        row, table = _case(name, counts, redundant_experts, planner, domain, exact, rehome)
        rows.append(row)
        tables |= table
    if out is not None:
        _write(out, tables)
    if json:
        typer.echo(json_module.dumps(rows, indent=2))
    else:
        _print_table(rows, planner, redundant_experts, domain)
        if out is not None:
            typer.echo(f"wrote {out}", err=True)


def _check(planner: str, domain: int | None, out: Path | None) -> None:
    from ultraep_compile.planner import PLANNERS
    from ultraep_compile.planner.registry import IDEAL, split_name

    known = [*PLANNERS, IDEAL]
    if split_name(planner)[0] not in known:
        raise OptionError(f"There is no planner {planner!r}. {nearest(planner, known)}")
    if domain is not None and domain < 1:
        raise OptionError(f"--domain is {domain}. Give the number of ranks in a domain, 1 or more.")
    if out is not None and planner == IDEAL:
        raise OptionError(
            "--planner ideal shows what even counts would cost and makes no plan of the counts in the file, so there "
            "is nothing to write. Drop --out or choose another planner."
        )
    if out is not None and not out.resolve().parent.is_dir():
        raise OptionError(f"{out} cannot be written: there is no directory {out.parent}. Create it first.")


def _case(
    name: str, counts: Any, slots: int, planner: str, domain: int | None, exact: bool, rehome: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON entry of one array, and its part of PLAN.npz."""
    import torch

    from ultraep_compile.planner import imbalance, loads_before, lower_bound, make_plan
    from ultraep_compile.planner.figures import plan_figures, plan_table
    from ultraep_compile.planner.homes import in_order, spread_homes
    from ultraep_compile.planner.ideal import forced_counts
    from ultraep_compile.planner.registry import IDEAL

    given_RE = torch.from_numpy(counts)
    ideal = planner == IDEAL
    if domain is not None and counts.shape[0] % domain:
        raise TopologyError(
            f"Array {name!r}: --domain {domain} does not divide its {counts.shape[0]} ranks. "
            f"Choose a divisor of {counts.shape[0]}."
        )
    try:
        order_E = spread_homes(given_RE, domain) if rehome else torch.arange(counts.shape[1])
        moved_RE = in_order(given_RE, order_E)
        counts_RE = forced_counts(moved_RE) if ideal else moved_RE
        best = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter_ns()
            made = make_plan(counts_RE, slots, "none" if ideal else planner, domain=domain)
            best = min(best, (time.perf_counter_ns() - start) / 1e3)
        bound = lower_bound(counts_RE, slots, domain)
    except UltraEPError as error:
        raise LoadsError(f"Array {name!r}: {error}") from None
    figures = plan_figures(counts_RE, made) | {"before": imbalance(loads_before(given_RE))}
    row = {"name": name, "before": figures["before"], "after": figures["after"], "lower_bound": bound}
    row |= {key: figures[key] for key in ("replicas", "max_ingress", "max_egress", "remote_share")}
    row["microseconds"] = 0.0 if ideal else round(best, 1)
    if exact:
        row["optimum"] = _optimum(moved_RE.numpy(), slots, domain)
    if rehome:
        row["lower_bound_at_home"] = lower_bound(given_RE, slots, domain)
    if ideal:
        return row, {}
    instances, shares = plan_table(made)
    instances[:, 0] = order_E.numpy()[instances[:, 0]]
    homes = {f"{name}/homes": order_E.int().numpy()} if rehome else {}
    return row, {f"{name}/instances": instances, f"{name}/shares": shares, **homes}


def _optimum(counts: Any, slots: int, domain: int | None) -> float | None:
    """The lowest max/mean of any plan; None where it is too large a problem or takes too long."""
    from ultraep_compile.planner.optimum import optimal_max_load

    ranks, experts = counts.shape
    size, total = domain or ranks, int(counts.sum())
    if size * (experts // ranks) * size > EXACT_LIMIT:
        return None
    worst = 0
    for loads in counts.sum(0).reshape(-1, experts // ranks * size):
        found = optimal_max_load(loads, size, slots)
        if found is None:
            return None
        worst = max(worst, found)
    return worst * ranks / total if total else 1.0


def _progress(cases: dict[str, Any]) -> Any:
    """The cases, with a bar on standard error where somebody watches."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = {"console": console, "transient": True, "disable": not console.is_terminal}
    return track(cases.items(), "planning", total=len(cases), **shown)


def _print_table(rows: list[dict[str, Any]], planner: str, slots: int, domain: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f", domains of {domain} ranks" if domain else ""
    table = Table(title=f"planner {planner}, {slots} slots a rank{where}; imbalance is max/mean of the ranks' loads")
    table.add_column("loads", no_wrap=True)
    rehomed, exact = "lower_bound_at_home" in rows[0], "optimum" in rows[0]
    heads = ["before", *(["no plan below"] if rehomed else []), "after", f"no plan below{', rehomed' if rehomed else ''}"]
    heads += ["optimum"] if exact else []
    for head in [*heads, "copies", "into one rank", "from one rank", "rows that leave", "µs"]:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [f"{row['before']:.3f}", *([f"{row['lower_bound_at_home']:.4f}"] if rehomed else [])]
        cells += [f"{row['after']:.4f}", f"{row['lower_bound']:.4f}"]
        if exact:
            cells.append("-" if row["optimum"] is None else f"{row['optimum']:.4f}")
        cells += [str(row["replicas"]), str(row["max_ingress"]), str(row["max_egress"]), f"{row['remote_share']:.1%}"]
        table.add_row(row["name"], *cells, f"{row['microseconds']:.0f}")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    console.print(table)


def _write(out: Path, tables: dict[str, Any]) -> None:
    """All arrays in one step: a reader sees the old file or the new one, never a part."""
    import numpy as np

    part = Path(f"{out.resolve()}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            np.savez_compressed(file, **tables)
        os.replace(part, out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OptionError(f"{out} cannot be written: {error.strerror or error}. Choose another --out.") from None
