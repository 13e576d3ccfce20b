"""What a rank computes: forward and backward of a stage, of encoder items, of a generator.

Each keeps what its own backward needs, by microbatch or item, and lets it go in that backward. Nothing here knows of
other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ultraep_compile.errors import PipelineError
from ultraep_compile.executor.autograd import can_split, input_backward, weight_backward, whole_backward
from ultraep_compile.executor.memory import Meter
from ultraep_compile.multimodal.skeleton import variables_behind

Features = dict[str, tuple[Any, ...]]
Item = tuple[int, int]  # microbatch, number in it


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(x, device) for x in value) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {k: to_device(x, device) for k, x in value.items()}
    return value


def leaf(value: Any, wanted: bool = True) -> Any:
    """A value as an input of its own: floats ask for a gradient if wanted, the rest is as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.requires_grad_(wanted and (value.is_floating_point() or value.is_complex()))


@dataclass(slots=True)
class _Random:
    """The random numbers that a forward met, so that running it again meets them too."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _Random:
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), own)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        devices = [self.device] if self.own is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.cuda.set_rng_state(self.own, self.device)
            yield


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """A backward runs in the types that its forward chose, not in those of the caller's autocast."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@dataclass(slots=True)
class _Held:
    """A stage's forward of one microbatch until its backward."""

    outputs: tuple[Any, ...]
    hidden: tuple[Any, ...]
    features: Features
    later: Callable[[], None] | None = None  # the weight part, once the input part has run


@dataclass(slots=True)
class StageUnit:
    """One stage of the LLM on the rank that holds it."""

    index: int
    module: nn.Module
    device: torch.device
    meter: Meter
    inner: list[nn.Module] = field(default_factory=list)  # modules that run inside it
    parameters: list[nn.Parameter] = field(default_factory=list)
    splits: bool = True
    held: dict[int, _Held] = field(default_factory=dict)

    def bind(self, model: nn.Module | None) -> None:
        """Look up what the stage consists of, as it is now: before the first step it may be sharded and compiled."""
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        mine = {id(p) for p in self.parameters}
        inside = [] if model is None else [m for m in model.modules() if any(id(p) in mine for p in m.parameters())]
        self.inner = list(dict.fromkeys([*self.module.modules(), *inside]))
        self.splits = can_split(self.inner)

    def forward(self, j: int, hidden: Sequence[Any], inputs: dict[str, Any], features: Features) -> tuple[Any, ...]:
        """Outputs of microbatch j, detached. `hidden` and `features` are leaves, which get gradients in `backward`."""
        entered = tuple(leaf(x) for x in hidden)
        with self.meter.holding("llm", (self.index, j)):
            outputs = self.module(entered, inputs, features)
        if not isinstance(outputs, tuple):
            raise PipelineError(f"Stage {self.index} returned a {type(outputs).__name__}; a stage must return a tuple.")
        if torch.is_grad_enabled():  # otherwise no backward comes
            self.held[j] = _Held(outputs, entered, features)
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in outputs)

    def backward(
        self, kind: str, j: int, grads: Sequence[Tensor | None], last: bool
    ) -> tuple[tuple[Any, ...], Features]:
        """B, I or W of microbatch j, given the gradients of its outputs (not for W). B and I return the gradients of
        hidden and features. `last`: no backward of this stage follows in this step."""
        held = self.held[j]
        self._synchronise(last)
        with no_autocast(self.device):
            if kind == "W":
                if held.later is not None:
                    held.later()
            else:
                held.later = self._backward(kind == "I", held, grads)
        found = _gradients(held.hidden), {name: _gradients(part) for name, part in held.features.items()}
        if kind == "I":
            held.hidden, held.features, held.outputs = (), {}, ()
        else:
            del self.held[j]
            self.meter.release("llm", (self.index, j))
        return found

    def _backward(self, split: bool, held: _Held, grads: Sequence[Tensor | None]) -> Callable[[], None] | None:
        """The whole backward, or its input part: then the weight part is returned."""
        outputs, given = [], []
        for out, grad in zip(held.outputs, grads, strict=True):
            if isinstance(out, Tensor) and out.requires_grad and grad is not None:
                outputs.append(out.clone() if split and out._is_view() else out)  # the split detaches them in place
                given.append(grad.to(out.dtype))
        if not split or not self.splits or not outputs:
            whole_backward(outputs, given)
            return None
        reached = {id(v) for v in variables_behind(outputs)}  # features may be detached behind the encoder
        leaves = [t for t in tensors_in((held.hidden, held.features)) if id(t) in reached]
        if not leaves:  # nobody asks for the input's gradient: all of it is weight part
            return lambda: whole_backward(outputs, given)
        groups = input_backward(outputs, given, leaves, self.parameters)
        return lambda: weight_backward(self.parameters, groups)

    def let_go(self) -> None:
        """Forget what waits for a backward that does not come."""
        self.held.clear()

    def _synchronise(self, last: bool) -> None:
        for module in self.inner:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
                module.set_is_last_backward(last)


def _gradients(values: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The gradients that leaves have got; None where there is none."""
    return tuple(x.grad if isinstance(x, Tensor) else None for x in values)


@dataclass(slots=True)
class EncoderUnit:
    """An encoder on any rank: works on items."""

    name: str
    module: nn.Module
    device: torch.device
    meter: Meter
    trainable: bool = True
    held: dict[Item, tuple[Any, ...]] = field(default_factory=dict)
    inputs: dict[Item, tuple[dict[str, Any], _Random]] = field(default_factory=dict)  # where the forward runs again

    def bind(self) -> None:
        self.trainable = any(p.requires_grad for p in self.module.parameters())

    def forward(self, items: Mapping[Item, dict[str, Any]], recompute: bool) -> dict[Item, tuple[Any, ...]]:
        """Features of each item, detached."""
        made, trained = {}, self.trainable and torch.is_grad_enabled()
        for key, item in items.items():
            here = to_device(item, self.device)
            if recompute or not trained:
                if trained:
                    self.inputs[key] = (here, _Random.now(self.device))
                with torch.no_grad():
                    outputs = self._call(here)
            else:
                outputs = self.held[key] = self._counted(key, here)
            made[key] = tuple(x.detach() if isinstance(x, Tensor) else x for x in outputs)
        return made

    def backward(self, grads: Mapping[Item, Sequence[Tensor | None]]) -> None:
        """Gradients of the parameters, from those of the features of each item."""
        outputs, given = [], []
        for key, row in grads.items():
            if key in self.inputs:
                here, random = self.inputs.pop(key)
                with random.again():
                    self.held[key] = self._counted(key, here)
            for out, grad in zip(self.held.pop(key), row, strict=True):
                if isinstance(out, Tensor) and out.requires_grad and grad is not None:
                    outputs.append(out)
                    given.append(grad.to(out.dtype))
        with no_autocast(self.device):
            whole_backward(outputs, given)
        for key in grads:
            self.meter.release("encoder", (self.name, key))

    def let_go(self) -> None:
        """Forget what waits for a backward that does not come."""
        self.held.clear()
        self.inputs.clear()

    def _counted(self, key: Item, item: dict[str, Any]) -> tuple[Any, ...]:
        with self.meter.holding("encoder", (self.name, key)):
            return self._call(item)

    def _call(self, item: dict[str, Any]) -> tuple[Any, ...]:
        made = self.module(**item)
        return made if isinstance(made, tuple) else (made,)


@dataclass(slots=True)
class GeneratorUnit:
    """A generator on any rank: forward and backward at once, sample after sample, so that one sample's activations are
    all it ever holds."""

    name: str
    module: nn.Module
    device: torch.device
    meter: Meter

    def run(
        self, j: int, states: Sequence[Any], samples: Sequence[dict[str, Any]], weight: float
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(loss of these samples, not weighted; gradients of the states for `weight` times that loss)."""
        entered = tuple(leaf(x) for x in states)
        total = torch.zeros((), device=self.device)
        for sample in samples:
            with self.meter.holding("generator", (self.name, j)):
                loss = self.module(entered, **to_device(sample, self.device))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise PipelineError(f"Generator {self.name!r} must return its loss, one number, not {loss!r}.")
            if loss.requires_grad and torch.is_grad_enabled():
                with no_autocast(self.device):
                    whole_backward([loss], [torch.full_like(loss, weight)])
            self.meter.release("generator", (self.name, j))
            total += loss.detach().reshape(()).to(total.dtype)
        return total, _gradients(entered)
