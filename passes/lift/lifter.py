"""Abstract interpretation of a Dynamo graph, forward from the expert ids of one MoE layer.

Every node that touches a tracked value is given a `Value`: its role, what its dims run over, and a node that
computes it in a second graph, the lifted one. There rows have no order: sorting, offsets, permutations and
masks for ids that never occur leave no trace in it. Tensors that enter from the side (token states, routing
weights, shared parameters) are resolved when they are met. It ends where the data is back in token layout;
`cut` then splits the lifted graph.
"""

from __future__ import annotations

import heapq
import logging
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.node import map_arg

from ultraep_compile.passes.lift import outside, rules
from ultraep_compile.passes.lift.faults import is_theirs
from ultraep_compile.passes.lift.generic import generic
from ultraep_compile.passes.lift.markers import expert_take
from ultraep_compile.passes.lift.nodes import (
    GraphFacts,
    example,
    functional_target,
    held,
    is_call,
    op_name,
    tensor,
)
from ultraep_compile.passes.lift.reshape import reshape_labels
from ultraep_compile.passes.lift.sizes import Size, product, same
from ultraep_compile.passes.lift.values import STRUCTURE_ONLY, Call, Dim, Dims, Kind, Refusal, Value, describe, flat

log = logging.getLogger(__name__)
_RESIZES = frozenset({"reshape", "unsqueeze", "squeeze"})


@dataclass(frozen=True, slots=True)
class Stale:
    """Takes the place of a value that was overwritten in a way we cannot follow."""

    reason: str


class Lifter:
    """One interpretation. Its ids [..., K] route T tokens to K experts each.

    With `apart`, each of the T*K pairs counts as a token of one choice: then rows may be laid out as the model
    likes, and what becomes of a pair after its expert is not this site's business.
    """

    def __init__(self, facts: GraphFacts, ids: fx.Node, anchors: Iterable[fx.Node], apart: bool = False) -> None:
        self.facts, self.ids, self.anchors = facts, ids, frozenset(anchors)
        shape = facts.shape(ids)
        apart = apart or len(shape) == 1
        self.tokens: Size = product(shape if apart else shape[:-1])
        self.choices: Size = 1 if apart else shape[-1]
        self.pairs: Size = self.tokens * self.choices
        self.single = same(self.choices, 1)  # no dim of choices, a pair is a token
        self.graph = fx.Graph()
        self.id_in, t, k = map(self.graph.placeholder, ("expert_id", "T", "K"))
        p = self.graph.call_function(operator.mul, (t, k))
        self.size_nodes = {Dim.TOKEN: t, Dim.CHOICE: k, Dim.PAIR: p, Dim.SORTED: p, Dim.EXPERT: -1}
        self.sizes: dict[Dim, Size] = {Dim.PAIR: self.pairs, Dim.SORTED: self.pairs}
        if not self.single:
            self.sizes |= {Dim.TOKEN: self.tokens, Dim.CHOICE: self.choices}
        self._queue: list[int] = []
        self.position = 0  # index of the node being interpreted
        self.env: dict[fx.Node, Any] = {}
        self.values_of: dict[fx.Node, Value] = {}  # of nodes of the lifted graph
        self.reads: dict[fx.Node, list[fx.Node]] = {}
        self.writer: dict[fx.Node, fx.Node] = {}  # last node that wrote into a tensor
        self.refused: dict[fx.Node, str] = {}
        self.params: dict[fx.Node, fx.Node] = {}  # parameter -> placeholder of the lifted graph
        self.consts: dict[fx.Node, fx.Node] = {}
        self.row_sources: dict[fx.Node, fx.Node] = {}  # token states -> placeholder
        self.weights: dict[fx.Node, fx.Node] = {}  # routing weights -> placeholder
        self.output: fx.Node | None = None
        self.output_value: Value | None = None
        self.legal_ids_assumed = False  # something was left out that only matters for ids beyond E
        pair_dims: tuple[Dims, tuple[Size, ...]] = ((Dim.PAIR,), (self.pairs,))
        if len(shape) == 2 and not apart:
            pair_dims = ((Dim.PAIR, None) if self.single else (Dim.TOKEN, Dim.CHOICE), shape)
        elif not self.single:  # several leading dims count as one, that of tokens
            pair_dims = ((Dim.TOKEN, Dim.CHOICE), (self.tokens, self.choices))
        self.env[ids] = Value(Kind.IDS, *pair_dims, held(ids).dtype)

    # ---- the walk ------------------------------------------------------------------------------------

    def run(self, operands: Iterable[fx.Node]) -> None:
        """Interpret until the data is back in token layout; `output` stays None if it never is.

        Args:
            operands: the parameters, or views of parameters, that the anchors read.
        """
        self._queue_users(self.ids, after=self.facts.order[self.ids])
        with unset_fake_temporarily():
            for operand in operands:
                self.param(operand)
            furthest = 0
            while self._queue and self.output is None:
                index = heapq.heappop(self._queue)
                node = self.facts.nodes[index]
                if node in self.reads or node in self.refused:
                    continue
                if index < furthest and functional_target(node)[0]:
                    raise Refusal(f"{node.name} writes to data of the rows before it was known to be that")
                furthest = max(furthest, index)
                self.visit(node)

    def _queue_users(self, node: fx.Node, after: int) -> None:
        for user in node.users:
            if (index := self.facts.order[user]) > after:
                heapq.heappush(self._queue, index)

    def visit(self, node: fx.Node) -> None:
        """Interpret one node and remember what came of it."""
        if not is_call(node) or not _holds_tensors(node):
            return
        in_place, target = functional_target(node)
        destination = node.args[0] if in_place and node.args else None
        outer, self.position = self.position, self.facts.order[node]
        try:
            result = self._step(node, in_place, target)
            self._check_shape(node, result)
        except Refusal as reason:
            self._refuse(node, str(reason), in_place, target is not None)
            return
        except Exception as fault:
            if not is_theirs(fault):
                raise
            log.debug("%s", node.format_node(), exc_info=fault)  # the op does not take rows as they are probed
            self._refuse(node, f"{type(fault).__name__}: {str(fault)[:160]}", in_place, target is not None)
            return
        finally:
            self.position = outer
        if isinstance(result, Value) and self._is_end(result):
            if self.anchors.isdisjoint(result.uses):  # of other experts by the same ids: an outside tensor to these
                del self.reads[node]
                return
            self.output, self.output_value = node, result
        self.env[node] = result
        after = self.facts.order[node]
        if isinstance(destination, fx.Node):
            self._overwrite(destination, result)
            self.writer[destination] = node
            self._queue_users(destination, after)
        self._queue_users(node, after)

    def _check_shape(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Value) and result.kind not in STRUCTURE_ONLY and tensor(node) is not None:
            sizes = self.facts.shape(node)
            if len(sizes) != len(result.sizes) or not all(map(same, sizes, result.sizes)):
                raise Refusal(f"gives {describe(result)} where the model has {list(sizes)}")

    def _refuse(self, node: fx.Node, reason: str, in_place: bool, known: bool) -> None:
        self.refused[node] = f"{op_name(node)}: {reason}"
        if in_place:  # which operands an unknown op writes to is unknown, too
            for written in node.all_input_nodes[:1] if known else node.all_input_nodes:
                self._spoil(written, f"{written.name} may have been overwritten by {node.name}")

    def _overwrite(self, destination: fx.Node, result: Any) -> None:
        old = self.env.get(destination)
        if isinstance(old, Value) and isinstance(result, Value) and result.node is not old.node:
            self._spoil(destination, f"memory shared with {destination.name} is overwritten by a later op")
            result = result.but(storage=old.storage)
        self.env[destination] = result

    def _spoil(self, written: fx.Node, reason: str) -> None:
        """Mark a tensor, and all that may share its memory, as not to be read any more."""
        old = self.env.get(written)
        storages = {id(v.storage) for v in flat(old) if isinstance(v, Value)}
        for other, value in self.env.items():
            if any(isinstance(v, Value) and id(v.storage) in storages for v in flat(value)):
                self.env[other] = Stale(reason)
        self.env[written] = Stale(reason)

    def _is_end(self, value: Value) -> bool:
        if value.kind is not Kind.ROWS or "rows" not in value.uses or not value.dims:
            return False
        if self.single:
            return Dim.SORTED not in value.dims and self.anchors <= value.uses
        return value.dims[0] is Dim.TOKEN and Dim.CHOICE not in value.dims

    def _step(self, node: fx.Node, in_place: bool, target: Callable | str | None) -> Any:
        sources = list(node.all_input_nodes)
        self.reads[node] = sources + [self.writer[a] for a in sources if a in self.writer]
        args = tuple(map_arg(node.args, self.operand))
        kwargs = {k: map_arg(v, self.operand) for k, v in node.kwargs.items() if k not in ("inplace", "out")}
        if in_place and len(args) > 1 and target is node.target:  # F.relu(x, True): the flag goes
            args = tuple(a for a in args if a is not True)
        call = Call(node, op_name(node), target, in_place, args, kwargs)
        for rule in rules.TABLE.get(call.name, ()):
            if (result := rule(self, call)) is not None:
                return result
        return generic(self, call)

    # ---- operands ------------------------------------------------------------------------------------

    def operand(self, node: fx.Node) -> Any:
        value = self.env.get(node, node)
        if isinstance(value, Stale):
            raise Refusal(value.reason)
        return value

    def known(self, operand: Any) -> Value:
        """A tracked value, or an outside tensor resolved to one."""
        value = outside.resolve(self, operand) if isinstance(operand, fx.Node) else operand
        if not isinstance(value, Value):
            raise Refusal(f"{describe(operand)} where data of the rows was expected")
        return value

    def param(self, node: Any) -> Value | None:
        """A per-expert parameter or a view of one, as a value; None for anything else."""
        if isinstance(node, Value):
            return node if node.kind is Kind.PARAM else None
        if not isinstance(node, fx.Node) or (root := self.facts.param_root(node)) is None:
            return None
        if node in self.env:
            return self.env[node]
        if node is root:
            shape = self.facts.shape(node)
            experts = self.sizes.setdefault(Dim.EXPERT, shape[0] if shape else 0)
            if not shape or not same(shape[0], experts):
                raise Refusal(f"parameter {node.name} has no leading dim of {experts} experts")
            self.params[node] = self.graph.placeholder(f"param{len(self.params)}")
            dims: Dims = (Dim.EXPERT, *(None,) * (len(shape) - 1))
            self.env[node] = Value(Kind.PARAM, dims, shape, held(node).dtype, self.params[node])
        else:
            self.param(node.args[0])
            self.visit(node)
            if node in self.refused:
                raise Refusal(self.refused[node])
        value = self.env[node]
        return value if isinstance(value, Value) else None

    def data(self, value: Value) -> fx.Node:
        """Node of the lifted graph that holds a value as data of the rows."""
        if value.kind is Kind.TAKEN:
            assert value.node is not None
            taken = self.graph.call_function(expert_take, (value.node, self.id_in))
            return taken if value.dims[0] is not Dim.TOKEN else self.resized(taken, value.dims, value.sizes)
        if value.node is None:
            raise Refusal(f"{describe(value)} used as data")
        return value.node

    # ---- building the lifted graph -------------------------------------------------------------------

    def emit(self, op: str, target: Any, args: tuple, kwargs: dict | None = None) -> fx.Node:
        return self.graph.create_node(op, target, args, kwargs or {})

    def resized(self, node: fx.Node, dims: Dims, sizes: Iterable[Size], how: str = "reshape") -> fx.Node:
        shape = [self.size_nodes[dim] if dim else size for dim, size in zip(dims, sizes, strict=True)]
        if not all(isinstance(size, (int, fx.Node)) for size in shape):
            raise Refusal(f"{how} to a symbolic size {shape} that is no number of rows")
        return self.emit("call_method", how, (node, shape))

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self.graph.call_method("to", (node, dtype))

    def rows(self, node: fx.Node, dims: Dims, like: fx.Node, uses: Iterable) -> Value:
        """Row data as a node of the user's graph has it, computed by `node` of the lifted graph."""
        value = Value(Kind.ROWS, dims, self.facts.shape(like), held(like).dtype, node, frozenset(uses))
        return self.note(value)

    def note(self, value: Value) -> Value:
        if value.node is not None and value.kind is Kind.ROWS:
            self.values_of.setdefault(value.node, value)
        return value

    def reshaped(self, value: Value, like: fx.Node) -> Value:
        """A value with the shape that `like` has in the user's graph."""
        sizes = self.facts.shape(like)
        dims = reshape_labels(value.dims, value.sizes, sizes, self.sizes)
        if dims is None:
            raise Refusal(f"reshape of {describe(value)} to {list(sizes)} merges rows with another dim")
        if value.kind in STRUCTURE_ONLY:
            return value.but(dims=dims, sizes=sizes)
        if value.node is None or (value.kind is Kind.TAKEN and value.dims[0] is Dim.TOKEN):
            raise Refusal(f"reshape of {describe(value)}")
        return self.as_shape(value, dims, sizes)

    def as_shape(self, value: Value, dims: Dims, sizes: tuple[Size, ...]) -> Value:
        """A value under new dims and sizes; goes back to an earlier node where that has them."""
        assert value.node is not None
        resized = value.kind is Kind.ROWS and value.node.op == "call_method" and value.node.target in _RESIZES
        known = self.values_of.get(value.node.all_input_nodes[0]) if resized else None
        if known is not None and _unsorted(known.dims) == _unsorted(dims) and all(map(same, known.sizes, sizes)):
            return value.but(dims=dims, sizes=sizes, node=known.node)
        raw = (Dim.EXPERT, *dims[1:]) if value.kind is Kind.TAKEN else dims
        return self.note(value.but(dims=dims, sizes=sizes, node=self.resized(value.node, raw, sizes)))


def _unsorted(dims: Dims) -> Dims:
    return tuple(Dim.PAIR if d is Dim.SORTED else d for d in dims)


def _holds_tensors(node: fx.Node) -> bool:
    if node.target is operator.setitem:
        return True
    value = example(node)
    return any(isinstance(v, torch.Tensor) for v in flat(value))
