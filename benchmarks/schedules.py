"""Nested pipeline schedules measured against bounds and baselines, all by simulation, on one CPU core.

    python -m benchmarks.schedules NAME [--problems N]      NAME: uniform, generator, uneven, robust, sweep,
                                                            mutations, time, choice, or all

Every schedule is validated (operations, order, memory, messages, deadlock) before its makespan is used.
Tables go to benchmarks/results/schedules/NAME.md and to the screen. Costs: a stage's forward is 1, its
backward 2; an encoder's share is its forward plus backward over the whole LLM's (`of the LLM`) or one stage's
(`of a stage`)."""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import hypothesis
import networkx
from rich.progress import track

from tests.schedules.mutations import MESSAGE_MUTATIONS, MUTATIONS, programs_of
from tests.schedules.problems import (
    Contest,
    check_memory_asked,
    check_plan,
    contest_problem,
    contests,
    lognormal_items,
    random_problem,
)
from ultraep_compile.errors import ScheduleError
from ultraep_compile.executor.planning import Planner
from ultraep_compile.executor.settings import Settings
from ultraep_compile.schedules.actions import Schedule
from ultraep_compile.schedules.auto import choose
from ultraep_compile.schedules.bounds import capped_bound, ideal, lower_bound
from ultraep_compile.schedules.nested import Rule, forget_bases, nest
from ultraep_compile.schedules.plan import METHODS, plan, plan_many
from ultraep_compile.schedules.problem import Problem, place_virtual, uniform_problem
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate

RESULTS = Path(__file__).parent / "results" / "schedules"
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def sound(schedule: Schedule) -> Schedule:
    validate(schedule)
    return schedule


def makespan(schedule: Schedule) -> float:
    return simulate(schedule).makespan


def with_encoder(p: int, m: int, share: float, of_all: bool = True, generator: float | None = None) -> Problem:
    cost = share * 3 * (p if of_all else 1)
    made = None if generator is None else generator * 3 * p
    return uniform_problem(p, m, encoder=(cost / 3, 2 * cost / 3), generator=made)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def uniform() -> str:
    """Equal costs: plain against ideal, filled against both bounds, peaks, and the same peaks with 64 P
    microbatches."""
    rows, worst = [], Counter()
    grid = [(p, n, s, a) for p in (4, 8, 16) for n in (2, 4, 8) for s in SHARES for a in (True, False)]
    for p, n, share, of_all in track(grid, "uniform"):
        problem = with_encoder(p, n * p, share, of_all)
        plain, filled = sound(nest(problem, Rule(fill=0))), sound(plan(problem))
        mean = capped_bound(problem, 2, filled.caps.llm or (), whole=False)
        whole = capped_bound(problem, 2, filled.caps.llm or ())
        peak = peaks(filled)
        time_plain, time_filled = makespan(plain) / ideal(problem), makespan(filled)
        assert max(peak.encoder) == 2 and peak.llm == tuple(float(p - r) for r in range(p))
        assert time_plain <= 1 + 1e-9
        key = "M = 2P" if n == 2 else "M >= 4P"
        worst[f"{key}, mean bound"] = max(worst[f"{key}, mean bound"], time_filled / mean)
        worst[f"{key}, whole-number bound"] = max(worst[f"{key}, whole-number bound"], time_filled / whole)
        kind = "of the LLM" if of_all else "of a stage"
        ratios = (time_plain, time_filled / ideal(problem), time_filled / mean, time_filled / whole)
        rows.append((p, n * p, f"{share} {kind}", *ratios, int(max(peak.encoder)), int(max(peak.llm))))
    flat = []
    for p in (4, 8, 16):
        few, many = (peaks(plan(with_encoder(p, n * p, 0.3))) for n in (2, 64))
        assert few == many
        flat.append(
            f"P = {p}: encoder {max(few.encoder):g}, LLM {max(few.llm):g}, the same for M = {2 * p} and {64 * p}"
        )
    head = (
        "P",
        "M",
        "encoder",
        "plain / ideal",
        "filled / ideal",
        "/ mean bound",
        "/ whole bound",
        "encoder",
        "LLM",
    )
    lines = [f"Largest ratio of filled to the capped bound, {k}: {v:.4f}" for k, v in sorted(worst.items())]
    return "\n\n".join(["\n".join(f"* {x}" for x in lines + flat), table(head, rows)])


def generator() -> str:
    """Generators: every group size, time against the ideal, and what each rank holds."""
    rows = []
    for p, n in ((4, 4), (8, 2), (8, 4), (8, 8), (16, 4)):
        for made in (0.1, 0.3, 0.6):
            problem = with_encoder(p, n * p, 0.3, generator=made)
            row: list[object] = [p, n * p, made]
            for q in (p, p // 2, 2, 1):
                schedule = sound(plan(problem, generator_group=q))
                peak = peaks(schedule)
                lag = q if q == p else q + 1
                assert peak.llm == tuple(float(min(n * p, p - r + lag - 1)) for r in range(p))
                assert max(peak.generator) <= q / p
                cell = f"{makespan(schedule) / ideal(problem):.3f} ({max(peak.llm):g}, {max(peak.encoder):g})"
                row.append(cell)
            for method in ("colocated", "uneven", "disttrain"):
                row.append(makespan(sound(plan(problem, method))) / ideal(problem))
            rows.append(row)
    head = ("P", "M", "generator", "q = P", "q = P/2", "q = 2", "q = 1", "co-located", "uneven", "disttrain")
    told = "Encoder 0.3 of the LLM. Cells: makespan / ideal (LLM stage activations, encoder microbatches held)."
    return f"{told}\n\n{table(head, rows)}"


def uneven() -> str:
    """Lognormal items: nested by items, by whole microbatches and all baselines; times against
    ideal(load)."""
    rows, worst = [], {"time": 0.0, "peak": 0.0, "faster": []}
    grid = [
        (p, n, s, cv, k)
        for p, n in ((8, 4), (8, 8))
        for s in (0.1, 0.3, 0.6)
        for cv in (0, 0.3, 0.6, 1.0, 1.5)
        for k in (4, 8)
    ]
    for p, n, share, cv, items in track(grid, "uneven"):
        seen: dict[str, list[float]] = {}
        dear = []
        for seed in range(3):
            encoder = lognormal_items(p, n * p, cv, share, items, seed)
            problem = Problem(p, n * p, (1.0,) * (n * p), (2.0,) * (n * p), (encoder,))
            best = makespan(sound(plan(problem)))
            dear.append(
                max(f * max(i) for f, i in zip(encoder.forward, encoder.items, strict=True)) / encoder.mean_forward
            )
            for method in METHODS:
                schedule = sound(plan(problem, method))
                seen.setdefault(method, []).append(makespan(schedule) / ideal(problem))
                seen.setdefault(f"{method} peak", []).append(max(peaks(schedule).encoder_load))
                if method != "nested":
                    worst["faster"].append((makespan(schedule) / best, method))
        top = [(t, k, d) for t, k, d in zip(seen["nested"], seen["nested peak"], dear, strict=True)]
        if max(dear) <= 2.5:
            worst["time"] = max(worst["time"], max(t for t, *_ in top))
            worst["peak"] = max(worst["peak"], max(k for _, k, _ in top))
        cells = [f"{max(seen[m]):.3f} ({max(seen[m + ' peak']):.1f})" for m in METHODS]
        rows.append((p, n * p, share, cv, items, f"{max(dear):.1f}", *cells))
    head = ("P", "M", "encoder", "CV", "items", "dearest item", *METHODS)
    told = [
        "Largest of 3 seeds: makespan / ideal(load) (peak on a rank, mean microbatches). `dearest item`: in"
        " mean microbatches; one that is larger than a slot costs its time and memory wherever it runs.",
        f"Nested where no item exceeds 2.5 mean microbatches: at most {worst['time']:.3f} x ideal(load), peak"
        f" {worst['peak']:.2f} = {worst['peak'] / 2:.2f} c.",
    ]
    for method in METHODS[1:]:
        gains = sorted(g for g, m in worst["faster"] if m == method)
        told.append(f"{method} / nested: {gains[0]:.2f} to {gains[-1]:.2f}, median {statistics.median(gains):.2f}")
    return "\n".join(f"* {x}" for x in told) + "\n\n" + table(head, rows)


def robust() -> str:
    """Latency and noise: against unlimited memory under the same conditions."""
    rows = []
    for latency in (0.0, 0.05, 0.1, 0.25, 0.5):
        for noise in (0.0, 0.05, 0.1, 0.2):
            row: list[object] = [latency, noise]
            for base, v in (("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)):
                problem = place_virtual(uniform_problem(8, 32, encoder=(2.4, 4.8), latency=latency), v)
                ours, free = sound(plan(problem, base=base)), sound(plan(problem, "encoder-first", base))
                times = [(simulate(ours, noise, s).makespan, simulate(free, noise, s).makespan) for s in range(20)]
                row.append(statistics.mean(a / b for a, b in times))
            rows.append(row)
    head = ("latency", "noise", "1f1b", "interleaved, V = 2", "zero-bubble")
    told = "P = 8, M = 32, encoder 0.3 of the LLM; nested / encoder-first, mean of 20 draws."
    return f"{told}\n\n{table(head, rows)}"


def sweep(problems: int) -> str:
    """Random problems: plan, validate, hold against promised memory and against co-location."""
    kinds: Counter[str] = Counter()
    failures = []
    for seed in track(range(problems), "sweep"):
        problem, rule = random_problem(seed)
        kinds[f"base {rule.base}"] += 1
        kinds["with a generator"] += problem.has_generator
        kinds["several encoders"] += len(problem.encoders) > 1
        kinds["with items"] += any(e.items for e in problem.encoders)
        kinds["frozen encoder"] += any(e.frozen for e in problem.encoders)
        kinds["features into several or later stages"] += any(e.feeds != (0,) for e in problem.encoders)
        kinds["text-only microbatches"] += any(0 in e.forward for e in problem.encoders)
        kinds["M not a multiple of P"] += bool(problem.microbatches % problem.ranks)
        kinds["latency"] += problem.latency > 0
        kinds["uneven LLM costs"] += len(set(problem.llm_forward)) > 1
        compared = problem.microbatches >= 2 * problem.ranks and not problem.latency and not rule.generator_group
        kinds["compared with co-location"] += compared
        try:
            check_plan(problem, rule)
        except (AssertionError, ScheduleError) as error:
            failures.append(f"seed {seed}: {str(error).splitlines()[0]}")
    told = [
        f"{problems} problems, {len(failures)} failures (invalid, deadlocked, above promised memory, or"
        " slower than co-location where M >= 2P, there is no latency and no generator group was asked for)",
        *failures,
    ]
    return "\n".join(f"* {x}" for x in told) + "\n\n" + table(("problems", "number"), sorted(kinds.items()))


def _contest(seed: int) -> tuple[list[Contest], list[tuple[bool, int, bool]]]:
    """One problem: against every method, and whether it fits into 1 to 4 whole microbatches."""
    problem, base = contest_problem(seed)
    results = list(contests(problem, base))
    assert all(result.held <= result.memory + 1e-6 for result in results), (seed, results)
    items = bool(problem.encoders[0].items)
    return results, [(items, memory, check_memory_asked(problem, base, memory)) for memory in (1, 2, 3, 4)]


def contest(problems: int = 200) -> str:
    """Nested against every other method in the memory that the other one takes, and within whole numbers of microbatches."""
    seen: dict[str, list[Contest]] = {}
    fits: Counter[tuple[bool, int, bool]] = Counter()
    with ProcessPoolExecutor() as pool:
        for results, fitted in track(pool.map(_contest, range(problems)), "contest", total=problems):
            fits.update(fitted)
            for result in results:
                seen.setdefault(result.method, []).append(result)
    rows, slower = [], 0
    for method, results in seen.items():
        ratios = [r.ratio for r in results if r.ratio]
        slower += sum(ratio > 1.005 for ratio in ratios)
        numbers = (min(ratios), statistics.median(ratios), max(ratios)) if ratios else ("", "", "")
        rows.append((method, len(results), len(results) - len(ratios), *numbers))
    told = [
        "`nested / other`: makespans, nested with the encoder memory that the other method takes, and with the LLM memory"
        " that it takes on any rank (at least what nested's base schedule holds). `refused`: less memory than any nested"
        " schedule takes, said with the least possible. recompute: both recompute the encoder.",
        f"{problems} problems: {slower} times more than 0.5% slower; no limit was exceeded, every plan is proven.",
    ]
    first = table(("other", "problems", "refused", "least", "median nested / other", "most"), rows)
    kinds = [
        ("items" if items else "whole", memory, fits[items, memory, True], fits[items, memory, False])
        for items in (False, True)
        for memory in (1, 2, 3, 4)
    ]
    second = table(("microbatches", "encoder memory", "planned within it", "refused with the least possible"), kinds)
    return "\n".join(f"* {x}" for x in told) + f"\n\n{first}\n\n{second}"


def mutations(problems: int = 300) -> str:
    """Broken schedules and broken message orders of random problems: every one must be refused."""
    rows = []
    plans = [plan(random_problem(s)[0], base=random_problem(s)[1].base) for s in track(range(problems), "plans")]
    for mutate in MUTATIONS:
        made = refused = 0
        for seed, schedule in enumerate(plans):
            if len(schedule.ranks) == 1:
                continue
            broken = mutate(schedule, random.Random(seed))
            if broken is not None:
                made += 1
                refused += _refuses(lambda broken=broken: validate(broken))
        rows.append((mutate.__name__.replace("_", " "), made, refused))
    schedule = nest(uniform_problem(4, 12, encoder=(1, 2), generator=2.0))
    for mutate in MESSAGE_MUTATIONS:
        refused = 0
        for seed in range(problems):
            programs = programs_of(schedule)
            mutate(programs, random.Random(seed))
            refused += _refuses(lambda programs=programs: validate(schedule, tuple(map(tuple, programs))))
        rows.append((f"messages: {mutate.__name__.replace('_', ' ')}", problems, refused))
    assert all(made == refused for _, made, refused in rows), rows
    return table(("mutation", "made", "refused"), rows)


def _refuses(check: Callable[[], object]) -> bool:
    try:
        check()
    except ScheduleError:
        return True
    return False


def time_planning() -> str:
    """CPU time of planning: cold (nothing cached), warm (another pipeline of the job was planned before), and of the proof;
    of a step's new ragged batch, planned, proven and lowered."""
    rows = []
    sizes = ((4, 16), (8, 64), (16, 128), (16, 256), (32, 512), (64, 1024), (64, 4096))
    for p, m in sizes:
        items = lognormal_items(p, m, 0.6, 0.3, 8, 0)
        cases = {
            "encoder": with_encoder(p, m, 0.3),
            "encoder and generator": with_encoder(p, m, 0.3, generator=0.3),
            "uneven microbatches": Problem(p, m, (1.0,) * m, (2.0,) * m, (replace(items, items=()),)),
            "uneven items": Problem(p, m, (1.0,) * m, (2.0,) * m, (items,)),
        }
        for name, problem in cases.items():
            cold, warm, proof = [], [], []
            schedule = None
            for _ in range(15 if p <= 8 else 3 if m <= 512 else 1):
                forget_bases()
                schedule = None
                cold.append(_seconds(lambda problem=problem: plan(problem)))
                warm.append(_seconds(lambda problem=problem: plan(problem)))
                schedule = plan(problem)
                proof.append(_seconds(lambda schedule=schedule: validate(schedule)))
            assert schedule is not None
            count = sum(map(len, schedule.ranks))
            ms = [1e3 * statistics.median(x) for x in (cold, warm, proof)]
            rows.append((p, m, name, count, *ms, 1e3 * max(cold), 1e3 * (ms[0] + ms[2]) / count))
    steps = []
    for memory in (None, 4):
        took = []
        for seed in range(15):
            whole = replace(lognormal_items(8, 64, 0.6, 0.3, 4, seed), items=())
            problem = Problem(8, 64, (1.0,) * 64, (2.0,) * 64, (whole,))
            planner = Planner(Settings(64, encoder_memory=memory), 3)
            took.append(1e3 * _seconds(lambda planner=planner, problem=problem: planner.program(problem)))
        steps.append(f"encoder_memory={memory}: median {statistics.median(took):.0f} ms, slowest {max(took):.0f} ms")
    head = ("P", "M", "problem", "operations", "cold ms", "warm ms", "proof ms", "slowest ms", "us per operation")
    job = [Problem(8, 64, (1.0,) * 64, (2.0,) * 64, (lognormal_items(8, 64, 0.6, 0.3, 8, s),)) for s in range(320)]
    forget_bases()
    start = time.process_time()
    plans = plan_many(job)
    took = time.process_time() - start
    for schedule in plans[::40]:
        validate(schedule)
    told = f"CPU time. 2560 GPUs as 320 pipelines of P = 8, M = 64, each with its own items: {took:.2f} s."
    told += f" A new ragged batch inside a step, P = 8, M = 64: {'; '.join(steps)}."
    return f"{told}\n\n{table(head, rows)}"


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def choice() -> str:
    """What automatic choice takes as the memory for LLM activations grows, and why."""
    parts = []
    for limit in (9, 10, 16):
        picked = choose(with_encoder(8, 32, 0.3, generator=0.1), 3, float(limit))
        validate(picked.schedule)
        parts.append(f"### {limit} stage activations, 3 encoder microbatches\n\n```\n{picked.why()}\n```")
    return "\n\n".join(parts)


def baselines() -> str:
    """Equal costs, every method: makespan / ideal (encoder peak), and how much faster nested is."""
    rows = []
    for p, n, share, of_all in (
        (4, 4, 0.3, False),
        (8, 4, 0.1, True),
        (8, 4, 0.3, True),
        (8, 8, 0.3, True),
        (16, 4, 0.3, True),
    ):
        problem = with_encoder(p, n * p, share, of_all)
        made = {m: sound(plan(problem, m)) for m in METHODS}
        ours = makespan(made["nested"])
        cells = [
            f"{makespan(s) / ideal(problem):.3f} ({max(peaks(s).encoder):g}) {makespan(s) / ours:.2f}x"
            for s in made.values()
        ]
        rows.append(
            (
                p,
                n * p,
                f"{share} of {'the LLM' if of_all else 'a stage'}",
                lower_bound(problem) / ideal(problem),
                *cells,
            )
        )
    told = "Cells: makespan / ideal (encoder microbatches on a rank), and how many times as long as nested."
    return f"{told}\n\n{table(('P', 'M', 'encoder', 'lower bound', *METHODS), rows)}"


def machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, networkx"
        f" {networkx.__version__}, hypothesis {hypothesis.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = (
        "uniform",
        "baselines",
        "generator",
        "uneven",
        "robust",
        "sweep",
        "contest",
        "mutations",
        "time",
        "choice",
    )
    parser.add_argument("name", choices=(*commands, "all"))
    parser.add_argument("--problems", type=int, default=10_000, help="of the sweep")
    parser.add_argument("--contests", type=int, default=200, help="problems of the contest")
    options = parser.parse_args()
    functions: dict[str, Callable[[], str]] = {
        "uniform": uniform,
        "baselines": baselines,
        "generator": generator,
        "uneven": uneven,
        "robust": robust,
        "sweep": lambda: sweep(options.problems),
        "contest": lambda: contest(options.contests),
        "mutations": mutations,
        "time": time_planning,
        "choice": choice,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in commands if options.name == "all" else (options.name,):
        start = time.perf_counter()
        body = functions[name]()
        took = time.perf_counter() - start
        text = f"# {name}\n\n`python -m benchmarks.schedules {name}`: {machine()}; {took:.0f} s.\n\n{body}\n"
        (RESULTS / f"{name}.md").write_text(text)
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
