"""The forward of a module with its experts lifted, as generated source: what is recorded around the experts, replayed.

Two recordings with different numbers of tokens tell which of the recorded integers are sizes; these are computed from the
inputs again. Everything the experts did is replaced by ids, weights and one call of `lifted_rows`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.fx.graph_module import _forward_from_src
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from ultraep_compile.ladder.divided import stack_experts
from ultraep_compile.ladder.recording import Constant, Recording, refuse_foreign
from ultraep_compile.ladder.regions import Parts
from ultraep_compile.ladder.repeated import repeats
from ultraep_compile.ladder.routing import Routing
from ultraep_compile.ladder.rows import RowFunction
from ultraep_compile.ladder.sizes import size_function
from ultraep_compile.ladder.sources import Sources
from ultraep_compile.ladder.together import is_repeatable, local
from ultraep_compile.ops import looked_at  # noqa: F401  (defines the op)
from ultraep_compile.passes.lift.nodes import functional_target, op_name
from ultraep_compile.passes.lift.values import Refusal


def invoke(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module, hooks included."""
    return module(*args, **kwargs)


def keep(module: Any, name: str, value: Any) -> None:
    """Store what the forward stores."""
    setattr(module, name, value)


def counted(
    input: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0, *, size: int
) -> torch.Tensor:
    """What `torch.bincount` gives for values below `size`, in a size that does not depend on them.

    Example:
        >>> counted(torch.tensor([0, 2, 2]), size=4).tolist()
        [1, 0, 2, 0]
    """
    if weights is None:
        each = torch.ones_like(input, dtype=torch.int64)
    else:
        each = weights.detach() if weights.dtype == torch.float32 else weights.detach().double()
    return torch.zeros(size, dtype=each.dtype, device=input.device).scatter_add(0, input.to(torch.int64), each)


def uniques(
    input: torch.Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
    *,
    size: int,
) -> Any:
    """What `torch.unique` gives where each number below `size` is there; others have a count of 0."""
    if dim is not None:
        raise Refusal("the forward takes unique rows of a tensor")
    found = [torch.arange(size, dtype=input.dtype, device=input.device)]
    found += [input.to(torch.int64)] if return_inverse else []
    found += [counted(input.flatten(), size=size)] if return_counts else []
    return found[0] if len(found) == 1 else tuple(found)


_STATIC: dict[str, Callable] = {"bincount": counted, "unique": uniques}
_DYNAMIC = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"})


def _minlength(node: fx.Node) -> int:
    """Of a `bincount`, 0 of others."""
    least = node.kwargs.get("minlength", node.args[2] if len(node.args) > 2 else 0) if op_name(node) == "bincount" else 0
    return least if isinstance(least, int) else 0


def _has_dynamic_size(node: fx.Node, recording: Recording) -> bool:
    name = op_name(node)
    if not node.op.startswith("call"):
        return False
    if name == "getitem" and node.all_input_nodes[0] in recording.raw:
        return any(a in recording.raw and recording.raw[a].dtype in (torch.bool, torch.uint8) for a in node.all_input_nodes[1:])
    return name in _DYNAMIC or (name == "where" and len(node.args) + len(node.kwargs) == 1)


class Replay:
    """Writes the new forward: `function(module, *tensors of the call)`."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        parts: Parts,
        routing: Routing,
        sources: Sources,
        rows: RowFunction,
        inside: bool,
        lifted_rows: Callable,
        experts: int,
        planted: tuple[Any, ...] | None = None,
        static: bool = True,
    ) -> None:
        first = recordings[0]
        self.a, self.others, self.parts, self.routing, self.sources, self.rows = first, recordings[1:], parts, routing, sources, rows
        self.inside, self.lifted_rows = inside, lifted_rows
        self.experts = experts
        """Of all ranks; `parts` has those of this one."""
        self.may_be_static = static
        self.static: list[fx.Node] = []
        """Counts that were written in a size that does not depend on the data: to be proven."""
        self.planted = planted
        """A recorded tensor, a function of it and further arguments: what is to be read in its place."""
        self.order = {n: i for i, n in enumerate(first.graph.nodes)}
        self.graph = fx.Graph()
        self.module = self.graph.placeholder("module")
        self.env: dict[fx.Node, Any] = {}
        self.attributes: dict[str, fx.Node] = {"": self.module}
        for node in first.inputs:
            self.env[node] = self.graph.placeholder(str(node.target))
        self.sizes: list[tuple[tuple[int, ...], fx.Node, int]] = []
        """(value in each recording, input, dim)"""
        for inputs in zip(*(r.inputs for r in recordings), strict=True):
            shapes = [r.raw[x].shape for r, x in zip(recordings, inputs, strict=True)]
            for dim, values in enumerate(zip(*shapes, strict=True)):
                if len(set(values)) > 1 and values not in [s[0] for s in self.sizes]:
                    self.sizes.append((values, self.env[inputs[0]], dim))

    def function(self) -> Callable:
        leaves, spec = pytree.tree_flatten((self.a.output, self.a.stored))
        nodes = [n for n in leaves if isinstance(n, fx.Node)]
        wanted = self._needed(nodes)
        self.wanted = set(wanted)
        """What is replayed of the first recording."""
        if self.planted is not None and self.planted[0] in self.env:
            self._plant()
        other = [_matching(wanted, self.a, b, self.routing.output) for b in self.others]
        done = False
        before = [n for n in wanted if n not in self._after()]
        ahead = set(before)
        for node in [*before, *(n for n in wanted if n not in ahead)]:
            if node in self._after() and not done:
                self._experts(other)
                done = True
            if node is not self.routing.output and node not in self.env:
                self.env[node] = self._copy(node, other)
                if self.planted is not None and node is self.planted[0]:
                    self._plant()
        if not done:
            raise Refusal("the output of the layer does not depend on its experts")
        results = [self.env[n] if isinstance(n, fx.Node) else n for n in leaves]
        result, stored = pytree.tree_unflatten(results, spec)
        for path, value in stored.items():
            parent, _, name = path.rpartition(".")
            self.graph.call_function(keep, (self._attribute(parent), name, value))
        self.graph.output(_plain(result))
        self.graph.lint()
        code = self.graph.python_code("self")
        forward = _forward_from_src(code.src, {**code.globals, **{c.name: c.value for c in _constants(self.graph)}})
        self.source = code.src
        shape = _Shape.of(result)

        def replayed(module: Any, *tensors: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                torch.ops.ultraep.mark.default(list(tensors), True)
            results = forward(None, module, *tensors)
            if torch.compiler.is_dynamo_compiling():
                torch.ops.ultraep.mark.default(tensors_in(results), False)
            return shape.build(results)

        return replayed

    def _plant(self) -> None:
        assert self.planted is not None
        node, change, *more = self.planted
        self.env[node] = self.graph.call_function(change, (self.env[node], *more))

    # ---- which nodes -------------------------------------------------------------------------------------------------

    def _after(self) -> set[fx.Node]:
        if not hasattr(self, "_below"):
            below = {self.routing.output}
            for node in self.a.graph.nodes:
                if any(a in below for a in node.all_input_nodes):
                    below.add(node)
            self._below = below
        return self._below

    def _needed(self, results: list[fx.Node]) -> list[fx.Node]:
        """Nodes that results, ids, weights and tokens need, experts left out; and writes into what they read."""
        a, routing, sources = self.a, self.routing, self.sources
        read = (sources.ids, sources.weight, routing.base)
        starts = [*results, routing.table, *(n for n in read if n is not None), *self.rows.consts]
        seen: set[fx.Node] = set()
        todo = list(starts)
        writes = [n for n in a.graph.nodes if n.op.startswith("call") and functional_target(n)[0] and n.args]
        kept = {b.untyped_storage().data_ptr() for b in a.owner.buffers()}
        memory = lambda x: a.raw[x].untyped_storage().data_ptr() if x in a.raw else None  # noqa: E731
        todo += [w for w in writes if memory(w.args[0]) in kept and not self.parts.label[w]]  # what the module counts
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node is routing.output:
                continue
            if self.parts.label[node] and node not in self._after() and node not in self.parts.views:
                raise Refusal(f"{node.name}, made inside the experts, is read outside of them")
            todo += node.all_input_nodes
            for write in writes:
                if write not in seen and self._touches(write, node) and write is not routing.output:
                    todo.append(write)
        refuse_foreign([n for n in seen if n is not routing.output])
        self._refuse_exchanges(seen)
        return sorted(seen, key=self.order.__getitem__)

    def _refuse_exchanges(self, wanted: set[fx.Node]) -> None:
        found = next((n for n in self.a.graph.nodes if n in wanted and not is_repeatable(n.meta.get("exchange", "all_reduce"))), None)
        if found is None:
            return
        name = found.meta["exchange"]
        kept = [p for p, n in self.a.stored.items() if self._comes_from(n, found)]
        if kept:
            raise Refusal(
                f"it keeps {', '.join(kept)} in the module, made from what {name} brought. Keep that in a local variable, or in an object "
                "that is no module"
            )
        raise Refusal(
            f"what it does beside its experts depends on {name} ({found.meta.get('source', '')}), which a new forward cannot repeat. "
            "Compute it from this rank's tensors, or behind the layer"
        )

    def _comes_from(self, node: fx.Node, source: fx.Node) -> bool:
        todo, seen = [node], set[fx.Node]()
        while todo:
            at = todo.pop()
            if at not in seen and at is not self.routing.output:
                seen.add(at)
                todo += at.all_input_nodes
        return source in seen

    def _touches(self, write: fx.Node, reader: fx.Node) -> bool:
        """Does a write reach memory that a later reader looks at?"""
        written = write.args[0]
        if not isinstance(written, fx.Node) or written not in self.a.raw or self.order[write] > self.order[reader]:
            return False
        if self.parts.label[write] and write not in self._after():
            return False  # into the sum of the experts: what is before the output is replaced with it
        memory = self.a.raw[written].untyped_storage().data_ptr()
        return any(n in self.a.raw and self.a.raw[n].untyped_storage().data_ptr() == memory for n in reader.all_input_nodes)

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _attribute(self, path: str) -> fx.Node:
        if path not in self.attributes:
            parent, _, name = path.rpartition(".")
            self.attributes[path] = self.graph.call_function(getattr, (self._attribute(parent), name))
        return self.attributes[path]

    def _detached(self, new: Any, recorded: Any) -> Any:
        is_float = isinstance(recorded, fx.Node) and recorded in self.a.raw and self.a.raw[recorded].is_floating_point()
        return self.graph.call_method("detach", (new,)) if is_float else new

    def _held(self, path: str) -> fx.Node:
        """A parameter; of a distributed one, what this rank holds."""
        node = self._attribute(path)
        is_distributed = isinstance(operator.attrgetter(path)(self.a.owner), DTensor)
        return self.graph.call_method("to_local", (node,)) if is_distributed else node

    def _copy(self, node: fx.Node, other: _Twins) -> fx.Node:
        if node.op == "get_attr":
            is_part = node.meta.get("parameter") and not isinstance(self.a.raw[node], DTensor)
            return self._held(str(node.target)) if is_part else self._attribute(str(node.target))
        twins = [pairs[node] for pairs in other]
        args = _each(self._value, node.args, *(t.args for t in twins))
        kwargs = _each(self._value, dict(node.kwargs), *(dict(t.kwargs) for t in twins))
        if (target := self._static(node, twins)) is not None:
            new = self.graph.call_function(target, tuple(args), kwargs | {"size": self._bins(node, self.a)})
        elif node.op == "call_module":
            new = self.graph.call_function(invoke, (self._attribute(str(node.target)), *args), kwargs)
        else:
            if node.meta.get("no_grad") and functional_target(node)[0]:  # a buffer must not become part of the graph
                args = [args[0], *(self._detached(a, b) for a, b in zip(args[1:], node.args[1:], strict=True))]
            new = self.graph.create_node(node.op, node.target, tuple(args), kwargs)
        if node.meta.get("no_grad") and node in self.a.raw and self.a.raw[node].is_floating_point():
            new = self.graph.call_method("detach", (new,))
        return new

    def _static(self, node: fx.Node, twins: Sequence[fx.Node]) -> Callable | None:
        """What counts as this node does, in a size that does not depend on values; None where that is not known to be its meaning."""
        if (target := _STATIC.get(op_name(node))) is None:
            return None
        sizes = {self._bins(n, r) for n, r in zip((node, *twins), (self.a, *self.others), strict=True)}
        if len(sizes) != 1 or None in sizes:
            return None
        if not _minlength(node):
            if not self.may_be_static:
                return None
            self.static.append(node)
        return target

    def _bins(self, node: fx.Node, recording: Recording) -> int | None:
        """The size of a count that has one entry for each expert, or for each number below a `minlength`."""
        given = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(given, fx.Node) or recording.raw[given].is_floating_point():
            return None
        made = node if node in recording.raw else next((u for u in node.users if u.args[1] == 0), None)
        least = _minlength(node) or self.experts
        return least if made in recording.raw and recording.raw[made].numel() == least else None

    @property
    def dynamic(self) -> str:
        """Where what is replayed makes a tensor whose size depends on values, at which graphs break; "" if nowhere."""
        counts = {n for n in self.wanted if op_name(n) in _STATIC and (_minlength(n) or n in self.static)}
        found = next((n for n in self.a.graph.nodes if n in self.wanted - counts and _has_dynamic_size(n, self.a)), None)
        return "" if found is None else str(found.meta.get("source") or found.target)

    def _value(self, a: Any, *others: Any) -> Any:
        if isinstance(a, fx.Node):
            return self.env[a]
        same = all(a == b for b in others)
        if isinstance(a, bool) or not isinstance(a, int) or same:
            if not same and not (isinstance(a, float) and math.isnan(a)):
                raise Refusal(f"the forward computes {a!r} for one batch and {next(b for b in others if b != a)!r} for another")
            return a
        if not all(isinstance(b, int) for b in others):
            raise Refusal(f"the forward computes {a!r} for one batch and no integer for another")
        return self._size((a, *others))

    def _size(self, values: tuple[int, ...]) -> fx.Node:
        """An integer, given by its value in each recording, as a function of input sizes."""
        for count in (1, 2, 3):
            for some in itertools.combinations(self.sizes, count):
                totals = tuple(math.prod(s[0][i] for s in some) for i in range(len(values)))
                if (found := size_function(values, totals, self.experts)) is not None:
                    return found.write(self.graph, self._product(some))
        raise Refusal(
            f"the forward computes the size {values[0]} for one batch and {next(v for v in values if v != values[0])} for another, "
            "which is no function of input sizes that we know"
        )

    def _product(self, some: Sequence[tuple[tuple[int, ...], fx.Node, int]]) -> fx.Node:
        made = [self.graph.call_method("size", (s[1], s[2])) for s in some]
        return functools.reduce(lambda x, y: self.graph.call_function(operator.mul, (x, y)), made)

    def _experts(self, other: _Twins) -> None:
        """Tokens, ids, weights, the experts, and the sum over the choices."""
        g, s, routing = self.graph, self.sources, self.routing
        raw = self.a.raw
        width = raw[routing.table].shape[-1]
        hidden = g.call_method("reshape", (self.env[routing.table], (-1, width)))
        rows = hidden if raw[self.rows.rows].dtype == raw[routing.table].dtype else g.call_method("to", (hidden, raw[self.rows.rows].dtype))
        experts = self.experts
        mask = None
        if s.ids is None:
            ids = None
        elif s.ids_form == "one-hot":
            hot = g.call_method("reshape", (self.env[s.ids], (-1, s.choices, experts)))
            ids = g.call_method("argmax", (g.call_method("to", (hot, torch.int64)), -1))
            mask = g.call_method("sum", (hot, -1))
        elif s.ids_form == "sizes":
            numbers = g.call_function(torch.arange, (experts,), {"device": g.call_function(getattr, (hidden, "device"))})
            count = g.call_method("size", (hidden, 0))
            counts = g.call_method("to", (self.env[s.ids], torch.int64))
            ids = g.call_function(torch.repeat_interleave, (numbers, counts), {"output_size": count})
            ids = g.call_method("unsqueeze", (ids, 1))
        else:
            ids = g.call_method("to", (self._by_token(s.ids, s.ids_form, s.choices, hidden), torch.int64))
        if s.ids_form == "beyond":
            mask = g.call_method("lt", (ids, experts))
            ids = g.call_function(operator.mod, (ids, experts))
        weight = None
        if s.weight is not None:
            weight = self.env[s.weight]
            columns = experts if s.weight_form in ("experts", "slots") else s.choices
            if s.weight_form == "slots":  # perhaps those of each choice
                each = raw[s.weight].shape[:-2].numel() // (raw[routing.table].numel() // width)
                weight = g.call_method("reshape", (g.call_method("sum", (weight, -1)), (-1, each, columns)))
                weight = g.call_method("sum", (weight, 1))
            else:
                weight = self._by_token(s.weight, s.weight_form, columns, hidden)
            if ids is None:
                ids = g.call_function(torch.ops.ultraep.chosen.default, (weight, s.choices))
            if s.weight_form in ("experts", "slots"):
                weight = g.call_method("gather", (weight, 1, g.call_method("clamp", (ids,), {"min": 0})))
            if s.factor != 1:
                weight = g.call_function(operator.mul, (weight, s.factor))
        skip = None
        if routing.skip is not None:
            if mask is None:
                raise Refusal("tokens pass by the experts, and no recorded tensor says which")
            aside = g.call_method("logical_not", (mask,))
            skip = g.call_function(operator.mul, (weight, aside)) if weight is not None else aside
            skip = g.call_method("sum", (skip, 1), {"keepdim": True})
        if s.masked:
            like = g.call_method("to", (mask, raw[routing.output].dtype))
            weight = g.call_function(operator.mul, (weight, mask)) if weight is not None else like
        if s.repeats == "once":
            again = g.call_function(repeats, (ids,))
            one = g.call_method("to", (g.call_method("logical_not", (again,)), raw[routing.output].dtype))
            weight = g.call_method("masked_fill", (weight, again, 0)) if weight is not None else one
        elif s.repeats == "never":
            ids = g.call_function(torch.ops.ultraep.distinct.default, (ids, g.call_method("to", (mask, torch.bool)) if mask is not None else None))
        params = [self._stacked(role) for role in self.rows.roles]
        consts = [self.env[c] if c in self.env else self._copy(c, other) for c in self.rows.consts]
        inner = weight if self.inside else None
        y = g.call_function(self.lifted_rows, (rows, ids, inner, params, consts))
        made = raw[routing.output]
        y = g.call_method("reshape", (y, (-1, s.choices, made.shape[-1])))
        if weight is not None and not self.inside:
            y = g.call_function(operator.mul, (y, g.call_method("unsqueeze", (weight, -1))))
        total = g.call_method("sum", (g.call_method("to", (y, made.dtype)), 1))
        if skip is not None:
            passed = g.call_method("to", (g.call_function(operator.mul, (hidden, skip)), made.dtype))
            total = g.call_function(operator.add, (total, passed))
        if routing.base is not None:
            base = g.call_method("reshape", (self.env[routing.base], (-1, made.shape[-1])))
            total = g.call_function(operator.add, (base, total))
        shapes = [b.raw[pairs[routing.output]].shape for b, pairs in zip(self.others, other, strict=True)]
        sizes = [self._value(*values) for values in zip(made.shape, *shapes, strict=True)]
        self.env[routing.output] = g.call_method("reshape", (total, tuple(sizes)))

    def _by_token(self, source: fx.Node, form: str, columns: int, hidden: fx.Node) -> fx.Node:
        """[T, columns] of a tensor in one of the forms of `sources`."""
        g, value = self.graph, self.env[source]
        if form == "by choice":
            return g.call_method("t", (g.call_method("reshape", (value, (columns, -1))),))
        value = g.call_method("reshape", (value, (-1, columns)))
        if form != "samples":
            return value
        total = g.call_method("size", (hidden, 0))
        each = g.call_function(operator.floordiv, (total, g.call_method("size", (value, 0))))
        return g.call_method("repeat_interleave", (value, each), {"dim": 0, "output_size": total})

    def _stacked(self, role: str) -> fx.Node:
        names = self.parts.holders[role]
        if len(names) > 1:
            return self.graph.call_function(stack_experts, (self.module, [self._attribute(n) for n in names]))
        parameter = self.a.owner.get_parameter(names[0])
        node = self._held(names[0])
        shape = (self.parts.experts, *self.rows.layouts[role])
        whole = tuple(local(parameter).shape)
        if whole == shape:
            return node
        if whole[1:] == shape[1:]:  # more blocks than experts
            return self.graph.call_function(operator.getitem, (node, slice(0, self.parts.experts)))
        return self.graph.call_method("reshape", (node, shape))


def _constants(graph: fx.Graph) -> set[Constant]:
    found: list[Any] = []
    for node in graph.nodes:
        map_aggregate((node.args, node.kwargs), found.append)
    return {c for c in found if isinstance(c, Constant)}


def tensors_in(results: Any) -> list[Tensor]:
    """The tensors of a return value, in the order of pytree leaves; written so that a compiler follows it."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, dict):
        return [t for v in results.values() for t in tensors_in(v)]
    if isinstance(results, (tuple, list)):
        return [t for v in results for t in tensors_in(v)]
    return []


class _Shape:
    """The structure of a return value."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self.build = build

    @classmethod
    def of(cls, result: Any) -> _Shape:
        if result is None or isinstance(result, (fx.Node, tuple, list)) or type(result) is dict:
            return cls(lambda value: value)
        kind = type(result)
        return cls(lambda values: kind(**values))


def _plain(result: Any) -> Any:
    if isinstance(result, dict):
        return {k: _plain(v) for k, v in result.items()}
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        return type(result)(_plain(v) for v in result)
    return result


def _each(use: Callable[..., Any], *values: Any) -> Any:
    """A structure of arguments, from the same structure in every recording."""
    a = values[0]
    if isinstance(a, (tuple, list)) and all(isinstance(v, (tuple, list)) and len(v) == len(a) for v in values):
        made = [_each(use, *parts) for parts in zip(*values, strict=True)]
        return tuple(made) if isinstance(a, tuple) else made
    if isinstance(a, dict) and all(isinstance(v, dict) and v.keys() == a.keys() for v in values):
        return {k: _each(use, *(v[k] for v in values)) for k in a}
    if isinstance(a, slice) and all(isinstance(v, slice) for v in values):
        return slice(*(_each(use, *parts) for parts in zip(*((v.start, v.stop, v.step) for v in values), strict=True)))
    return use(*values)


_Twins = list[dict[fx.Node, fx.Node]]
"""For every further recording, its node for each one of the first."""


def _matching(
    wanted: Sequence[fx.Node], a: Recording, b: Recording, output: fx.Node
) -> dict[fx.Node, fx.Node]:
    """Node of the first recording -> the same node of the second, found from the inputs on.

    The experts' output is the last of its kind where they run one by one, so it is counted from the end.
    """
    pairs: dict[fx.Node, fx.Node] = dict(zip(a.inputs, b.inputs, strict=True))
    attributes = {n.target: n for n in b.graph.nodes if n.op == "get_attr"}
    left = [n for n in b.graph.nodes if n.op.startswith("call")]
    kind = lambda g: [n for n in g.nodes if n.op == output.op and str(n.target) == str(output.target)]  # noqa: E731
    here, there = kind(a.graph), kind(b.graph)
    back = len(here) - here.index(output)
    if back > len(there):
        raise Refusal(f"{output.target} runs for one batch and not for another: the forward follows the data")
    pairs[output] = there[-back]
    at = 0
    for node in wanted:
        if node in pairs:
            continue
        if node.op == "get_attr":
            if node.target not in attributes:
                raise Refusal(f"{node.target} is read for one batch and not for another")
            pairs[node] = attributes[node.target]
            continue
        known = [pairs.get(x) for x in node.all_input_nodes]
        for index in range(at, len(left)):
            twin = left[index]
            same = twin.op == node.op and str(twin.target) == str(node.target)
            if same and len(twin.all_input_nodes) == len(known):
                if all(k is None or k is t for k, t in zip(known, twin.all_input_nodes, strict=True)) and _alike(node, twin):
                    pairs[node] = twin
                    at = index + 1
                    break
        else:
            raise Refusal(f"{node.target} runs for one batch and not for another: the forward follows the data")
    return pairs


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Equal arguments but for sizes."""
    left: list[Any] = []
    right: list[Any] = []
    map_aggregate((a.args, a.kwargs), left.append)
    map_aggregate((b.args, b.kwargs), right.append)
    is_size = lambda x: isinstance(x, int) and a.target is not operator.getitem  # noqa: E731
    return len(left) == len(right) and all(
        type(x) is type(y) and (isinstance(x, fx.Node) or is_size(x) or x == y) for x, y in zip(left, right, strict=True)
    )
