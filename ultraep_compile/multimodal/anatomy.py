"""What one forward shows: which calls make features, what layers hand on, what each costs.

The outputs of encoders and projectors are cut off and labelled. Those that the loss is made from are what the language model
reads: features. What a projector's own output is made from ties it to the encoder before it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.reads import Reads
from ultraep_compile.multimodal.roles import Roles, watch_roles
from ultraep_compile.multimodal.skeleton import Action, Shape, flatten, is_state, loss_of, run

Slot = tuple[int, int]
"""(call of a part, leaf of its output)."""
_LAST = "last"
"""Label of what the last layer returned."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Inputs of an encoder that belong together: images, or videos, of an encoder that takes both."""

    keys: tuple[str, ...]
    required: bool = False
    """Does the model fail without them?"""
    placeholder: tuple[str, tuple[int, ...]] | None = None
    """(input, ids) where features replace embeddings, if they do."""


@dataclass(slots=True)
class Group:
    """An encoder, the projectors behind it, and where their features come out."""

    name: str
    paths: tuple[str, ...]
    slots: list[tuple[str, int]]
    """Features: (path of the part, leaf of its output), in the order in which they are made."""
    once: bool
    """Does every part that makes features run once in a forward, for each stream?"""
    dims: list[int] = field(default_factory=list)
    """Per slot the dimension along which the rows of items lie in the part's output."""
    streams: tuple[Stream, ...] = ()
    """In the order in which the encoder runs on them."""
    item: str = "row"
    """What the encoder can run on alone: a row of its inputs, a sample's rows, or only a whole microbatch."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Inputs that the features depend on."""
        return tuple(dict.fromkeys(k for s in self.streams for k in s.keys))


@dataclass(slots=True)
class Head:
    """A generator: a module behind the language model that makes a part of the loss."""

    name: str
    states: tuple[int, ...]
    """Leaves of its arguments that come from the language model."""
    factor: float | None
    """The loss grows by so much for each unit of its output, if that is one number: its own loss."""
    divides: bool = False
    """Is its part of a batch's loss the mean of those of the samples?"""
    known: dict[Any, tuple[list[Any], Any]] = field(default_factory=dict)
    """Leaves and structure of its output, Shape for a state, by the shapes of its arguments."""

    def silent(self, own: Any, args: Any, kwargs: Any) -> Any:
        """Its output with zeros for states. Runs it once for arguments of new shapes."""
        key = tuple(tuple(x.shape) if isinstance(x, Tensor) else repr(x) for x in pytree.tree_leaves((args, kwargs)))
        if key not in self.known:
            with torch.no_grad():
                leaves, spec = pytree.tree_flatten(own(*args, **kwargs))
            self.known[key] = ([Shape(tuple(x.shape), x.dtype, x.device) if is_state(x) else x for x in leaves], spec)
        leaves, spec = self.known[key]
        return pytree.tree_unflatten([x.hollow() if isinstance(x, Shape) else x for x in leaves], spec)


@dataclass(slots=True)
class Anatomy:
    model: nn.Module
    roles: Roles
    layers: list[nn.Module]
    groups: list[Group] = field(default_factory=list)
    outputs: list[tuple[list[Any], Any]] = field(default_factory=list)
    """Per layer the leaves and the structure of its output; None stands for a state."""
    costs: list[float] = field(default_factory=list)
    """FLOPs of the layers' forward; of what runs before them and of what runs behind them."""
    front: float = 0.0
    head: float = 0.0
    heads: list[Head] = field(default_factory=list)
    required: dict[str, Shape] = field(default_factory=dict)
    """Tensors that the forward cannot be called without, as in the example."""
    around: dict[int, set[int]] = field(default_factory=dict)
    """Layer, or how many there are for the loss -> what it reads besides the output of the layer before it: n for what layer
    n - 1 returned or what is made inside of layer n."""
    returned: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)
    """Part -> leaves and structure of what it returned last, Shape for a tensor."""

    def part(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


def study(model: nn.Module, batch: Mapping[str, Any], roles: Roles | None = None) -> Anatomy:
    """Run a model once on a batch, without a backward.

    Raises:
        PartsError: no encoder, or no language model with a list of layers, was found.
    """
    roles = roles or watch_roles(model, [], **batch)  # lists of experts lie inside layers
    if not roles.encoders or not roles.layers:
        raise PartsError(
            f"{type(model).__name__} has no multimodal part: no encoder feeds its language model in a forward with "
            f"{sorted(batch)}. Give an example batch that has every modality; a text-only model needs no nested pipeline."
        )
    found = Anatomy(model, roles, list(model.get_submodule(roles.layers)))  # pyright: ignore[reportArgumentType]
    watcher = _Watcher(found)
    with torch.enable_grad(), watcher.reads, watcher.flops:
        left, output = run(model, batch, watcher.actions())
        loss = loss_of(output)
        watcher.note_around(len(found.layers), loss)
        found.heads = [watcher.head(path, loss) for path in roles.trained]
        read = watcher.read(loss)
    assert not left
    found.groups = _groups(found, watcher, read)
    n = len(found.layers)
    found.costs = [watcher.spent[i] for i in range(n)]
    found.front, found.head = watcher.before, watcher.flops.total - watcher.at
    found.outputs = [watcher.outputs[i] for i in range(n)]
    arguments = inspect.signature(model.forward).parameters.values()
    needed = {a.name for a in arguments if a.default is a.empty and a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
    found.required = {k: Shape.of(v) for k, v in batch.items() if k in needed and isinstance(v, Tensor)}
    return found


class _Flops(TorchDispatchMode):
    """Counts the FLOPs of products. torch's own counter hooks modules, which fails where they run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.total += counted(*args, **(kwargs or {}), out_val=output)
        return output


class _Watcher:
    def __init__(self, found: Anatomy) -> None:
        self.found = found
        self.reads = Reads()
        self.flops = _Flops()
        self.calls: list[str] = []
        self.made: list[list[Any]] = []  # per call the leaves of its output
        self.fed_by: list[set[int]] = []  # per call: calls whose outputs its own is made from
        self.spent: dict[int, float] = {}
        self.outputs: dict[int, tuple[list[Any], Any]] = {}
        self.in_parts, self.before, self.at = 0.0, 0.0, 0.0
        self.ends: set[Slot] = set()  # what the last layer and generators are made from, before their outputs are cut
        self.heads: dict[str, list[tuple[tuple[int, ...], list[Any]]]] = {}

    @contextlib.contextmanager
    def inside(self, index: int) -> Iterator[None]:
        """What is made meanwhile is made in this layer. In later ones, what the layer before returned stands behind it anyhow."""
        parameters = list(self.found.layers[0].parameters()) if index == 0 else []
        for p in parameters:
            self.reads.name(p, 0)
        yield
        for p in parameters:
            self.reads.unname(p, 0)

    def note_around(self, reader: int, values: Any) -> None:
        """Which layers' values these are made from, other than through the layer right before the reader."""
        read = {n for n in self.reads.made_from(values) if isinstance(n, int) and n < reader}
        if read:
            self.found.around.setdefault(reader, set()).update(read)

    def actions(self) -> dict[nn.Module, Action]:
        f = self.found
        made: dict[nn.Module, Action] = {
            f.part(p): self._part(p) for several in f.roles.called.values() for p in several
        }
        made |= {f.part(p): self._head(p) for p in f.roles.trained}
        return made | {layer: self._layer(i) for i, layer in enumerate(f.layers)}

    def _part(self, path: str) -> Action:
        def action(own: Any, args: Any, kwargs: Any) -> Any:
            call = len(self.calls)
            self.calls.append(path)
            start = self.flops.total
            leaves, spec = flatten(own(*args, **kwargs))
            self.in_parts += self.flops.total - start
            self.fed_by.append({c for c, _ in self.slots_behind((args, kwargs, leaves))})
            self.made.append(leaves)
            self.found.returned[path] = ([Shape.of(x) if isinstance(x, Tensor) else x for x in leaves], spec)
            leaves = [self.reads.cut(x, (call, i)) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
            return pytree.tree_unflatten(leaves, spec)

        return action

    def _layer(self, index: int) -> Action:
        def action(own: Any, args: Any, kwargs: Any) -> Any:
            start = self.flops.total
            if not self.spent:
                self.before = start - self.in_parts
            with self.inside(index):
                output = own(*args, **kwargs)
            self.at = self.flops.total
            self.spent[index] = self.at - start
            leaves, spec = pytree.tree_flatten(output)
            self.outputs[index] = ([None if is_state(x) else x for x in leaves], spec)
            self.note_around(index, leaves)
            if index + 1 < len(self.found.layers) or not self.found.roles.trained:
                before = range(index + 1)
                leaves = [self.reads.passed(x, index + 1, before) if is_state(x) else x for x in leaves]
                return pytree.tree_unflatten(leaves, spec)
            self.ends |= self.slots_behind(leaves)
            leaves = [self.reads.cut(x, _LAST) if is_state(x) else x for x in leaves]
            return pytree.tree_unflatten(leaves, spec)

        return action

    def _head(self, path: str) -> Action:
        def action(own: Any, args: Any, kwargs: Any) -> Any:
            given = pytree.tree_leaves((args, kwargs))
            read = tuple(i for i, x in enumerate(given) if isinstance(x, Tensor) and _LAST in self.reads.made_from(x))
            start = self.flops.total
            leaves, spec = pytree.tree_flatten(own(*args, **kwargs))
            self.at += self.flops.total - start
            self.ends |= self.slots_behind(leaves)
            self.note_around(len(self.found.layers), leaves)
            leaves = [self.reads.cut(x, path).requires_grad_() if is_state(x) else x for x in leaves]
            self.heads.setdefault(path, []).append((read, leaves))
            return pytree.tree_unflatten([x.clone() if is_state(x) else x for x in leaves], spec)

        return action

    def head(self, path: str, loss: Tensor) -> Head:
        calls = self.heads.get(path, [])
        if len(calls) != 1:
            raise PartsError(
                f"generator {path} is called {len(calls)} times in a forward; only one call can be taken apart"
            )
        read, leaves = calls[0]
        if not read:
            raise PartsError(f"generator {path} reads no state of the language model")
        factor = None
        if len(leaves) == 1 and is_state(leaves[0]) and leaves[0].numel() == 1:
            (slope,) = torch.autograd.grad(loss, leaves[0], allow_unused=True, retain_graph=True)
            factor = None if slope is None else float(slope)
        return Head(path, read, factor)

    def slots_behind(self, values: Any) -> set[Slot]:
        return {label for label in self.reads.made_from(values) if isinstance(label, tuple)}

    def read(self, loss: Tensor) -> set[Slot]:
        """Outputs of calls that the loss is made from. Integers only where no state of their call is: codes of a quantiser."""
        found = self.slots_behind(loss) | self.ends
        states = {c for c, i in found if is_state(self.made[c][i])}
        return {(c, i) for c, i in found if is_state(self.made[c][i]) or c not in states}


def _groups(found: Anatomy, watcher: _Watcher, read: set[Slot]) -> list[Group]:
    """Parts tied by what they hand to one another; named by the first of them."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(dict.fromkeys(watcher.calls))
    for path, feeders in zip(watcher.calls, watcher.fed_by, strict=True):
        graph.add_edges_from((path, watcher.calls[c]) for c in feeders)
    groups = []
    for paths in nx.connected_components(graph):
        ordered = tuple(p for p in dict.fromkeys(watcher.calls) if p in paths)
        slots = list(dict.fromkeys((watcher.calls[c], i) for c, i in sorted(read) if watcher.calls[c] in paths))
        if slots:
            once = all(watcher.calls.count(path) == 1 for path, _ in slots)
            name = next(n for n, called in found.roles.called.items() if ordered[0] in called)
            groups.append(Group(name, ordered, slots, once, [0] * len(slots)))
    if not groups:
        raise PartsError(
            f"the loss of {type(found.model).__name__} depends on no output of {', '.join(found.roles.encoders)}; give an example "
            "batch with labels, and images or sound."
        )
    return sorted(groups, key=lambda g: watcher.calls.index(g.paths[0]))
