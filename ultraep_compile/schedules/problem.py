"""A pipeline problem as a value: what must be computed, at which cost, within which memory.

Symbols, in this package:
  P  ranks of one pipeline        V  virtual stages per rank        S = P*V  stages of the language model
  (LLM)
  M  microbatches                 j  a microbatch, 0..M-1           s  a stage, 0..S-1

Costs are times in any one unit (seconds, or the forward of a stage). The LLM's costs are those of one
microbatch on one rank's share of the LLM; a virtual stage costs `stage_share[s]` of that. An encoder or
generator costs what one microbatch takes on one rank. A cost of 0 in an encoder or generator says that the
microbatch has no such work (a text-only microbatch): then it has no operation at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ultraep_compile.errors import ScheduleError

Costs = tuple[float, ...]
Items = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A modality encoder with its projector, held by every rank that is asked to run it."""

    forward: Costs  # [M]
    backward: Costs = ()  # [M]; empty or all 0: frozen, so that no backward exists
    items: Items = ()  # [M][any]: each image's or clip's share of its microbatch; empty: cannot be divided
    feeds: tuple[int, ...] = (0,)  # stages that read its output (cross-attention models: all of them)
    recompute: bool = False  # keeps its input only and runs its forward again inside its backward
    name: str = "encoder"

    @property
    def frozen(self) -> bool:
        return not any(self.backward)

    @property
    def mean_forward(self) -> float:
        """Mean forward cost of the microbatches that have any: the size of one `mean microbatch` of
        memory."""
        busy = [cost for cost in self.forward if cost > 0]
        return sum(busy) / len(busy) if busy else 0.0


@dataclass(frozen=True, slots=True)
class Generator:
    """A modality generator. Its forward is followed at once by its backward: its activations never wait."""

    cost: Costs  # [M] forward plus backward
    items: Items = ()  # [M][any]: each sample's share of its microbatch's cost; empty: cannot be divided
    name: str = "generator"

    @property
    def mean_cost(self) -> float:
        busy = [cost for cost in self.cost if cost > 0]
        return sum(busy) / len(busy) if busy else 0.0


@dataclass(frozen=True, slots=True)
class Caps:
    """Upper limits on what a rank may hold at once; None: no limit."""

    encoder: float | None = None  # microbatches of each encoder
    generator: float | None = None  # microbatches of each generator
    llm: tuple[float, ...] | None = None  # [P] stage activations (a virtual stage counts its share)


NO_CAPS = Caps()


@dataclass(frozen=True, slots=True)
class Problem:
    """One training step of one pipeline. Checked when made; immutable; hashable."""

    ranks: int
    microbatches: int
    llm_forward: Costs  # [M]
    llm_backward: Costs  # [M] input and weight part together
    encoders: tuple[Encoder, ...] = ()
    generators: tuple[Generator, ...] = ()
    stage_rank: tuple[int, ...] = ()  # [S] the rank of each stage; empty: stage s on rank s, S = P
    stage_share: tuple[float, ...] = ()  # [S] share of a rank's LLM cost; empty: all P/S
    input_share: float = 0.5  # part of a backward that computes the input's gradient, where it is split
    latency: float = 0.0  # from the end of an op to its use on another rank
    caps: Caps = NO_CAPS
    llm_recompute: bool = False  # a stage keeps its input only and runs its forward again in its backward

    def __post_init__(self) -> None:
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or self.ranks < 1:
            raise ScheduleError(f"A pipeline needs at least one stage, not {self.ranks!r}. Give stages >= 1.")
        if (
            isinstance(self.microbatches, bool)
            or not isinstance(self.microbatches, int)
            or self.microbatches < 1
        ):
            raise ScheduleError(
                f"A step needs at least one microbatch, not {self.microbatches!r}. Give microbatches >= 1."
            )
        if not self.stage_rank:
            object.__setattr__(self, "stage_rank", tuple(range(self.ranks)))
        if not self.stage_share:
            share = self.ranks / len(self.stage_rank)
            object.__setattr__(self, "stage_share", (share,) * len(self.stage_rank))
        _check_stages(self)
        _check_costs(self)

    @property
    def stages(self) -> int:
        return len(self.stage_rank)

    @property
    def has_encoder(self) -> bool:
        return any(any(e.forward) for e in self.encoders)

    @property
    def has_generator(self) -> bool:
        return any(any(g.cost) for g in self.generators)

    def llm_only(self) -> Problem:
        """The same problem without encoders, generators and limits."""
        return replace(self, encoders=(), generators=(), caps=NO_CAPS)

    def rank_stages(self, rank: int) -> list[int]:
        """The stages of a rank, first to last."""
        return [s for s, r in enumerate(self.stage_rank) if r == rank]

    def encoder_work(self) -> float:
        return sum(sum(e.forward) + sum(e.backward) for e in self.encoders)

    def generator_work(self) -> float:
        return sum(sum(g.cost) for g in self.generators)

    def llm_work(self) -> float:
        """Of all stages together."""
        return sum(self.stage_share) * (sum(self.llm_forward) + sum(self.llm_backward))


def uniform_problem(
    ranks: int,
    microbatches: int,
    llm: tuple[float, float] = (1.0, 2.0),
    encoder: tuple[float, float] | None = None,
    generator: float | None = None,
    **fields,
) -> Problem:
    """A problem whose microbatches all cost the same: (forward, backward) of the LLM per rank and of an
    encoder, forward plus backward of a generator. `fields` are further fields of Problem."""
    m = microbatches if isinstance(microbatches, int) and microbatches > 0 else 0
    encoders = () if encoder is None else (Encoder((encoder[0],) * m, (encoder[1],) * m),)
    generators = () if generator is None else (Generator((generator,) * m),)
    return Problem(ranks, microbatches, (llm[0],) * m, (llm[1],) * m, encoders, generators, **fields)


def items_from_sizes(sizes: Sequence[Sequence[float]], backward_ratio: float = 2.0, **fields) -> Encoder:
    """An encoder from the forward cost of each item (image, clip) of each microbatch."""
    forward = tuple(float(sum(row)) for row in sizes)
    shares = tuple(
        tuple(x / total for x in row) if total else () for row, total in zip(sizes, forward, strict=True)
    )
    return Encoder(forward, tuple(backward_ratio * f for f in forward), shares, **fields)


def place_virtual(problem: Problem, virtual: int, placement: str = "loop") -> Problem:
    """The problem with each rank's share of the LLM cut into `virtual` equal stages.

    `loop`: stage s on rank s mod P. `vee` (two virtual stages): 0..P-1 and back, so that rank 0 has the first
    and the last stage."""
    p = problem.ranks
    if isinstance(virtual, bool) or not isinstance(virtual, int) or virtual < 1:
        raise ScheduleError(f"A rank needs at least one virtual stage, not {virtual!r}. Give virtual >= 1.")
    if placement == "vee":
        ranks = tuple(range(p)) + tuple(reversed(range(p)))
    else:
        ranks = tuple(s % p for s in range(p * virtual))
    return replace(problem, stage_rank=ranks, stage_share=(p / len(ranks),) * len(ranks))


def _check_stages(problem: Problem) -> None:
    if len(problem.stage_share) != len(problem.stage_rank):
        raise ScheduleError(
            f"stage_share has {len(problem.stage_share)} entries for {len(problem.stage_rank)} stages."
            " Give one share per stage."
        )
    if any(not 0 <= r < problem.ranks for r in problem.stage_rank):
        raise ScheduleError(f"stage_rank {problem.stage_rank} names a rank outside 0..{problem.ranks - 1}.")
    check_costs("stage_share", problem.stage_share, problem.stages)
    if not 0 < problem.input_share < 1:
        raise ScheduleError(f"input_share must lie between 0 and 1, not {problem.input_share!r}.")
    check_costs("latency", (problem.latency,), 1)
    for encoder in problem.encoders:
        if not encoder.feeds or any(not 0 <= s < problem.stages for s in encoder.feeds):
            raise ScheduleError(
                f"Encoder {encoder.name!r} feeds stages {encoder.feeds}; there are stages"
                f" 0..{problem.stages - 1}. Name stages that exist."
            )
    caps = problem.caps
    for what, cap in (("encoder", caps.encoder), ("generator", caps.generator)):
        if cap is not None and not cap > 0:
            raise ScheduleError(
                f"No {what} can run in a memory of {cap!r} microbatches. Give a larger limit."
            )
    if caps.llm is not None and (len(caps.llm) != problem.ranks or any(not cap > 0 for cap in caps.llm)):
        raise ScheduleError(
            f"The LLM's memory limit {caps.llm} must be {problem.ranks} positive numbers of stage"
            " activations."
        )


def _check_costs(problem: Problem) -> None:
    m = problem.microbatches
    check_costs("llm_forward", problem.llm_forward, m)
    check_costs("llm_backward", problem.llm_backward, m)
    if not any(problem.llm_forward) or not any(problem.llm_backward):
        raise ScheduleError("The LLM's forward and backward cost nothing. Give positive LLM costs.")
    for encoder in problem.encoders:
        check_costs(f"{encoder.name}_forward", encoder.forward, m)
        if encoder.backward:
            check_costs(f"{encoder.name}_backward", encoder.backward, m)
        _check_items(encoder.name, encoder.items, encoder.forward)
        for j, (forward, backward) in enumerate(zip(encoder.forward, encoder.backward, strict=False)):
            if backward > 0 and forward == 0:
                raise ScheduleError(f"{encoder.name} has a backward but no forward for microbatch {j}.")
    for generator in problem.generators:
        check_costs(f"{generator.name}_cost", generator.cost, m)
        _check_items(generator.name, generator.items, generator.cost)


def check_costs(name: str, costs: Sequence[float], length: int) -> None:
    """Raise unless `costs` are `length` finite numbers, none negative."""
    if len(costs) != length:
        raise ScheduleError(f"{name} has {len(costs)} entries, not {length}. Give one per microbatch.")
    for j, cost in enumerate(costs):
        if (
            isinstance(cost, bool)
            or not isinstance(cost, (int, float))
            or not math.isfinite(cost)
            or cost < 0
        ):
            where = f"[{j}]" if length > 1 else ""
            raise ScheduleError(f"{name}{where} is {cost!r}. A cost must be a finite number >= 0.")


def _check_items(name: str, items: Items, costs: Costs) -> None:
    if not items:
        return
    if len(items) != len(costs):
        raise ScheduleError(f"{name} lists the items of {len(items)} microbatches, not of {len(costs)}.")
    for j, (shares, cost) in enumerate(zip(items, costs, strict=True)):
        check_costs(f"{name} items of microbatch {j}", shares, len(shares))
        if cost > 0 and not math.isclose(sum(shares), 1.0, rel_tol=1e-6):
            raise ScheduleError(
                f"{name}: the items of microbatch {j} are shares of its cost and must sum to 1,"
                f" not {sum(shares)!r}."
            )
