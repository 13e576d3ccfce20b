"""Estimated costs of transformers, as formulas over symbolic sizes that print, and the plan they lead to.

Symbols (sympy, all positive): t tokens of a microbatch, D width, A width of all query heads, K width of all
key (or value) heads, F width of the feed-forward network, k experts per token (1 if dense), e experts, c
context length of a token, L layers, b bytes of an activation. Profiled costs need none of this: put them into
a Problem directly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ultraep_compile.schedules.auto import Choice, balanced_stages, choose
from ultraep_compile.schedules.problem import Encoder, Generator, Problem, place_virtual
from ultraep_compile.schedules.simulate import Peaks


@dataclass(frozen=True, slots=True)
class Transformer:
    """Sizes of a stack of pre-norm blocks with gated feed-forward networks and fused attention."""

    layers: int
    width: int
    ffn: int
    query_width: int = 0  # 0: width
    key_width: int = 0  # 0: query_width
    experts: int = 1
    top_k: int = 1
    vocabulary: int = 0  # 0: no embedding and head

    def sizes(self) -> dict[str, int]:
        query = self.query_width or self.width
        return {
            "D": self.width,
            "A": query,
            "K": self.key_width or query,
            "F": self.ffn,
            "k": self.top_k,
            "e": self.experts,
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """One rank."""

    memory: float  # bytes for parameters, optimizer state and activations
    flops: float  # attained FLOP/s, not peak
    latency: float = 0.0  # seconds per hop
    activation_bytes: int = 2
    parameter_bytes: float = (
        16.0  # per parameter: bf16 weight and gradient, fp32 master weight and two Adam moments
    )


@cache
def formulas() -> Mapping[str, Any]:
    """The formulas, one layer and one microbatch each.

    forward_flops: two per multiply-add of the projections (q, k, v, output; gate, up, down) and of causal
    attention. activation_bytes: what autograd keeps: both norms' inputs and outputs, q, k, v, the attention's
    output, the residual's input, and gate, up and their product for every expert of a token."""
    import sympy

    t, d, a, k_width, f, k, e, c, b = sympy.symbols("t D A K F k e c b", positive=True)
    attention = 2 * t * (d * (2 * a + 2 * k_width)) + 2 * t * c * a
    return {
        "forward_flops": sympy.expand(attention + 6 * t * k * d * f),
        "backward_flops": sympy.expand(2 * (attention + 6 * t * k * d * f)),
        "parameters": sympy.expand(d * (2 * a + 2 * k_width) + 3 * e * d * f + 2 * d),
        "activation_bytes": sympy.expand(b * t * (5 * d + 2 * a + 2 * k_width + 3 * k * f)),
        "boundary_bytes": b * t * d,
    }


@cache
def rank_memory() -> Any:
    """Bytes on the fullest rank: p bytes per parameter of the stage's N_llm and the replicated N_enc and
    N_gen, s stage activations of a_llm, m_enc and m_gen microbatches of a_enc and a_gen, two feature buffers
    of f."""
    import sympy

    p, n_llm, n_enc, n_gen = sympy.symbols("p N_llm N_enc N_gen", nonnegative=True)
    s, a_llm, m_enc, a_enc, m_gen, a_gen, f = sympy.symbols(
        "s a_llm m_enc a_enc m_gen a_gen f", nonnegative=True
    )
    return p * (n_llm + n_enc + n_gen) + s * a_llm + m_enc * a_enc + m_gen * a_gen + 2 * f


@cache
def _compiled(name: str) -> tuple[tuple[str, ...], Any]:
    """A formula's symbols, by name, and the formula as a function of their values."""
    import sympy

    formula = rank_memory() if name == "rank_memory" else formulas()[name]
    symbols = sorted(formula.free_symbols, key=str)
    return tuple(map(str, symbols)), sympy.lambdify(symbols, formula, "math")


def _evaluate(name: str, numbers: Mapping[str, float]) -> float:
    symbols, function = _compiled(name)
    return float(function(*(numbers[symbol] for symbol in symbols)))


def value(name: str, model: Transformer, tokens: float, context: float, activation_bytes: int = 2) -> float:
    """One formula as a number. `context`: mean number of tokens that a token attends to."""
    return _evaluate(name, {**model.sizes(), "t": tokens, "c": context, "b": activation_bytes})


def explain(model: Transformer, tokens: float, context: float) -> str:
    """The formulas and their values for one layer of a model."""
    lines = []
    for name, formula in formulas().items():
        lines.append(f"{name:17} = {formula} = {value(name, model, tokens, context):.4g}")
    return "\n".join(lines)


def estimate(
    llm: Transformer,
    ranks: int,
    microbatches: int,
    tokens: int,
    machine: Machine,
    encoder: tuple[Transformer, int] | None = None,
    generator: tuple[Transformer, int] | None = None,
) -> Problem:
    """The problem, in seconds, of a model with equal stages; `tokens` of the LLM in a microbatch; encoder and
    generator with their own tokens per microbatch."""

    def seconds(model: Transformer, count: int) -> float:
        return model.layers * value("forward_flops", model, count, count / 2) / machine.flops

    forward = (seconds(llm, tokens) + _head_flops(llm, tokens) / machine.flops) / ranks
    encoders: tuple[Encoder, ...] = ()
    if encoder:
        cost = seconds(*encoder)
        encoders = (Encoder((cost,) * microbatches, (2 * cost,) * microbatches),)
    generators = (Generator((3 * seconds(*generator),) * microbatches),) if generator else ()
    row = (forward,) * microbatches
    twice = (2 * forward,) * microbatches
    return Problem(ranks, microbatches, row, twice, encoders, generators, latency=machine.latency)


def choose_for(
    llm: Transformer,
    ranks: int,
    microbatches: int,
    tokens: int,
    machine: Machine,
    encoder: tuple[Transformer, int] | None = None,
    generator: tuple[Transformer, int] | None = None,
) -> Choice:
    """Base schedule, virtual stages, encoder memory, generator groups and stage boundaries for a model and a
    memory.

    Stages hold whole layers; embedding and head count as part of the first and last layer.
    """
    problem = estimate(llm, ranks, microbatches, tokens, machine, encoder, generator)
    layer = value("forward_flops", llm, tokens, tokens / 2)
    costs = [layer] * llm.layers
    costs[-1] += _head_flops(llm, tokens)
    used: dict[tuple[int, ...], list[range]] = {}

    def stages(base: str, virtual: int) -> Problem:
        parts = balanced_stages(costs, ranks * virtual)
        shares = tuple(sum(costs[i] for i in part) / sum(costs) * ranks for part in parts)
        cut = place_virtual(problem, virtual, "vee" if base == "dualpipev" else "loop")
        used[cut.stage_rank] = parts
        return replace(cut, stage_share=shares)

    def fits(cut: Problem, peak: Peaks) -> str:
        need = _bytes_needed(llm, tokens, machine, encoder, generator, used[cut.stage_rank], cut, peak)
        if need <= machine.memory:
            return ""
        return f"needs {need / 2**30:.3g} GiB of {machine.memory / 2**30:.3g} GiB"

    choice = choose(problem, None, float(3 * ranks), stages, fits)
    bounds = ", ".join(f"{p.start}-{p.stop - 1}" for p in used[choice.problem.stage_rank])
    return replace(choice, schedule=replace(choice.schedule, note=f"{choice.schedule.note}, layers {bounds}"))


def _head_flops(llm: Transformer, tokens: int) -> float:
    return 2.0 * tokens * llm.width * llm.vocabulary


def _bytes_needed(
    llm: Transformer,
    tokens: int,
    machine: Machine,
    encoder: tuple[Transformer, int] | None,
    generator: tuple[Transformer, int] | None,
    parts: list[range],
    cut: Problem,
    peak: Peaks,
) -> float:
    """rank_memory() for the fullest rank."""

    def stack(name: str, unit: tuple[Transformer, int] | None) -> float:
        if unit is None:
            return 0.0
        return unit[0].layers * value(name, unit[0], unit[1], unit[1] / 2, machine.activation_bytes)

    worst = 0.0
    per_layer = value("activation_bytes", llm, tokens, tokens / 2, machine.activation_bytes)
    for r in range(cut.ranks):
        layers = sum(len(parts[s]) for s in cut.rank_stages(r))
        ends = sum(s in (0, cut.stages - 1) for s in cut.rank_stages(r))  # embedding, head
        weights = layers * value("parameters", llm, 1, 1) + ends * llm.vocabulary * llm.width
        mine = sum(cut.stage_share[s] for s in cut.rank_stages(r))
        numbers = {
            "p": machine.parameter_bytes,
            "N_llm": weights,
            "N_enc": stack("parameters", encoder),
            "N_gen": stack("parameters", generator),
            "s": peak.llm[r] / mine,
            "a_llm": layers * per_layer,
            "m_enc": peak.encoder[r],
            "a_enc": stack("activation_bytes", encoder),
            "m_gen": peak.generator[r],
            "a_gen": stack("activation_bytes", generator),
            "f": value("boundary_bytes", llm, tokens, 1, machine.activation_bytes),
        }
        worst = max(worst, _evaluate("rank_memory", numbers))
    return worst
