"""New forwards put in place: under a compiler only, on one module only, with everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultraep_compile.ladder.recording import Call, is_sizes


@dataclass(slots=True)
class LayerFacts:
    """What is known of a lifted (or refused) layer."""

    experts: int | None = None
    top_k: int | None = None
    gating: str | None = None
    parameters: tuple[str, ...] = ()
    """Per-expert parameters, as paths inside the module."""
    form: str = ""
    """How the experts were called: `one by one` or `together`."""
    counted: bool = False
    """Python counts the rows of each expert: numbers that a compiler must be told to keep in its graph."""
    source: str = ""
    lead: tuple[int, ...] | None = None
    """The only shape of tokens that the new forward is good for; None for any."""


@dataclass(slots=True)
class LiftedLayer:
    """New forwards of one module, by training mode."""

    facts: LayerFacts
    functions: dict[bool, Callable]
    pattern: tuple
    sources: dict[bool, str]


def pattern_of(call: Call) -> tuple:
    """What must be equal for another call to take the same way: its structure and everything that is no tensor."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor", value.dim()
        return ("sizes", len(value)) if is_sizes(value) else ("value", value)

    return tuple(map(part, call.args)), tuple((k, part(v)) for k, v in call.kwargs.items())


_LAYER = "_ultraep_lifted_layer"


def install(owner: nn.Module, layer: LiftedLayer) -> None:
    """Give a module a class of its own whose forward, under a compiler, is the lifted one. Nothing else changes."""
    base = type(owner)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        tensors = [a for a in given if isinstance(a, Tensor)]
        ours = torch.compiler.is_compiling() and self.training in layer.functions
        if ours and _fits(layer.pattern, args, kwargs) and _good_for(layer.facts.lead, tensors):
            tensors += [torch.tensor(a, device=tensors[0].device) for a in given if is_sizes(a)]
            return layer.functions[self.training](self, *tensors)
        return base.forward(self, *args, **kwargs)

    _swap_class(owner, {"forward": forward, _LAYER: layer})


def keep_counts(owner: nn.Module) -> None:
    """Let a compiler keep numbers that Python reads from tensors inside this module (`tolist`) in its graph."""
    base = type(owner)
    if hasattr(base, _COUNTS):
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
                return base.forward(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    _swap_class(owner, {"forward": forward, _COUNTS: True})


_COUNTS = "_ultraep_keeps_counts"


def _swap_class(owner: nn.Module, members: dict[str, Any]) -> None:
    """Another class for one module; pickles and copies of it are of the unmodified class."""
    base = type(owner)
    plain = next(c for c in base.__mro__ if "_ultraep_plain" not in vars(c))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        rebuild, (_, *rest), *state = object.__reduce_ex__(self, protocol)  # type: ignore[misc]
        return (rebuild, (plain, *rest), *state)

    members = {**members, "__reduce_ex__": reduce, "__module__": base.__module__, "_ultraep_plain": plain}
    owner.__class__ = type(base.__name__, (base,), members)


def lifted_layer(module: nn.Module) -> LiftedLayer | None:
    return getattr(type(module), _LAYER, None)


def _good_for(lead: tuple[int, ...] | None, tensors: list[Tensor]) -> bool:
    return lead is None or any(tuple(t.shape[:-1]) == lead for t in tensors)


def _fits(pattern: tuple, args: tuple, kwargs: dict[str, Any]) -> bool:
    positional, named = pattern
    if len(args) != len(positional) or len(kwargs) != len(named):
        return False
    for value, (kind, wanted) in zip(args, positional, strict=True):
        if not _same(value, kind, wanted):
            return False
    return all(key in kwargs and _same(kwargs[key], kind, wanted) for key, (kind, wanted) in named)


def _same(value: Any, kind: str, wanted: Any) -> bool:
    if isinstance(value, Tensor):
        return kind == "tensor" and value.dim() == wanted
    if kind == "sizes":
        return is_sizes(value) and len(value) == wanted
    return kind == "value" and value == wanted
