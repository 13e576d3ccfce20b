"""New forwards put in place: under a compiler only, on one module only, with everything else as it was."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from torch.autograd import forward_ad

from ultraep_compile.ladder.divided import division_of, eager_forward, own_forward
from ultraep_compile.ladder.groups import Siblings
from ultraep_compile.ladder.guards import Reads
from ultraep_compile.ladder.recording import Call, author_forward, is_sizes
from ultraep_compile.ladder.standing import (
    EAGER,
    RAISE,
    STANDING,
    Standing,
    choice,
    choice_for,
    forms_of,
    look,
    raise_error,
)
from ultraep_compile.ladder.together import Ranks
from ultraep_compile.passes.lift.values import Refusal


@dataclass(slots=True)
class LayerFacts:
    """What is known of a lifted (or refused) layer."""

    experts: int | None = None
    top_k: int | None = None
    holders: tuple[tuple[str, ...], ...] = ()
    """Per-expert parameters, as paths inside the module: for each role one that holds all experts, or one for each expert."""
    form: str = ""
    """How the experts were called: `one by one` or `together`."""
    counted: bool = False
    """Python counts the rows of each expert: numbers that a compiler must be told to keep in its graph."""
    source: str = ""
    lead: tuple[int, ...] | None = None
    """The only shape of tokens that the new forward is good for; None for any."""
    most: int | None = None
    """The most tokens that the new forward is good for: beyond them the module has a bound that no probe came to."""
    ranks: int = 1
    """Processes that the layer divides its experts over by itself."""
    dtype: torch.dtype = torch.float32
    """In which the experts compute."""
    gating: str = "unknown"
    inference: str = ""
    """Why the module has no gradients of its own, and the new forward is for inference; "" where it has."""

    dynamic: str = ""
    """Where the new forward makes a tensor whose size depends on the data (`unique`, a mask as index), as the module's own does."""

    caller: int | None = None
    """The input that names the one expert of each token, where nothing weighs it; None where something routes."""

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(itertools.chain(*self.holders))


@dataclass(frozen=True, slots=True)
class Lift:
    """One new forward of a module, and what it rests on."""

    function: Callable
    source: str
    facts: LayerFacts
    reads: Reads
    """What Python read on the way, in the module that was recorded."""


@dataclass(slots=True)
class LiftedLayer:
    """New forwards of modules that are alike."""

    facts: LayerFacts
    """Of the forward in the mode that the module was in."""
    lifts: dict[bool, Lift]
    """As `prepare` found them, by training mode."""
    pattern: Pattern
    call: Call
    """An example, small where its values do not matter."""
    group: Siblings | None
    ranks: Ranks
    forwards: type = field(default_factory=lambda: type("Forwards", (), {}))
    """All new forwards, under names that a compiler takes for constants."""
    code: CodeType | None = None
    """Of the forward of all modules that this was installed in."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """What must be equal for another call to take the same way: which arguments are tensors, and all others' values."""

    names: tuple[str, ...]
    """Of the forward's positional parameters."""
    defaults: dict[str, Any]
    kinds: dict[str, tuple[str, Any]]
    """Parameter -> `tensor` and its dims, `sizes` and their number, or `value` and that value; in the order of the call."""

    @classmethod
    def of(cls, owner: nn.Module, call: Call) -> Pattern:
        signature = inspect.signature(author_forward(owner))
        plain = [p for p in list(signature.parameters.values())[1:] if p.kind is not p.VAR_POSITIONAL]
        names = tuple(p.name for p in plain if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD)
        defaults = {p.name: p.default for p in plain if p.default is not p.empty}
        pattern = cls(names, defaults, {})
        given = pattern.arguments(call.args, call.kwargs)
        kinds = {name: _kind(value) for name, value in given.items()}
        known = sum(kind == "tensor" for kind, _ in kinds.values())
        if known != len(call.tensors()):
            raise Refusal("its forward takes tensors inside of other arguments")
        return cls(names, defaults, {**{n: kinds[n] for n in given}, **{n: _kind(v) for n, v in defaults.items() if n not in given}})

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, however they were passed; those beyond the named ones by place."""
        out = {}
        for place, value in enumerate(args):
            out[self.names[place] if place < len(self.names) else str(place)] = value
        for name, value in kwargs.items():
            out[name] = value
        return out

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor] | None:
        """What the new forward is given, or None for a call of another kind."""
        given = self.arguments(args, kwargs)
        tensors, sizes = [], []
        for name in given:
            if name not in self.kinds:
                return None
        for name, (kind, wanted) in self.kinds.items():
            value = given[name] if name in given else self.defaults.get(name)
            if kind == "tensor" and isinstance(value, Tensor) and value.dim() == wanted:
                tensors.append(value)
            elif kind == "sizes" and isinstance(value, (list, tuple)) and is_sizes(value) and len(value) == wanted:
                sizes.append(value)
            elif kind != "value" or isinstance(value, Tensor) or value != wanted:
                return None
        return tensors + [torch.tensor(s, device=tensors[0].device) for s in sizes]


def _kind(value: Any) -> tuple[str, Any]:
    if isinstance(value, Tensor):
        return "tensor", value.dim()
    return ("sizes", len(value)) if is_sizes(value) else ("value", value)


_LAYER = "_ultraep_lifted_layer"


def install(owner: nn.Module, layer: LiftedLayer, name: str, states: Sequence[tuple[Lift, Reads]]) -> None:
    """Give a module a class of its own whose forward, under a compiler, is a lifted one. Nothing else changes.

    Args:
        name: path of the module, for messages.
        states: forwards, each with what this module's own forward read while Python's state was the one that it is good for.
    """
    base, forwards = type(owner), layer.forwards
    standing = Standing(name or base.__name__, layer, [])

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _is_ordinary():
            tensors = layer.pattern.inputs(args, kwargs)
            if tensors is not None:
                if torch.compiler.is_dynamo_compiling():
                    comptime(look)
                    chosen = choice(tuple([t.dtype for t in tensors]))
                else:
                    chosen = choice_for(self, tuple([t.dtype for t in tensors]))
                if chosen == RAISE:
                    raise_error(self)  # pyright: ignore[reportCallIssue]
                if chosen == EAGER:
                    return eager_forward(base, self, args, kwargs)  # pyright: ignore[reportCallIssue]
                if chosen and _good_for(getattr(forwards, chosen), tensors):
                    return getattr(forwards, chosen).function(self, *tensors)
        return own_forward(base, self, args, kwargs)

    # Compiled graphs are counted by code object: layers of one kind share theirs, others must not use up its limit.
    layer.code = layer.code or forward.__code__.replace()
    forward.__code__ = layer.code
    for lift, reads in states:
        standing.add(lift, reads, tuple(t.dtype for t in layer.call.inputs()), forms_of(owner))
    swap_class(owner, {"forward": forward, _LAYER: layer, STANDING: standing})


@torch.compiler.assume_constant_result  # asked while tracing; Dynamo's own guards compile again where it changes
def _is_ordinary() -> bool:
    """Is this no transform of torch.func, and no forward-mode AD? The balanced experts have gradients, and no more."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() == 0 and forward_ad._current_level < 0  # pyright: ignore


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

    swap_class(owner, {"forward": forward, _COUNTS: True})


_COUNTS = "_ultraep_keeps_counts"


def swap_class(owner: nn.Module, members: dict[str, Any]) -> None:
    """Another class for one module; pickles and copies of it are of the unmodified class, unless its experts are divided."""
    base = type(owner)
    plain = next(c for c in base.__mro__ if "_ultraep_plain" not in vars(c))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        kind = type(self) if division_of(self) else plain
        return kind.__new__, (kind,), self.__getstate__()

    members = {**members, "__reduce_ex__": reduce, "__module__": base.__module__, "_ultraep_plain": plain}
    owner.__class__ = type(base.__name__, (base,), members)
    if _LAYER in members:
        lifted_modules[owner] = state_of(owner)


lifted_modules: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
"""Modules with a new forward, and what their Python state was when they got it."""


def state_of(module: nn.Module) -> dict[str, str]:
    """The plain values in a module and everything below it, as text: what a person would call its settings."""
    found: dict[str, str] = {}
    for path, each in module.named_modules():
        prefix = f"{path}." if path else ""
        found[f"class of {path or 'the layer'}"] = vars(type(each)).get("_ultraep_plain", type(each)).__qualname__
        hooks = sum(len(v) for n, v in vars(each).items() if n.endswith("_hooks") and isinstance(v, dict))
        found |= {f"hooks of {path or 'the layer'}": str(hooks)} if hooks else {}
        for name, value in vars(each).items():
            if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) and not name.startswith("_"):
                found[prefix + name] = repr(value)
            elif not name.startswith("_") and hasattr(value, "__dict__") and not isinstance(value, (Tensor, type, nn.Module)):
                inner = {n: v for n, v in vars(value).items() if isinstance(v, (bool, int, float, str))}
                found |= {f"{prefix}{name}.{n}": repr(v) for n, v in inner.items()}
    return found


def lifted_layer(module: nn.Module) -> LiftedLayer | None:
    return getattr(type(module), _LAYER, None)


def _good_for(forward: Any, tensors: list[Tensor]) -> bool:
    if forward.inference and torch.is_grad_enabled():
        return False
    if forward.most is not None:
        states = next(t for t in tensors if t.is_floating_point() and t.dim() >= 2)
        if states.numel() // states.shape[-1] > forward.most:
            return False
    return forward.lead is None or any(tuple(t.shape[:-1]) == forward.lead for t in tensors)
