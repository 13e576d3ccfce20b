"""Run a model's own forward with some of its modules answered by someone else, and leave it early.

The model's glue (masks, rotary tables, merging of features into embeddings) runs as it is, whatever it looks like; only the
calls of a few modules are taken over, found by their place in the model. No parameter, name or hook of the model changes: a
module's class is exchanged for the time of a run, at the outermost point of a call, outside of activation checkpointing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.absent import Absent
from ultraep_compile.preparation import untouched

Call = Callable[..., Any]
Action = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""Given the module's own call and the arguments: what the call returns."""


class Left(Exception):
    """Raised by an action to leave the model's forward with a value."""

    def __init__(self, value: Any) -> None:
        super().__init__("left early")
        self.value = value


@cache
def _watched(kind: type) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = lambda *a, **k: kind.__call__(self, *a, **k)  # noqa: E731
        return self.__dict__["_taken_over"](own, args, kwargs)

    # the same names: libraries keep registries by them
    own = {"__call__": __call__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made = type(kind.__name__, (kind,), own)
    # Only calls differ. What `__init_subclass__` put in besides must not: transformers wraps each class's forward so that
    # the outermost one checkpoints, and by the time that backward recomputes, the module is of its own class again.
    for name in [n for n in vars(made) if n not in own and not n.startswith("__")]:
        delattr(made, name)
    return made


@contextlib.contextmanager
def taken_over(actions: Mapping[nn.Module, Action]) -> Iterator[None]:
    """Calls of these modules go to their actions."""
    kinds = {module: type(module) for module in actions}
    try:
        for module, action in actions.items():
            module.__dict__["_taken_over"] = action
            module.__class__ = _watched(kinds[module])
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind
            module.__dict__.pop("_taken_over", None)


Place = tuple[dict[str, Any], str, nn.Parameter, Absent]
"""A module's parameters, a name among them, what stands there, and what stands for it while it is not here."""
_gone: weakref.WeakKeyDictionary[nn.Module, tuple[torch.device, list[Place]]] = weakref.WeakKeyDictionary()


def _places(model: nn.Module, device: torch.device | None, gone: Callable[[nn.Parameter], bool]) -> list[Place]:
    """Where parameters stand that are gone, with an absent one for each."""
    made: dict[int, Absent] = {}
    found = []
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and gone(p):
                if id(p) not in made:
                    full = f"{path}.{name}" if path else name
                    made[id(p)] = Absent(p.shape, p.dtype, device or p.device, [full])
                found.append((module._parameters, name, p, made[id(p)]))
    return found


@contextlib.contextmanager
def _absent(places: list[Place]) -> Iterator[None]:
    try:
        for parameters, name, _, absent in places:
            parameters[name] = absent
        yield
    finally:
        for parameters, name, p, _ in places:
            parameters[name] = p


def without_weights(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Meta parameters are absent meanwhile: what stands around a stage runs for the shapes it makes, though its weights may be gone."""
    known = _gone.get(model)
    if known is None or not known[1] or known[0] != device or any(d.get(n) is not p for d, n, p, _ in known[1]):
        known = _gone[model] = (device, _places(model, device, lambda p: p.is_meta))
    return _absent(known[1])


def holding_only(model: nn.Module, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """All parameters but these are absent meanwhile, as on a rank that holds no more."""
    held = {id(model.get_parameter(name)) for name in names}
    return _absent(_places(model, None, lambda p: id(p) not in held and not p.is_meta))


def run(model: nn.Module, inputs: Mapping[str, Any], actions: Mapping[nn.Module, Action]) -> tuple[bool, Any]:
    """(left early, value) of one forward; parameters on the meta device may be missing where nothing depends on them."""
    device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), torch.device("cpu"))
    with taken_over(actions), without_weights(model, device):
        try:
            return False, model(**inputs)
        except Left as left:
            return True, left.value


def flatten(output: Any) -> tuple[list[Any], Any]:
    """Leaves of a module's output and what puts them back: `tree_unflatten`."""
    if dataclasses.is_dataclass(output) and isinstance(output, Mapping):
        known = [f.name for f in dataclasses.fields(output)]
        if not output.keys() <= set(known):  # what a decorator has added, and its constructor does not take
            output = type(output)(**{k: v for k, v in output.items() if k in known})
    return pytree.tree_flatten(output)


def is_state(leaf: Any) -> bool:
    """A tensor that may carry a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def hollow(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of a shape that take no memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor that is not made."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    def hollow(self) -> Tensor:
        return hollow(self.sizes, torch.empty((), dtype=self.dtype, device=self.device))

    def absent(self, source: str) -> Tensor:
        return Absent(self.sizes, self.dtype, self.device, [source])


def find_loss(output: Any) -> Tensor | None:
    """The loss in a model's output: what is called `loss`, else its first value or the only one that is a single number.

    None if there is none, or several numbers that may be it.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if named is not None:
        return named if _is_number(named) else None
    values = [output] if isinstance(output, Tensor) else _values(output)
    if values and not isinstance(output, Mapping) and _is_number(values[0]):
        return values[0]
    single = [x for v in values for x in pytree.tree_leaves(v) if _is_number(x)]
    return single[0] if len(single) == 1 else None


def loss_of(output: Any) -> Tensor:
    """`find_loss`, or a PartsError that says what the output is."""
    found = find_loss(output)
    if found is None:
        raise PartsError(
            f"the forward returned no loss but {_told(output)}. It must return one number (of a floating type): alone, as `loss`, or as "
            "the first value; give labels, and return the mean of losses per sample."
        )
    return found


def _is_number(value: Any) -> bool:
    return is_state(value) and value.numel() == 1


def _values(output: Any) -> list[Any]:
    """The top values of an output."""
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (tuple, list)):
        return list(output)
    if dataclasses.is_dataclass(output):
        return [getattr(output, f.name) for f in dataclasses.fields(output)]
    return []


def _told(output: Any) -> str:
    """An output in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}, {output.dtype}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__}({', '.join(f'{k}: {_told(v)}' for k, v in list(output.items())[:6])})"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of ({'; '.join(_told(v) for v in output[:6])})"
    return f"a {type(output).__name__}"


def variables_behind(values: Iterable[Any]) -> list[Tensor]:
    """Leaves of the autograd graph that values were made from."""
    found: dict[int, Tensor] = {}
    stack = [v.grad_fn for v in values if isinstance(v, Tensor) and v.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return list(found.values())


class every_parameter_trainable:
    """Frozen parameters leave no trace in a graph."""

    def __init__(self, model: nn.Module) -> None:
        self.frozen = [p for p in model.parameters() if not p.requires_grad and is_state(p)]

    def __enter__(self) -> None:
        for p in self.frozen:
            p.requires_grad_(True)

    def __exit__(self, *_: Any) -> None:
        for p in self.frozen:
            p.requires_grad_(False)


@contextlib.contextmanager
def nothing_random(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """In evaluation mode, if two forwards of the model differ as it is (dropout); modes are afterwards as they were."""
    losses = []
    for seed in (0, 1):
        with untouched(model), torch.no_grad():
            torch.manual_seed(seed)
            losses.append(loss_of(model(**inputs)))
    training = [m for m in model.modules() if m.training and not torch.equal(*losses)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class nothing_silent:
    """Parameters that are zero as a whole (gates and projections of a model not yet trained) hide what depends on what.

    They are small noise meanwhile, and zero again afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self.zero = [p for p in model.parameters() if is_state(p) and not p.is_meta and not bool(p.detach().any())]

    def __enter__(self) -> None:
        source = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.zero:
                p.copy_(torch.randn(p.shape, generator=source) * 0.05)

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for p in self.zero:
                p.zero_()
