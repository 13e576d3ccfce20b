"""Parts of a multimodal model: encoders, projectors, the language model, generators.

By structure and by one eager forward, never by names. A part is a module around stacks of like layers. The stack that runs last
makes the logits: the language model. Stacks before it are encoders, or projectors if they are fed by an encoder. What else runs
between them is a projector; what has weights and does not run in a training forward is there to generate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.preparation import warm_up

_DEPTH = 2
"""Dots in the path of a part, at most."""
ROLES = ("encoders", "projectors", "llm", "generators")


def no_roles() -> dict[str, list[str]]:
    return {role: [] for role in ROLES}


def find_roles(model: nn.Module, experts: list[str], *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """Roles of a model's parts, as names of `named_modules()`; all empty for a model with one stack of layers.

    Args:
        experts: modules that hold experts: their lists are no stacks.
        args, kwargs: those of one forward.
    """
    stacks = _stacks(model, experts)
    if len(stacks) < 2:
        return no_roles()
    seen = _Seen(model)
    seen.watch(lambda: warm_up(model, *args, **kwargs))
    ran = [s for s in stacks if seen.started(s) is not None]
    if len(ran) < 2:
        return no_roles()
    last = max(ran, key=lambda s: seen.started(s) or 0)
    roles = no_roles()
    others = [s for s in ran if s != last]
    llm = _highest(last, without=others)
    fed: list[str] = []
    for stack in sorted(others, key=lambda s: seen.started(s) or 0):
        part = _highest(stack, without=[last])
        if part not in roles["encoders"] + roles["projectors"]:
            roles["projectors" if seen.reads(part, fed) else "encoders"].append(part)
            fed.append(part)
    roles["llm"].append(llm)
    known = {*fed, llm}
    first = min(seen.started(p) or 0 for p in fed)
    for path in _beside(model, llm):
        if path in known or _is_embedding(model.get_submodule(path)):
            continue
        when = seen.started(path)
        if when is None:
            roles["generators"].append(path)
        elif first < when < (seen.started(last) or 0):
            roles["projectors"].append(path)
    return roles


def _stacks(model: nn.Module, experts: list[str]) -> list[str]:
    """Lists of layers, the outermost ones; lists of single matrices (heads, embeddings) and of experts are none."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path == f or path.startswith(f"{f}.") for f in [*found, *experts])
        if isinstance(module, nn.ModuleList) and not inside and len(module) > 1:
            if all(any(True for _ in child.children()) for child in module):
                found.append(path)
    return found


class _Seen:
    """The order in which modules ran, and what they handed to one another."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.order: dict[str, int] = {}
        self.made: dict[str, set[int]] = {}
        self.given: dict[str, set[int]] = {}
        self.alive: list[Tensor] = []  # an id is unique only while its object lives

    def watch(self, run: Callable[[], None]) -> None:
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(path)))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
            self.alive.clear()

    def _before(self, path: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.order.setdefault(path, len(self.order))
            self.given.setdefault(path, set()).update(map(id, self._tensors(path, (args, kwargs))))

        return hook

    def _after(self, path: str) -> Callable:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.made.setdefault(path, set()).update(map(id, self._tensors(path, out)))

        return hook

    def _tensors(self, path: str, values: Any) -> list[Tensor]:
        """Floats that go in and out of modules near the top; those deep inside are of no interest here."""
        if path.count(".") > _DEPTH:
            return []
        tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
        self.alive += tensors
        return tensors

    def started(self, path: str) -> int | None:
        """When the first module of a part ran; containers do not run themselves."""
        inside = [i for p, i in self.order.items() if p == path or p.startswith(f"{path}.")]
        return min(inside, default=None)

    def reads(self, path: str, makers: list[str]) -> bool:
        """Is a part given a tensor that one of the others made?"""
        mine = self.given.get(path, set())
        return any(mine & self.made.get(maker, set()) for maker in makers)


def _highest(path: str, without: list[str]) -> str:
    """The outermost module around a stack that holds none of certain others."""
    parts = path.split(".")
    for n in range(1, len(parts) + 1):
        prefix = ".".join(parts[:n])
        if not any(o == prefix or o.startswith(f"{prefix}.") for o in without):
            return prefix
    return path


def _beside(model: nn.Module, path: str) -> list[str]:
    """Modules with weights next to a part, on all levels above it."""
    parts = path.split(".")
    found = []
    for n in range(len(parts)):
        above = ".".join(parts[:n])
        for name, child in model.get_submodule(above).named_children():
            here = f"{above}.{name}" if above else name
            if not path.startswith(here) and any(True for _ in child.parameters()):
                found.append(here)
    return found


def _is_embedding(module: nn.Module) -> bool:
    return all(isinstance(m, nn.Embedding) for m in module.modules() if any(True for _ in m.parameters(recurse=False)))
