"""The proof: a new forward against the module's own, outputs and gradients, on batches of several sizes and routings."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ultraep_compile.errors import UltraEPError
from ultraep_compile.ladder.probes import resized
from ultraep_compile.ladder.recording import Call, Planted, Recording, author_forward, record
from ultraep_compile.ladder.together import ALONE, Ranks, local
from ultraep_compile.passes.lift.faults import ModelFault, is_theirs, run_theirs, told
from ultraep_compile.passes.lift.values import Refusal

log = logging.getLogger(__name__)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
SEEDS = (1, 2, 3)


class NoDropout(TorchFunctionMode):
    """Dropout as in eval: random draws in another order are no difference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else (kwargs or {})["input"]
        return run_theirs(func, *args, **(kwargs or {}))


@contextlib.contextmanager
def in_mode(owner: nn.Module, training: bool) -> Iterator[None]:
    before = {m: m.training for m in owner.modules()}
    owner.train(training)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def check(
    owner: nn.Module,
    function: Callable,
    call: Call,
    leads: list[tuple[int, ...]],
    seeds: tuple[int, ...] = SEEDS,
    ranks: Ranks = ALONE,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Outputs and gradients of the new forward against the module's own, on batches of several sizes and routings.

    Of a layer that several ranks run, each has tokens of its own, and compares what it gets and the gradients of what it holds.

    Args:
        dtype: in which the experts compute, perhaps a less precise one than that of outputs and parameters.
    Returns: why the module has no gradients of its own (then outputs agree, and nothing is known beyond); "" for one that has.
    Raises: Refusal that says what differs.
    """
    probes = [(lead, seed, False) for lead, seed in zip(leads, itertools.cycle(seeds), strict=False)]
    checked = 0
    without, failed = [], ""
    skewed_ones = [*((leads[0], seed, True) for seed in seeds), (leads[-1], seeds[0], True)]
    for index, (lead, seed, skewed) in enumerate([*probes, *skewed_ones]):
        together = index == len(probes)  # for once, the tokens of all ranks go to the same experts
        batch = resized(call, lead, 100 + seed, skewed=skewed, rank=0 if together else ranks.rank)
        gradients = True
        try:
            try:
                old = _step(owner, _own(owner), batch, seed)
            except ModelFault as fault:  # an inference-only forward fails in backward, or where gradients are recorded
                gradients = False
                old = _step(owner, _own(owner), batch, seed, gradients=False)
                without.append(str(fault))
        except ModelFault as fault:
            log.debug("the module itself takes no batch of %s tokens", lead, exc_info=fault)
            failed = failed or str(fault)
            continue
        checked += 1
        new = _new_step(owner, function, batch, seed, gradients=gradients)
        ranks.agreed(lambda old=old, new=new: _compare(old, new, dtype))
    if checked < _FEWEST:
        raise Refusal(f"its own forward fails on all but one or two probe batches: {failed}")
    return without[0] if len(without) == checked else ""


_FEWEST = 3
"""Batches that the module itself must take for a proof."""


def agrees_when_planted(
    owner: nn.Module,
    function: Callable,
    recording: Recording,
    planted: Planted,
    ranks: Ranks = ALONE,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Do the module's own forward and a new one still give the same when a tensor that the forward makes is overwritten?

    Args:
        function: the new forward, with the same planted in it.
    """

    def own(*args: Any, **kwargs: Any) -> Any:
        return record(owner, Call(args, kwargs), recording.leaves, planted=planted, live=True).result

    try:
        old = _step(owner, own, recording.call, 0)
        new = _new_step(owner, function, recording.call, 0)
        ranks.agreed(lambda: _compare(old, new, dtype))
    except Refusal as reason:
        log.debug("planted: %s", reason)
        return False
    return True


def _own(owner: nn.Module) -> Callable:
    author = author_forward(owner)
    return lambda *args, **kwargs: run_theirs(author, owner, *args, **kwargs)


def _new_step(
    owner: nn.Module, function: Callable, batch: Call, seed: int, *, gradients: bool = True
) -> dict[str, Tensor]:
    """A step of a new forward. It is a proposal, which sizes and values of another batch may refute; names and types may not."""
    try:
        return _step(owner, lambda *a, **k: function(owner, *Call(a, k).inputs()), batch, seed, gradients=gradients)
    except Refusal:
        raise
    except (RuntimeError, IndexError, ValueError, UltraEPError) as error:
        raise Refusal(f"the replayed forward fails on another batch: {type(error).__name__} {error}") from error
    except Exception as error:
        if is_theirs(error):  # a module that it calls
            raise Refusal(f"the replayed forward fails on another batch: {told(error)}") from error
        raise


def _step(
    owner: nn.Module, run: Callable, batch: Call, seed: int, *, gradients: bool = True
) -> dict[str, Tensor]:
    """Outputs, buffers and, if wanted, gradients of one step; random state and buffers are afterwards as they were.

    Raises: ModelFault where what `run` has called by `run_theirs` raises, or the backward of it.
    """
    leaves = [t.detach().clone().requires_grad_(gradients and t.is_floating_point()) for t in batch.tensors()]
    fresh = batch.with_tensors([t.clone() if t.is_floating_point() else t for t in leaves])
    kept = [(b, b.detach().clone()) for b in owner.buffers()]
    devices = sorted({p.device.index or 0 for p in owner.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), NoDropout(), torch.set_grad_enabled(gradients):
            torch.manual_seed(seed)
            result = run(*fresh.args, **fresh.kwargs)
            outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
            results |= {f"buffer {i}": b.detach().clone() for i, (b, _) in enumerate(kept)}
            if not gradients:
                return results
            total = sum((_weighted(t, i) for i, t in enumerate(outputs) if t.requires_grad), start=torch.zeros(()))
            named = [(n, p) for n, p in owner.named_parameters() if p.requires_grad]
            wanted = [*(t for t in leaves if t.requires_grad), *(p for _, p in named)]
            names = [*(f"input {i}" for i, t in enumerate(leaves) if t.requires_grad), *(n for n, _ in named)]
            grads = [None] * len(wanted)
            if total.requires_grad:
                grads = run_theirs(torch.autograd.grad, total, wanted, allow_unused=True)
    except Refusal:
        raise
    except Exception as fault:  # the door to the model's own code
        if is_theirs(fault):
            raise ModelFault(told(fault)) from fault
        raise
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    return results | {
        f"gradient of {n}": torch.zeros_like(local(w)) if g is None else local(g)
        for n, w, g in zip(names, wanted, grads, strict=True)
    }


def _weighted(tensor: Tensor, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    direction = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (tensor.float() * direction).sum().cpu()


def _compare(old: dict[str, Tensor], new: dict[str, Tensor], dtype: torch.dtype) -> None:
    if old.keys() != new.keys():
        raise Refusal("the replayed forward returns other tensors than the module's own")
    scale = max((float(t.double().norm()) for n, t in old.items() if n.startswith("gradient")), default=0.0)
    for name, was in old.items():
        now = new[name]
        if was.shape != now.shape or was.dtype != now.dtype:
            raise Refusal(f"{name} of the replayed forward is {now.dtype} {list(now.shape)}, not {was.dtype} {list(was.shape)}")
        if not was.is_floating_point():
            if not torch.equal(was, now):
                raise Refusal(f"{name} of the replayed forward differs")
            continue
        error = float((was.double() - now.double()).norm())
        size = float(was.double().norm())
        floor = 1e-7 * scale if name.startswith("gradient") else 0.0
        if not error <= max(_TOLERANCE.get(t, 1e-4) for t in (was.dtype, dtype)) * size + floor + 1e-12:
            raise Refusal(f"{name} of the replayed forward differs by {error / max(size, 1e-30):.1e} (relative)")
