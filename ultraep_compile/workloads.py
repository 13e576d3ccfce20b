"""Synthetic loads: what routers do to experts, as counts [microbatches, ranks, experts], a pure function of a `Setting`.

`W0_balanced` to `W7_burst` each vary one thing and carry the names of Megatron-LM's token-imbalance benchmark (its
pull request 7488), so that figures can be set side by side; their counts are our own. The rest are the usual
distributions. All tokens choose K different experts, so that no expert has more rows of a rank than it has tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ultraep_compile.errors import OptionError, TopologyError, nearest

HEAT = 8.0  # how much more than others a hot expert is wanted
PERIOD = 4  # microbatches between two moves of the rotating hot spot, and between two bursts


@dataclass(frozen=True, slots=True)
class Setting:
    """What a workload is made for."""

    microbatches: int = 32
    ranks: int = 8
    experts: int = 64
    top_k: int = 8
    tokens: int = 4096
    """Tokens of a rank in a microbatch; on average, where they vary."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("microbatches", "ranks", "experts", "top_k", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}. Give a whole number, 1 or more.")
        if self.experts % self.ranks:
            raise TopologyError(
                f"{self.experts} experts cannot be divided over {self.ranks} ranks. "
                f"Choose a number of ranks that divides {self.experts}."
            )
        if self.top_k > self.experts:
            raise OptionError(f"top_k is {self.top_k} of {self.experts} experts. Give at most {self.experts}.")
        if self.microbatches * self.ranks * self.experts > 1 << 28:
            raise OptionError(
                f"{self.microbatches} microbatches of {self.ranks} x {self.experts} counts are more than 2 GiB. "
                "Ask for fewer microbatches."
            )

    @property
    def masters(self) -> int:
        """Experts of a rank."""
        return self.experts // self.ranks

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.microbatches, self.ranks, self.experts


# (setting, random numbers) -> how much each expert is wanted, broadcastable to [N, R, E], and tokens [N, R]
Workload = Callable[[Setting, Generator], tuple[NDArray, NDArray]]
WORKLOADS: dict[str, Workload] = {}


def workload(make: Workload) -> Workload:
    """Put a workload into `WORKLOADS` under its function's name."""
    WORKLOADS[make.__name__] = make
    return make


def generate(name: str, setting: Setting) -> NDArray[np.int64]:
    """int64 [N, R, E]: rows of each source rank for each expert; equal for equal names and settings."""
    if name not in WORKLOADS:
        raise OptionError(f"There is no workload {name!r}. {nearest(str(name), WORKLOADS)}")
    rng = np.random.default_rng([setting.seed, zlib.crc32(name.encode())])
    wanted, tokens_NR = WORKLOADS[name](setting, rng)
    inclusion = np.broadcast_to(inclusion_probability(wanted, setting.top_k), setting.shape)
    return _draw(inclusion, tokens_NR, setting.top_k, rng)


def inclusion_probability(wanted: NDArray, top_k: int) -> NDArray:
    """How likely a token's K different experts include each: 1 - exp(-x * wanted), x such that they sum to K.

    An expert that nobody wants (0) is never chosen, unless fewer than K are wanted; then all wanted ones are.
    """
    possible = (wanted > 0).sum(-1, keepdims=True)
    low, high = np.zeros_like(possible, dtype=float), np.full_like(possible, 1.0, dtype=float)
    for _ in range(200):
        short = (-np.expm1(-high * wanted)).sum(-1, keepdims=True) < np.minimum(top_k, possible - 1e-6)
        if not short.any():
            break
        high = np.where(short, 2 * high, high)
    for _ in range(60):
        middle = (low + high) / 2
        short = (-np.expm1(-middle * wanted)).sum(-1, keepdims=True) < top_k
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return -np.expm1(-high * wanted)


def _draw(inclusion_NRE: NDArray, tokens_NR: NDArray, top_k: int, rng: Generator) -> NDArray[np.int64]:
    """Binomial counts, then single rows added or taken at random until every rank has K rows a token."""
    if (inclusion_NRE == inclusion_NRE[..., :1]).all():  # even routing is dealt, not drawn
        return _dealt(tokens_NR * top_k, inclusion_NRE.shape[-1])
    counts_NRE = rng.binomial(tokens_NR[..., None], np.clip(inclusion_NRE, 0, 1))
    experts = counts_NRE.shape[-1]
    flat, tokens = counts_NRE.reshape(-1, experts), tokens_NR.ravel()
    likely = np.broadcast_to(inclusion_NRE, counts_NRE.shape).reshape(-1, experts)
    for row, count, chance in zip(flat, tokens.tolist(), likely, strict=True):
        missing = count * top_k - int(row.sum())
        while missing:
            room = np.where(chance > 0, count - row, 0) if missing > 0 else row.copy()
            if not room.any():  # fewer than K experts are wanted: the others fill in
                room = count - row
            step = min(abs(missing), int(room.sum()))
            row += np.sign(missing) * rng.multivariate_hypergeometric(room, step, method="marginals")
            missing = count * top_k - int(row.sum())
    return counts_NRE.astype(np.int64)


def _dealt(rows_NR: NDArray, experts: int) -> NDArray[np.int64]:
    """Each rank's rows dealt round and round over the experts, every rank beginning where the one before stopped."""
    end_NR = rows_NR.cumsum(-1)

    def got(dealt_NR: NDArray) -> NDArray:
        return (dealt_NR[..., None] - np.arange(experts) + experts - 1) // experts

    return got(end_NR) - got(end_NR - rows_NR)


def _even(setting: Setting) -> NDArray:
    return np.full((setting.microbatches, setting.ranks), setting.tokens)


def _ragged(setting: Setting, rng: Generator) -> NDArray:
    """Tokens between none and twice the mean; the first microbatch already differs."""
    return rng.integers(0, 2 * setting.tokens + 1, (setting.microbatches, setting.ranks))


def _hot(setting: Setting, experts: NDArray) -> NDArray:
    wanted_E = np.ones(setting.experts)
    wanted_E[experts] = HEAT
    return wanted_E


def _on_rank(setting: Setting, rank: int) -> NDArray:
    return np.arange(setting.masters) + rank * setting.masters


@workload
def W0_balanced(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """The control: every expert is wanted alike, and rows are dealt, not drawn."""
    return np.ones(setting.experts), _even(setting)


@workload
def W1_hot_expert_set(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Heat of experts: as many hot experts as a rank owns, wherever chance puts them."""
    return _hot(setting, rng.choice(setting.experts, setting.masters, replace=False)), _even(setting)


@workload
def W2_hot_rank(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Heat of a rank: the same number of hot experts, all on one rank."""
    return _hot(setting, _on_rank(setting, int(rng.integers(setting.ranks)))), _even(setting)


@workload
def W3_spread_hot_experts(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """The same heat spread: hot experts as far from each other as they go."""
    return _hot(setting, np.arange(setting.masters) * setting.experts // setting.masters), _even(setting)


@workload
def W4_source_ragged(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Even experts, uneven sources: ranks bring between no tokens and twice the mean."""
    return np.ones(setting.experts), _ragged(setting, rng)


@workload
def W5_zero_expert_rank(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Experts that nobody wants (a quarter of all, among them all of the last rank's), and a rank without tokens."""
    wanted_E, tokens_NR = np.ones(setting.experts), _even(setting)
    wanted_E[rng.choice(setting.experts, setting.experts // 4, replace=False)] = 0
    if setting.ranks > 1:
        wanted_E[_on_rank(setting, setting.ranks - 1)] = 0
        tokens_NR[:, 0] = 0
    return wanted_E, tokens_NR


@workload
def W6_rotating_hotspot(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """A hot rank that moves on every 4 microbatches: what plans on history miss."""
    hot_N = np.arange(setting.microbatches) // PERIOD % setting.ranks
    wanted_NE = np.stack([_hot(setting, _on_rank(setting, rank)) for rank in hot_N.tolist()])
    return wanted_NE[:, None], _even(setting)


@workload
def W7_burst(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Even, but every fourth microbatch has a hot rank: what a mean over steps hides."""
    wanted_NE = np.ones((setting.microbatches, setting.experts))
    wanted_NE[PERIOD - 1 :: PERIOD] = _hot(setting, _on_rank(setting, setting.ranks // 2))
    return wanted_NE[:, None], _even(setting)


@workload
def zipf(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """The n-th expert of a random order is wanted 1/n."""
    return 1 / (1.0 + rng.permutation(setting.experts)), _even(setting)


@workload
def dirichlet(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """A new Dirichlet(0.3) draw in each microbatch: a few hot experts, many cold ones, never the same."""
    return rng.dirichlet(np.full(setting.experts, 0.3), setting.microbatches)[:, None] + 1e-6, _even(setting)


@workload
def spike(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """One expert that nearly every token chooses; the others alike."""
    wanted_E = np.ones(setting.experts)
    wanted_E[int(rng.integers(setting.experts))] = 4.0 * setting.experts
    return wanted_E, _even(setting)


@workload
def ragged(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Zipf experts and uneven sources together."""
    return zipf(setting, rng)[0], _ragged(setting, rng)


@workload
def source_skew(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Every source rank has favourites of its own (a Dirichlet draw each): copies can keep tokens at home."""
    return rng.dirichlet(np.full(setting.experts, 0.3), setting.ranks)[None] + 1e-6, _even(setting)


@workload
def drift(setting: Setting, rng: Generator) -> tuple[NDArray, NDArray]:
    """Log-normal heat that wanders: each microbatch keeps 0.9 of the last one's logarithm and adds its own."""
    keep, scale = 0.9, 1.2
    log_NE = np.empty((setting.microbatches, setting.experts))
    log_NE[0] = scale * rng.normal(size=setting.experts)
    for n in range(1, setting.microbatches):
        log_NE[n] = keep * log_NE[n - 1] + np.sqrt(1 - keep**2) * scale * rng.normal(size=setting.experts)
    return np.exp(log_NE)[:, None], _even(setting)
