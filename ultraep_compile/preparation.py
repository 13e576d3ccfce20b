"""What must happen to a model before a compiler sees it, so that the compiler sees all of it."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ultraep_compile.errors import ArgumentError, ForwardError, UltraEPError, need_model
from ultraep_compile.ladder.climb import Finding, candidates, climb, watched
from ultraep_compile.ladder.lent import filled, lent_when_called
from ultraep_compile.steps import follow_steps

log = logging.getLogger(__name__)


def prepare(model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None) -> nn.Module:
    """Make a model ready to be compiled whole; in place, returns the model. Its results do not change.

    * transformers models whose experts run in a Python loop, or through a product that cannot be traced in the model's
      dtype, are switched to a form that can (`set_experts_implementation`).
    * One eager forward lets the model install what it installs on first use (hooks for recorded outputs), which breaks
      graphs if it happens while compiling. Random state and buffers are as before.
    * Experts that a compiler still could not see (loops, capacity buffers, dense products) are lifted: the forward of
      their module is replaced under compilers, after outputs and gradients agreed with eager on probe batches.

    Layers that divide their experts over processes by an all-to-all of their own are lifted over these: every process of the
    group must call this alike, each with its own tokens, before `fully_shard` or DDP wraps the model.

    A model on the meta device is run with random weights, a module at a time, and is on the meta device again afterwards.

    Args:
        example_inputs: keyword arguments (mapping) or positional arguments (tuple, list) of one forward; None does the
          first step only.
    """
    need_model(model, "prepare")
    if example_inputs is None:
        _choose_experts_implementation(model)
    else:
        args, kwargs = as_call(example_inputs)
        prepare_call(model, *args, **kwargs)
    return model


def prepare_call(model: nn.Module, *args: Any, **kwargs: Any) -> list[Finding]:
    """`prepare` with the arguments of one call; what was found on the way, kept for `findings_of`."""
    follow_steps()
    _choose_experts_implementation(model)
    found = candidates(model)
    done = watched(model, found)
    args, kwargs = filled((args, kwargs))
    try:
        with lent_when_called(model):
            warm_up(model, *args, **kwargs)
    finally:
        calls = done()
    earlier = {f.path: f for f in findings_of(model)}
    with _buffers_kept(model):
        now = climb(model, found, calls)
    kept = [f for f in earlier.values() if f.rung == "lifted" and f.path not in {n.path for n in now}]
    _findings[model] = [*now, *kept]
    return _findings[model]


_findings: weakref.WeakKeyDictionary[nn.Module, list[Finding]] = weakref.WeakKeyDictionary()


def findings_of(model: nn.Module) -> list[Finding]:
    """What the last `prepare` with inputs found in a model."""
    return _findings.get(model, [])


def as_call(inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs).

    Raises: ArgumentError for what is neither a mapping nor a sequence; a lone tensor is taken for no sequence.
    """
    if isinstance(inputs, (torch.Tensor, str, bytes)) or not isinstance(inputs, (Mapping, Sequence)):
        raise ArgumentError(
            f"example inputs are {type(inputs).__name__}. Give a dict of keyword arguments, or a tuple of positional ones."
        )
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def warm_up(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """One eager forward without gradients that leaves random state and buffers as they were.

    Raises: ForwardError where the model itself raises.
    """
    with untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):  # also of parts that are compiled already
        try:
            model._call_impl(*args, **kwargs)
        except UltraEPError:
            raise
        except Exception as error:
            raise ForwardError(
                f"the model's own forward raised {type(error).__name__} on the example inputs: {error}. Call "
                f"{type(model).__name__} with them without ultraep_compile, and mend the model or the inputs."
            ) from error


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Random state and buffers are afterwards as they were."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _buffers_kept(model):
        yield


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _choose_experts_implementation(model: nn.Module) -> None:
    """transformers: `batched_mm` traces in every dtype, `grouped_mm` in bf16 only; the eager loop not at all.

    What runs after the rewrite is our grouped product in any case, so the choice costs nothing.
    """
    setter = getattr(model, "set_experts_implementation", None)
    current = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if setter is None or current in (None, "batched_mm"):
        return
    dtype = next((p.dtype for p in model.parameters() if p.dim() == 3), torch.float32)
    if current == "grouped_mm" and dtype == torch.bfloat16:
        return
    try:
        setter("batched_mm")
    except (ValueError, NotImplementedError) as reason:
        log.info("experts implementation stays %r: %s", current, reason)
    else:
        log.info("experts implementation switched from %r to 'batched_mm', which can be traced in %s", current, dtype)
