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
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.multimodal.reads import Reads, tensors_in
from ultraep_compile.multimodal.skeleton import find_loss, flatten, is_state
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
    fed_by = _watch_flow(model, {s: seen.called(s) for s in ran}, *args, **kwargs)
    llm_stack, others, behind = _language_model(model, ran, fed_by)
    if not others and not behind:
        return roles
    roles.layers = llm_stack
    sources = fed_by.sources(others)
    aside = [s for s in ran if s not in (llm_stack, *others, *behind)]
    roles.llm = [_highest(llm_stack, without=[*sources, *behind, *aside])]
    fed: list[str] = []
    for stack in others:
        part = _highest(stack, without=[llm_stack, *behind])
        if part not in fed:
            inside = part.startswith(f"{roles.llm[0]}.")
            (roles.within if inside else roles.projectors if seen.reads(part, fed) else roles.encoders).append(part)
            fed.append(part)
    roles.trained = list(dict.fromkeys(_highest(s, without=[llm_stack, *others]) for s in behind))
    _beside_the_stacks(model, roles, seen, fed, fed_by)
    roles.generators = [*roles.trained, *roles.generators]
    roles.called = {p: seen.called(p) for p in (*roles.encoders, *roles.projectors, *roles.within)}
    return roles


def _beside_the_stacks(model: nn.Module, roles: Roles, seen: _Seen, fed: list[str], fed_by: _FedBy) -> None:
    """Parts without a stack of their own: projectors before the language model, generators behind it or never called.

    What neither feeds the language model nor is fed by it (an autoencoder that makes targets) is no part.
    """
    known = {*fed, *roles.llm, *roles.trained}
    first = min((seen.started(p) or 0 for p in fed), default=0)
    start = seen.started(roles.layers) or 0
    behind = []
    for path in _beside(model, roles.llm[0]):
        if any(path == k or k.startswith(f"{path}.") for k in known) or _is_embedding(model.get_submodule(path)):
            continue
        when = seen.started(path)
        if when is None:
            roles.generators.append(path)
        elif first < when < start and path in fed_by.feeding and (fed_by.of(path) or path in fed_by.measured):
            roles.projectors.append(path)
        elif roles.layers in fed_by.of(path):
            behind.append(path)
    deep = [p for p in behind if _matrices(model.get_submodule(p)) > 1]
    if len(behind) > len(deep) or roles.trained:  # one of them must be the head that makes the logits
        roles.trained += deep


@dataclass(slots=True)
class _FedBy:
    """What stacks and other modules are fed by in a forward, with the outputs of all layers of stacks cut off."""

    stacks: dict[str, set[str]]
    """Stack -> stacks behind what its layers make."""
    modules: dict[str, set[str]] = field(default_factory=dict)
    """Module -> stacks behind what it is given."""
    feeding: set[str] = field(default_factory=set)
    """Modules near the top whose outputs some layer of a stack is made from."""
    measured: set[str] = field(default_factory=set)
    """Modules that are given what is made from inputs of floating type; others, of places say, belong to the code around."""
    tokens: set[str] = field(default_factory=set)
    """Stacks whose layers are made from looked-up ids."""
    read: set[str] = field(default_factory=set)
    """Stacks that the loss is made from without another between."""

    def sources(self, among: list[str]) -> list[str]:
        """Stacks that no other feeds, or only such as they feed themselves: those of one tower, that take turns."""
        graph: nx.DiGraph = nx.DiGraph([(feeder, s) for s in among for feeder in self.stacks[s] if feeder in among])
        graph.add_nodes_from(among)
        together = nx.condensation(graph)
        first = [together.nodes[n]["members"] for n, degree in together.in_degree() if degree == 0]
        return [s for s in among if any(s in members for members in first)]

    def of(self, path: str) -> set[str]:
        """Stacks that feed a module or one in it."""
        return {s for p, fed in self.modules.items() if p == path or p.startswith(f"{path}.") for s in fed}


def _watch_flow(model: nn.Module, layers: dict[str, list[str]], *args: Any, **kwargs: Any) -> _FedBy:
    """Args: layers: of each stack, the modules that are called."""
    found = _FedBy({s: set() for s in layers})
    reads = Reads()

    def given(path: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            behind = reads.made_from((args, kwargs))
            found.modules.setdefault(path, set()).update(s for kind, s in behind if kind == "stack")
            if ("measured", "") in behind:
                found.measured.add(path)

        return hook

    def made(path: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for t in tensors_in(output):
                reads.name(t, ("module", path))

        return hook

    def looked_up(module: nn.Module, args: Any, output: Any) -> None:
        ids = next(iter(tensors_in(args)), None)  # several for each sample: a time step is no token
        if ids is not None and ids.dim() > 1 and ("input", "") in reads.made_from(ids):
            reads.name(output, ("tokens", ""))

    def cut(stack: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            for kind, name in reads.made_from((args, kwargs, output)):
                if kind == "stack":
                    found.stacks[stack].add(name)
                elif kind == "module":
                    found.feeding.add(name)
                elif kind == "tokens":
                    found.tokens.add(stack)
            leaves, spec = flatten(output)
            return pytree.tree_unflatten(
                [reads.cut(x, ("stack", stack)) if isinstance(x, Tensor) else x for x in leaves], spec
            )

        return hook

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(given(path), with_kwargs=True))
        if 0 < len(path) and path.count(".") <= _DEPTH:
            handles.append(module.register_forward_hook(made(path)))
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(looked_up))
    for stack in layers:
        for path in layers[stack]:  # before hooks that keep outputs
            layer = model.get_submodule(path)
            handles.append(layer.register_forward_hook(cut(stack), prepend=True, with_kwargs=True))
    for t in tensors_in((args, kwargs)):
        reads.name(t, ("measured" if is_state(t) else "input", ""))
    try:
        with untouched(model), reads:
            output = model._call_impl(*args, **kwargs)  # the eager path, also where a compiled one is installed
            loss = find_loss(output)
            found.read = {s for kind, s in reads.made_from(output if loss is None else loss) if kind == "stack"}
    finally:
        for handle in handles:
            handle.remove()
    return found


def _language_model(model: nn.Module, ran: list[str], fed_by: _FedBy) -> tuple[str, list[str], list[str]]:
    """The stack that makes the logits, the stacks that it is fed by, and those that it feeds (generators).

    With the outputs of all layers cut off, the loss is made from the stacks that no other stack stands behind: the language model and
    generators. The first of them that another stack feeds is the language model, unless it is itself behind one that reads
    tokens, and is much smaller than that, or reads no tokens itself: then it is a generator.
    """
    feeds = fed_by.stacks
    graph: nx.DiGraph = nx.DiGraph([(feeder, s) for s in ran for feeder in feeds[s] - {s}])
    graph.add_nodes_from(ran)
    chained = [s for s in ran if s in feeds[s]]  # a layer reads the one before: heads for several depths do not
    maker = next((s for s in chained if s in fed_by.read and feeds[s] - {s}), ran[-1])
    for s in sorted(chained, key=lambda s: not feeds[s] - {s}):  # text alone comes last: an encoder of it, perhaps
        if s not in fed_by.tokens or maker not in nx.descendants(graph, s):
            continue
        larger = _size(model, s) / _size(model, maker)
        reads_no_tokens = maker not in fed_by.tokens
        if (feeds[s] - {s} and (larger > 1.5 or reads_no_tokens)) or (
            reads_no_tokens and (s in fed_by.read or larger > 1)
        ):
            maker = s
            break
    before, behind = nx.ancestors(graph, maker), nx.descendants(graph, maker)
    return maker, [s for s in ran if s in before], [s for s in ran if s in behind]


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
