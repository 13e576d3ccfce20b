"""Parts of a multimodal model: encoders, projectors, the language model, generators.

By structure and by two eager forwards, never by names. A part is a module around stacks of like layers. Stacks that feed the
language model are encoders, or projectors if they are fed by an encoder; stacks that it feeds are generators. What else runs
between encoders and language model is a projector; what has several matrices and runs behind it, beside a head, is a
generator, and so is what has weights and does not run in a training forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.multimodal.skeleton import every_parameter_trainable, is_state, loss_of, variables_behind
from ultraep_compile.preparation import untouched, warm_up

_DEPTH = 2
"""Dots in the path of a part, at most."""
ROLES = ("encoders", "projectors", "llm", "generators")


@dataclass(slots=True)
class Roles:
    """Paths of the parts of a model; all empty for a model with one stack of layers."""

    encoders: list[str] = field(default_factory=list)
    projectors: list[str] = field(default_factory=list)
    llm: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)
    layers: str = ""
    """The language model's list of layers."""
    within: list[str] = field(default_factory=list)
    """Parts of the language model that run before its layers: the encoder of an encoder-decoder that images enter."""
    called: dict[str, list[str]] = field(default_factory=dict)
    """Encoder or projector -> modules in it that are called: itself, or what a list or dict of modules holds."""
    trained: list[str] = field(default_factory=list)
    """Generators that run in the forward watched; the others are not called in training."""

    def names(self) -> dict[str, list[str]]:
        return {role: list(getattr(self, role)) for role in ROLES}


def no_roles() -> dict[str, list[str]]:
    return Roles().names()


def watch_roles(model: nn.Module, experts: list[str], *args: Any, **kwargs: Any) -> Roles:
    """Roles of a model's parts.

    Args:
        experts: modules that hold experts: their lists are no stacks.
        args, kwargs: those of one forward.
    """
    roles = Roles()
    stacks = _stacks(model, experts)
    if len(stacks) < 2:
        return roles
    seen = _Seen(model)
    seen.watch(lambda: warm_up(model, *args, **kwargs))
    ran = sorted((s for s in stacks if seen.started(s) is not None), key=lambda s: seen.started(s) or 0)
    if len(ran) < 2:
        return roles
    llm_stack, behind, feeds = _language_model(model, ran, *args, **kwargs)
    end = seen.ended(llm_stack)
    behind += [s for s in ran if s not in behind and (seen.started(s) or 0) > end]
    others = [s for s in ran if s != llm_stack and s not in behind]
    if not others:
        return roles
    roles.layers = llm_stack
    sources = [s for s in others if not feeds[s] - {s}] or others
    roles.llm = [_highest(llm_stack, without=[*sources, *behind])]
    fed: list[str] = []
    for stack in others:
        part = _highest(stack, without=[llm_stack, *behind])
        if part not in fed:
            inside = part.startswith(f"{roles.llm[0]}.")
            (roles.within if inside else roles.projectors if seen.reads(part, fed) else roles.encoders).append(part)
            fed.append(part)
    roles.trained = list(dict.fromkeys(_highest(s, without=[llm_stack, *others]) for s in behind))
    _beside_the_stacks(model, roles, seen, fed)
    roles.generators = [*roles.trained, *roles.generators]
    roles.called = {p: seen.called(p) for p in (*roles.encoders, *roles.projectors, *roles.within)}
    return roles


def _beside_the_stacks(model: nn.Module, roles: Roles, seen: _Seen, fed: list[str]) -> None:
    """Parts without a stack of their own: projectors before the language model, generators behind it or never called."""
    known = {*fed, *roles.llm, *roles.trained}
    first = min(seen.started(p) or 0 for p in fed)
    start, end = seen.started(roles.layers) or 0, seen.ended(roles.layers)
    behind = []
    for path in _beside(model, roles.llm[0]):
        if any(path == k or k.startswith(f"{path}.") for k in known) or _is_embedding(model.get_submodule(path)):
            continue
        when = seen.started(path)
        if when is None:
            roles.generators.append(path)
        elif first < when < start:
            roles.projectors.append(path)
        elif when > end:
            behind.append(path)
    deep = [p for p in behind if _matrices(model.get_submodule(p)) > 1]
    if len(behind) > len(deep) or roles.trained:  # one of them must be the head that makes the logits
        roles.trained += deep


def _language_model(
    model: nn.Module, ran: list[str], *args: Any, **kwargs: Any
) -> tuple[str, list[str], dict[str, set[str]]]:
    """The stack that makes the logits, the stacks that it feeds (generators), and what each stack is fed by.

    With the outputs of all layers cut from the autograd graph, the loss reaches the stacks that no other stack stands behind:
    the language model and generators. The first of them that another stack feeds is the language model, unless it is itself
    behind a much larger one that reads tokens: then it is all that stands between that one and the loss.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    reads_tokens: set[str] = set()
    owner: dict[int, str] = {}
    alive: list[Tensor] = []
    feeds: dict[str, set[str]] = {s: set() for s in ran}

    def note(stack: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            behind = {id(v) for v in variables_behind(pytree.tree_leaves((args, kwargs)))}
            feeds[stack] |= {owner[i] for i in behind if i in owner}
            if behind & embeddings:
                reads_tokens.add(stack)

        return hook

    def cut(stack: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = pytree.tree_flatten(output)
            for i, leaf in enumerate(leaves):
                if is_state(leaf):
                    fresh = leaf.detach().requires_grad_()
                    alive.append(fresh)
                    owner[id(fresh)] = stack
                    leaves[i] = fresh.clone()
            return pytree.tree_unflatten(leaves, spec)

        return hook

    layers = [(s, layer) for s in ran for layer in model.get_submodule(s).children()]
    handles = [layer.register_forward_pre_hook(note(s), with_kwargs=True) for s, layer in layers]
    # before hooks that keep outputs
    handles += [layer.register_forward_hook(cut(s), prepend=True) for s, layer in layers]
    try:
        with untouched(model), torch.enable_grad(), every_parameter_trainable(model):
            output = model._call_impl(*args, **kwargs)  # the eager path, also where a compiled one is installed
    finally:
        for handle in handles:
            handle.remove()
    read = {owner[id(v)] for v in variables_behind(pytree.tree_leaves(loss_of(output))) if id(v) in owner}
    graph: nx.DiGraph = nx.DiGraph([(feeder, s) for s in ran for feeder in feeds[s] - {s}])
    graph.add_nodes_from(ran)
    chained = [s for s in ran if s in feeds[s]]  # a layer reads the one before: heads for several depths do not
    maker = next((s for s in chained if s in read and feeds[s] - {s}), ran[-1])
    for s in chained:
        if (
            s in reads_tokens
            and feeds[s] - {s}
            and maker in nx.descendants(graph, s)
            and _size(model, s) > 1.5 * _size(model, maker)
        ):
            maker = s
            break
    return maker, [s for s in ran if s in nx.descendants(graph, maker)], feeds


def _size(model: nn.Module, path: str) -> int:
    return sum(p.numel() for p in model.get_submodule(path).parameters())


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

    def ended(self, path: str) -> int:
        """When the last module of a part began to run."""
        return max((i for p, i in self.order.items() if p.startswith(f"{path}.")), default=0)

    def called(self, path: str) -> list[str]:
        """The outermost modules of a part that ran themselves."""
        if path in self.order:
            return [path]
        children = [f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_children()]
        return [found for child in children for found in self.called(child)]

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


def _matrices(module: nn.Module) -> int:
    return sum(p.dim() > 1 for p in module.parameters())
