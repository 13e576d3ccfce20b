"""The time and memory of a balanced MoE layer under a plan, from formulas that are written once and printed as they are.

The formulas are sympy expressions in bytes, FLOPs and microseconds. `evaluate` gives them the loads of a plan, rank
by rank; a phase takes as long as its slowest rank, for each ends in a collective. `break_even` solves the same
expressions for the number of tokens from which on a plan pays. `explain` prints them.

Not modelled: choices of one token that meet on a rank and could travel once, weights that small batches read more
slowly than they multiply, and contention between copies and dispatch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy import And, Expr, Max, Piecewise, Symbol, ceiling, sqrt
from torch import Tensor

from ultraep_compile.errors import OptionError, nearest
from ultraep_compile.formulas import LayerCost, layer_cost
from ultraep_compile.planner.figures import by_home, copies_of
from ultraep_compile.planner.plan import Plan, quotas


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank attains; measure your own and load them with `Rates.load`."""

    gemm_tflops: float = 550.0
    """A whole expert (gate and up, activation, down) in bf16 on an H100: 538 to 586 measured, 65536 rows, 64 experts."""

    tile_rows: int = 128
    """Rows of a tile of the grouped product: an expert's rows are rounded up to it."""

    memory_gbs: float = 2758.0
    """Bytes read plus bytes written by a copy inside a device, H100 80GB HBM3, measured."""

    dispatch_gbs: float = 206.0
    """Rows between ranks of a domain, each way: NCCL all-to-all over NVLink, two H100s, measured."""

    network_gbs: float = 50.0
    """Rows between domains, each way: one 400 Gb/s link per rank. Nominal, not measured."""

    copy_gbs: float = 350.0
    """Weights pushed to a peer in the domain: 332 to 385 measured over NVLink between two H100s (NCCL: 206)."""

    reduce_gbs: float = 206.0
    """Gradients of copies on their way to the master: NCCL all-to-all, measured (one kernel that pulls and adds in a
    fixed order on 42 SMs, as UltraEP has it: 73)."""

    relay_from: int = 0
    """An expert with so many copies is passed on by some of them, as in a tree of depth two; 0: its owner sends all."""

    plan_us: float = 20.0
    """From top-k ids to a finished plan, per layer and microbatch; planners on history do without."""

    exposed: float = 1.0
    """Share of the time of copies that nothing hides. 0.4 was measured beside a product; 1 is the safe side."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = 0.0 if field.name in ("plan_us", "exposed", "relay_from") else 1e-9
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1e12:
                kind = "a number >= 0" if not low else "a positive number"
                raise OptionError(f"The rate {field.name!r} is {value!r}. Give {kind} in the unit of its name.")

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Rates from a JSON object; names left out keep their defaults."""
        try:
            given = json.loads(path.read_text())
        except OSError as error:
            raise OptionError(f"{path} cannot be read: {error.strerror or error}. Give a JSON file of rates.") from None
        except ValueError as error:
            raise OptionError(f"{path} is no JSON ({error}). Write an object such as {{\"copy_gbs\": 350}}.") from None
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, dict):
            raise OptionError(f"{path} holds no JSON object. Write an object such as {{\"copy_gbs\": 350}}.")
        for name in given:
            if name not in known:
                raise OptionError(f"{path}: there is no rate {name!r}. {nearest(name, known)}")
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Layer:
    """Sizes of one MoE layer. Bytes are of one row, or of one expert."""

    top_k: int
    row_bytes: int
    """A token's row on its way to an expert, and as much on the way back."""
    flops_per_row: int
    """Forward; backward takes twice as many."""
    expert_bytes: int
    """Weights that travel for a copy."""
    gradient_bytes: int
    """Gradients that travel back for a copy: in the dtype of the weights."""
    kept_bytes: int = 0
    """Of one row, kept for backward."""

    @classmethod
    def gated(cls, width: int, ffn: int, top_k: int, value_bytes: int = 2) -> Layer:
        """Experts of three matrices (gate, up, down) of width x ffn.

        Example: width 4096, ffn 1536 in bf16: 37.7 MB an expert.
        """
        weights = 3 * width * ffn
        size = value_bytes * weights
        return cls(top_k, value_bytes * width, 2 * weights, size, size, 3 * value_bytes * ffn)

    @classmethod
    def of_facts(cls, facts: Mapping[str, int], otherwise: Layer) -> Layer:
        """From what a recorder knows of a layer (top_k, row_bytes, expert_bytes, flops_per_row); gaps from `otherwise`.

        What backward keeps of a row follows from these: the inner width, once for every matrix.
        """
        names = ("top_k", "row_bytes", "flops_per_row", "expert_bytes")
        known = dataclasses.replace(otherwise, **{name: int(facts[name]) for name in names if facts.get(name)})
        if not facts.get("expert_bytes"):
            return known
        value_bytes = 2 * known.expert_bytes / known.flops_per_row  # two FLOPs for every weight
        kept = value_bytes * known.expert_bytes / known.row_bytes
        return dataclasses.replace(known, gradient_bytes=known.expert_bytes, kept_bytes=round(kept))


def _symbols(names: str) -> list[Symbol]:
    return [Symbol(name, nonnegative=True) for name in names.split()]


# of one physical expert, and of one rank
q, n, N = _symbols("q n N")
stay, out, back, out_far, back_far = _symbols("stay out in out_far in_far")
sends, sent, got = _symbols("sends copies_out copies_in")
# of the layer, and the rates
tile = Symbol("tile", positive=True)
flops, row, expert, gradient = _symbols("flops_per_row row_bytes expert_bytes gradient_bytes")
gemm_rate, memory_rate, dispatch_rate, network_rate, copy_rate, reduce_rate = (
    Symbol(name, positive=True) for name in "gemm_tflops memory_gbs dispatch_gbs network_gbs copy_gbs reduce_gbs".split()
)
plan_us, exposed, relay_from = _symbols("plan_us exposed relay_from")

COUNTED = {"sends", "copies_out", "copies_in"}  # do not grow with the tokens

MEANING = {
    "q": "rows of one physical expert",
    "n": "copies of one expert",
    "N": "padded rows of a rank: the sum over its experts",
    "stay": "rows that stay on the rank",
    "out, in": "rows sent to and received from other ranks of the domain",
    "out_far, in_far": "rows sent to and received from other domains",
    "sends": "how often the rank sends an expert's weights: the sum over its experts",
    "copies_out": "copies of the rank's experts elsewhere: its fan-out",
    "copies_in": "copies in the rank's slots",
}

ROWS: Expr = tile * ceiling(q / tile)
"""Padded rows of one physical expert."""

SENDS: Expr = Piecewise((ceiling(sqrt(n)), And(relay_from > 0, n >= relay_from)), (n, True))
"""How often an owner sends one expert: to every copy, or to the square root of them, which pass it on."""

FORMULAS: dict[str, Expr] = {
    "gemm": N * flops / (gemm_rate * 10**6),
    "exchange": 2
    * row
    * (2 * stay / memory_rate + Max(out, back) / dispatch_rate + Max(out_far, back_far) / network_rate)
    / 10**3,
    "replicate": exposed * expert * Max(sends, got) / (copy_rate * 10**3),
    "reduce": exposed * gradient * Max(sent, got) / (reduce_rate * 10**3),
    "plan": plan_us,
}
"""Microseconds of each phase on one rank: forward products; dispatch and combine; copying; adding up gradients."""

PHASES: dict[str, dict[str, int]] = {
    "forward": {"gemm": 1, "exchange": 1, "replicate": 1, "reduce": 0, "plan": 1},
    "train": {"gemm": 3, "exchange": 2, "replicate": 2, "reduce": 1, "plan": 1},
}
"""How often each phase occurs in a step of a layer; backward replicates again, because slots are shared by layers."""


@dataclass(frozen=True, slots=True)
class Loads:
    """What a plan asks of each rank, in rows and copies; all arrays [R]."""

    rows: NDArray  # padded to tiles
    real_rows: NDArray
    stay: NDArray
    out: NDArray
    back: NDArray
    out_far: NDArray
    back_far: NDArray
    sends: NDArray
    copies_out: NDArray
    copies_in: NDArray

    @classmethod
    def of(cls, plan: Plan, rates: Rates, domain: int | None = None) -> Loads:
        """Read off a plan; `domain` ranks share the fast links (None: all of them)."""
        ranks = plan.slot_expert_RS.shape[0]
        quota_RL = quotas(plan).cpu().numpy().reshape(ranks, -1)
        traffic_RR = plan.shares_RP.cpu().numpy().astype(np.int64).reshape(ranks, ranks, -1).sum(-1)
        near_RR = np.equal.outer(*[np.arange(ranks) // (domain or ranks)] * 2)
        far_RR, near_RR = traffic_RR * ~near_RR, traffic_RR * near_RR
        stay_R = traffic_RR.diagonal()
        copies_E = copies_of(plan)
        sends_E = _function(SENDS)(n=copies_E, relay_from=np.full_like(copies_E, rates.relay_from))
        return cls(
            rows=_function(ROWS)(q=quota_RL, tile=rates.tile_rows).sum(1),
            real_rows=quota_RL.sum(1),
            stay=stay_R,
            out=near_RR.sum(1) - stay_R,
            back=near_RR.sum(0) - stay_R,
            out_far=far_RR.sum(1),
            back_far=far_RR.sum(0),
            sends=by_home(plan, sends_E),
            copies_out=by_home(plan, copies_E),
            copies_in=(plan.slot_expert_RS >= 0).sum(1).cpu().numpy(),
        )

    def numbers(self) -> dict[str, NDArray]:
        """By the symbols of the formulas."""
        return {
            "N": self.rows, "sends": self.sends, "stay": self.stay, "out": self.out, "in": self.back, "out_far": self.out_far,
            "in_far": self.back_far, "copies_out": self.copies_out, "copies_in": self.copies_in,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepTime:
    """Microseconds of one layer and microbatch: each phase as often as it occurs, and their sum."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def occurrences(phase: str = "train", planned: bool = True, history: int = 0) -> dict[str, float]:
    """How often each of `FORMULAS` occurs in a step of a layer.

    Without a plan in the step (`planned=False`, or copies placed on `history` microbatches) none is waited for.
    Copies that stay for `history` microbatches travel once in that time; in training they are renewed once a step,
    for the weights have changed, and are still there in backward.
    """
    times: dict[str, float] = dict(PHASES[phase])
    if history or not planned:
        times["plan"] = 0
    if history:
        times["replicate"] = 1 if phase == "train" else 1 / history
    return times


def evaluate(loads: Loads, layer: Layer, rates: Rates, times: Mapping[str, float]) -> StepTime:
    """Time of one layer and microbatch; `times` from `occurrences`."""
    constants = _constants(layer, rates)
    parts = {}
    for name, count in times.items():
        per_rank = _function(FORMULAS[name])(**constants, **loads.numbers())
        parts[name] = count * float(np.max(per_rank))
    return StepTime(parts)


def copy_tokens(layer: Layer, rates: Rates, phase: str = "train") -> int:
    """Rows that a rank receives and computes in the time of one copy: N of the planner `quota:N`.

    From the formulas, for one copy more into or out of the slowest rank (with half a tile of padding) and one row more.

    >>> copy_tokens(Layer.gated(4096, 1536, 8), Rates())
    1129
    """
    nothing = dict.fromkeys(Loads.__dataclass_fields__, np.zeros(1))
    times = occurrences(phase, planned=False)
    copy = Loads(**nothing | {"rows": np.array([rates.tile_rows / 2]), "sends": np.ones(1), "copies_out": np.ones(1)})
    row = Loads(**nothing | {"rows": np.ones(1), "back": np.ones(1)})
    of_copy, of_row = (evaluate(loads, layer, rates, times).total for loads in (copy, row))
    return round(of_copy / of_row)


def break_even(
    before: Loads, after: Loads, layer: Layer, rates: Rates, times: Mapping[str, float]
) -> float | None:
    """Tokens per rank and microbatch from which on `after` is faster than `before`; None if it never is.

    Solved from the formulas: every number of rows is that of the plan, scaled to t tokens a rank, and tiles are
    left out; copies stay as many as the plan has.
    """
    t = Symbol("t", positive=True)
    tokens = max(float(before.real_rows.mean()), 1e-9) / layer.top_k
    constants = _constants(layer, rates)
    totals = []
    for loads, often in ((before, {**times, "plan": 0}), (after, times)):
        numbers = loads.numbers() | {"N": loads.real_rows}
        total = sympy.Integer(0)
        for name, count in often.items():
            values = dict(constants)
            busiest = int(np.argmax(_function(FORMULAS[name])(**values, **numbers) + np.zeros(len(loads.rows))))
            for symbol, column in numbers.items():
                here = sympy.Float(float(column[busiest]))
                values[symbol] = here if symbol in COUNTED else here * t / tokens
            total += count * FORMULAS[name].subs({s: values[str(s)] for s in FORMULAS[name].free_symbols})
        totals.append(total)
    gain = sympy.expand(totals[0] - totals[1])  # a*t - b
    slope, cost = float(gain.coeff(t, 1)), -float(gain.coeff(t, 0))
    if cost <= 0:
        return 0.0 if slope >= 0 else None
    if slope <= 0:
        return None
    (root,) = sympy.solve(gain, t)
    return float(root)


def memory_formulas(layer: Layer, experts: int) -> LayerCost:
    """Bytes of slots and of dispatch buffers, as formulas over tokens, ranks and slots."""
    return layer_cost(
        experts=experts,
        top_k=layer.top_k,
        flops_per_row=layer.flops_per_row,
        row_bytes=layer.row_bytes,
        out_bytes=layer.row_bytes,
        kept_bytes=layer.kept_bytes,
        expert_bytes=layer.expert_bytes,
    )


def memory(layer: Layer, experts: int, tokens: int, ranks: int, slots: int) -> dict[str, int]:
    """Bytes on one rank: `slots`, which all layers share, and dispatch `buffers`; `tokens` are of all ranks."""
    at = memory_formulas(layer, experts).at(tokens, ranks, slots)
    return {"slots": at["slot_bytes"], "buffers": at["buffer_bytes"]}


def traffic(loads: Loads, layer: Layer) -> dict[str, int]:
    """Bytes of a forward pass over all ranks: rows there and back by link, and weights of copies."""
    near, far = int(loads.out.sum()), int(loads.out_far.sum())
    return {
        "domain_bytes": 2 * near * layer.row_bytes,
        "network_bytes": 2 * far * layer.row_bytes,
        "copy_bytes": int(loads.copies_in.sum()) * layer.expert_bytes,
    }


def explain(layer: Layer, rates: Rates, phase: str = "train") -> str:
    """The formulas, what their symbols mean, and the numbers that are put in."""
    lines = ["microseconds of one layer and microbatch on a rank; the slowest rank counts in each phase"]
    lines.append(f"  {'rows':10} = {ROWS}, of one physical expert")
    lines.append(f"  {'sends':10} = {SENDS}, of one expert")
    lines += [f"  {name:10} = {formula}" for name, formula in FORMULAS.items()]
    terms = [name if times == 1 else f"{times}*{name}" for name, times in PHASES[phase].items() if times]
    lines.append(f"  {phase:10} = {' + '.join(terms)}")
    lines += ["where", *(f"  {name:16} {text}" for name, text in MEANING.items())]
    lines += ["with", *(f"  {name:16} {value:g}" for name, value in _constants(layer, rates).items())]
    return "\n".join(lines)


def _constants(layer: Layer, rates: Rates) -> dict[str, Any]:
    values = dataclasses.asdict(rates) | dataclasses.asdict(layer)
    values["tile"] = values["tile_rows"]
    return {str(s): values[str(s)] for s in sorted(_constant_symbols(), key=str)}


@cache
def _constant_symbols() -> frozenset[sympy.Basic]:
    used = set().union(*(f.free_symbols for f in (*FORMULAS.values(), ROWS, SENDS)))
    return frozenset(used - {q, n, N, sends, stay, out, back, out_far, back_far, sent, got})


@cache
def _compiled(formula: Expr) -> tuple[list[str], Any]:
    symbols = sorted(formula.free_symbols, key=str)
    plain = sympy.symbols(f"x:{len(symbols)}", nonnegative=True)  # `in` is no name of a Python argument
    return [str(s) for s in symbols], sympy.lambdify(plain, formula.subs(dict(zip(symbols, plain, strict=True))), "numpy")


def _function(formula: Expr) -> Any:
    """The formula as a function of its symbols by name, over arrays; names that it lacks are ignored."""
    names, function = _compiled(formula)
    return lambda **values: function(*(values[name] for name in names))


def of_counts(counts_RE: Tensor, rates: Rates, domain: int | None = None) -> Loads:
    """The loads without copies: every row goes to its expert's master."""
    from ultraep_compile.planner import make_plan

    return Loads.of(make_plan(counts_RE, 0, "none"), rates, domain)
