"""The main job: an unmodified transformers MoE language model learns bytes of Python source, balanced and not, side by side.

Both copies start from the same weights and see the same batches; only one is compiled with `backend="ultraep"`. Balancing
never changes a result, so their losses stay together; what changes is how evenly the ranks are loaded.
"""

from __future__ import annotations

import copy
import functools
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultraep_compile.errors import OptionError
from ultraep_compile.local_processes import Send, run_local
from ultraep_compile.telemetry import Trace, get_recorder

VIRTUAL_RANKS = 8
BATCH, LENGTH = 8, 128
EXPERTS, TOP_K = 16, 2


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of the demo."""

    steps: int
    trace: str
    device: str = "cpu"
    inner: str = "aot_eager"
    ranks: int = VIRTUAL_RANKS
    slots: int = 2


@dataclass(slots=True)
class Progress:
    """What is shown after every step."""

    step: int
    loss: float
    loss_plain: float
    before: list[float]
    """Imbalance of each MoE layer as routed."""
    after: list[float]
    """Imbalance of each MoE layer as executed."""
    tokens_per_second: float
    tokens_per_second_plain: float


@dataclass(slots=True)
class Result:
    """A finished run."""

    losses: list[float] = field(default_factory=list)
    losses_plain: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    tokens_per_second_plain: float = 0.0

    @property
    def worst_difference(self) -> float:
        """Largest relative difference of the two losses over all steps."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, self.losses_plain, strict=True))


def source_bytes(limit: int = 4_000_000) -> Tensor:
    """The Python standard library's own source as bytes, uint8 [n]: real text that every machine has."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if len(text) < 10 * LENGTH:
        raise OptionError("the standard library's source is not installed here. Install Python with its .py files.")
    return torch.frombuffer(text, dtype=torch.uint8)


def batches(text: Tensor, steps: int) -> Iterator[Tensor]:
    """`steps` batches of token ids, int64 [BATCH, LENGTH], the same on every machine with the same text."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([text[s : s + LENGTH] for s in starts.tolist()]).long()


def build_model(*, auxiliary_loss: bool) -> nn.Module:
    """A Mixtral of CPU size with random weights, exactly as transformers makes it."""
    try:
        import transformers
    except ImportError as missing:
        raise OptionError("the demo needs transformers. Run: pip install 'ultraep-compile[hf]'") from missing
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=LENGTH,
        output_router_logits=auxiliary_loss,
        initializer_range=0.06,
    )
    return transformers.MixtralForCausalLM(config).train()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """One AdamW step; returns the loss."""
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # Gradients below eps count as small, so rounding noise in them is not blown up to full steps.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, foreach=False)


def run_virtual(settings: Settings, show: Callable[[Progress], None]) -> Result:
    """Train both copies over virtual ranks in this process."""
    from ultraep_compile.backend import ultraep
    from ultraep_compile.preparation import prepare

    plain = build_model(auxiliary_loss=True).to(settings.device)
    balanced = copy.deepcopy(plain)
    prepare(balanced, {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=settings.device)})
    options = {
        "ranks": settings.ranks,
        "redundant_experts": settings.slots,
        "inner": settings.inner,
        "trace": settings.trace,
    }
    balanced.compile(backend=functools.partial(ultraep, options=options))
    return _train(settings, balanced, plain, show, mean=lambda loss: loss, slice_of=lambda ids: ids)


def run_process(rank: int, settings: Settings, show: Callable[[Progress], None]) -> Result | None:
    """Train over the default process group: this rank's experts and its part of every batch. Rank 0 also trains the plain copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    from ultraep_compile.backend import ultraep
    from ultraep_compile.preparation import prepare
    from ultraep_compile.sharding import shard_experts

    world = dist.get_world_size()
    plain = build_model(auxiliary_loss=False)
    balanced = copy.deepcopy(plain)
    prepare(balanced, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    shard_experts(balanced, init_device_mesh("cpu", (world,)))
    options = {"redundant_experts": settings.slots, "inner": settings.inner, "trace": settings.trace}
    balanced.compile(backend=functools.partial(ultraep, options=options))
    parallel = DistributedDataParallel(balanced)

    def mean(loss: float) -> float:
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / world

    def slice_of(ids: Tensor) -> Tensor:
        return ids.chunk(world)[rank]

    return _train(settings, parallel, plain if rank == 0 else None, show, mean, slice_of)


def _train(
    settings: Settings,
    balanced: nn.Module,
    plain: nn.Module | None,
    show: Callable[[Progress], None],
    mean: Callable[[float], float],
    slice_of: Callable[[Tensor], Tensor],
) -> Result:
    optimizer = make_optimizer(balanced)
    optimizer_plain = make_optimizer(plain) if plain is not None else None
    result, seconds, seconds_plain = Result(), [], []
    tokens = BATCH * LENGTH
    for step, ids in enumerate(batches(source_bytes(), settings.steps)):
        ids = ids.to(settings.device)
        started = time.perf_counter()
        result.losses.append(mean(train_step(balanced, optimizer, slice_of(ids))))
        seconds.append(time.perf_counter() - started)
        if plain is None or optimizer_plain is None:
            continue
        started = time.perf_counter()
        result.losses_plain.append(train_step(plain, optimizer_plain, ids))
        seconds_plain.append(time.perf_counter() - started)
        before, after = _newest_imbalance(settings.trace)
        speed, speed_plain = tokens / _typical(seconds), tokens / _typical(seconds_plain)
        show(Progress(step, result.losses[-1], result.losses_plain[-1], before, after, speed, speed_plain))
    if seconds_plain:
        result.tokens_per_second = tokens / _typical(seconds)
        result.tokens_per_second_plain = tokens / _typical(seconds_plain)
    return result


def _typical(seconds: list[float]) -> float:
    """Median of the newest steps: the first ones compile."""
    return sorted(seconds[-50:])[len(seconds[-50:]) // 2]


def _newest_imbalance(trace: str) -> tuple[list[float], list[float]]:
    from ultraep_compile.telemetry.trace import imbalance_N

    layers = [layer for layer in get_recorder(trace).trace() if len(layer)]
    return (
        [float(imbalance_N(layer.before_NR[-1:])[0]) for layer in layers],
        [float(imbalance_N(layer.after_NR[-1:])[0]) for layer in layers],
    )


def _process(rank: int, send: Send, settings: Settings) -> Result | None:
    result = run_process(rank, settings, send if rank == 0 else lambda progress: None)
    if rank == 0:
        get_recorder(settings.trace).close()
    return result


def run_processes(settings: Settings, show: Callable[[Progress], None]) -> Result:
    """Train over `settings.ranks` local processes joined by gloo."""
    if BATCH % settings.ranks or EXPERTS % settings.ranks:
        fits = [n for n in range(2, BATCH + 1) if BATCH % n == 0 and EXPERTS % n == 0]
        raise OptionError(
            f"--processes {settings.ranks} does not divide the batch of {BATCH} and the {EXPERTS} experts. Use one of {fits}."
        )
    return run_local(settings.ranks, _process, (settings,), show)


def worst_where_reachable(trace: Trace) -> float:
    """Largest imbalance after balancing among the records whose lower bound is at most 1.02.

    Where the bound is higher, no plan could reach 1.02.
    """
    from ultraep_compile.telemetry.summary import all_columns

    worst = 1.0
    for column in all_columns(trace):
        reachable = ~(column["bound"] > 1.02)
        worst = max([worst, *column["after"][reachable].tolist()])
    return worst
