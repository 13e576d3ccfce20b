"""Tensors that enter a site from the side: token states, routing weights, shared parameters, scalars.

They are resolved backwards from the op that meets them. Whatever depends on activations and is neither the
token states nor the routing weights is refused: lifted, it would be a constant of the batch that was traced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ultraep_compile.passes.lift.nodes import (
    CASTS,
    RESHAPES,
    VIEWS,
    example,
    functional_target,
    held,
    is_buffer,
    is_call,
    is_param,
    op_name,
    tensor,
)
from ultraep_compile.passes.lift.sizes import product, same, size_of
from ultraep_compile.passes.lift.values import Call, Dim, Dims, Kind, Refusal, Value

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter

_PASS_THROUGH = CASTS | RESHAPES | {"unsqueeze", "squeeze", "expand"}
_SCALAR_OPS = frozenset({"neg", "add", "sub", "mul", "truediv", "pow"})


def with_sides(lift: Lifter, call: Call) -> Call:
    """The call with each outside node replaced by a value."""

    def side(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        symbol = example(arg)
        if isinstance(symbol, (torch.SymFloat, torch.SymInt)) and symbol.node.expr.is_number:
            return float(symbol.node.expr) if isinstance(symbol, torch.SymFloat) else int(symbol.node.expr)
        if isinstance(symbol, torch.SymFloat):
            return scalar(lift, arg)
        if tensor(arg) is None:
            what = "a symbolic size" if isinstance(symbol, torch.SymInt) else "which is no tensor"
            raise Refusal(f"takes {arg.name}, {what}")
        value = constant(lift, arg) or resolve(lift, arg)
        if value is None:
            raise Refusal(f"reads {arg.name}, which is neither a parameter nor data of the rows")
        return value

    args = map_aggregate(call.args, side)
    kwargs = map_aggregate(call.kwargs, side)
    return Call(call.node, call.name, call.target, call.in_place, args, kwargs)  # type: ignore[arg-type]


# ---- shared parameters and scalars ----------------------------------------------------------------------------------


def constant(lift: Lifter, node: fx.Node) -> Value | None:
    """A parameter or buffer that all rows share, or something computed from such alone."""
    if node not in lift.facts.constants:
        return None
    if is_param(node) or is_buffer(node):
        if node in lift.params:
            raise Refusal(f"reads {node.name}, the parameters of all experts, for each row")
        if node not in lift.consts:
            lift.consts[node] = lift.graph.placeholder(f"const{len(lift.consts)}")
        return _shared(lift, node, lift.consts[node])
    inputs = {a: constant(lift, a) for a in node.all_input_nodes}
    return _shared(lift, node, lift.graph.node_copy(node, lambda a: inputs[a].node))  # type: ignore


def _shared(lift: Lifter, node: fx.Node, lifted: fx.Node) -> Value:
    value = held(node)
    dims: Dims = (None,) * value.ndim
    return Value(Kind.ROWS, dims, lift.facts.shape(node), value.dtype, lifted, frozenset({"const"}))


def scalar(lift: Lifter, node: fx.Node) -> Value:
    """A float that Dynamo made symbolic: it enters as the 0-d tensor it came from, so that nothing is
    specialised to it.
    """
    if op_name(node) == "item" and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder":
        source = node.args[0]
        if source not in lift.consts:
            lift.consts[source] = lift.graph.placeholder(f"const{len(lift.consts)}")
        lifted = lift.graph.call_method("detach", (lift.consts[source],))
    elif op_name(node) in _SCALAR_OPS and node.op == "call_function":
        lifted = lift.graph.node_copy(node, lambda a: scalar(lift, a).node)  # type: ignore[return-value]
    else:
        raise Refusal(f"takes {node.name}, a symbolic float that is not read from a module")
    return Value(Kind.ROWS, (), (), torch.float64, lifted, frozenset({"const"}))


# ---- data of the rows -----------------------------------------------------------------------------------------------


def resolve(lift: Lifter, node: fx.Node) -> Value | None:
    """An outside tensor as data of the rows, or None if it is not."""
    if node in lift.env:
        value = lift.operand(node)
        return value if isinstance(value, Value) else None
    if tensor(node) is None or lift.facts.param_root(node):
        return None
    value = _routing_weight(lift, node) or _token_rows(lift, node)
    if value is not None:
        lift.env[node] = value
    elif is_call(node):
        inner = next((a for a in node.args if isinstance(a, fx.Node)), None)
        if inner is None or not _leads_to_rows(lift, node, inner):
            return None
        lift.visit(node)
        if node in lift.refused:
            raise Refusal(lift.refused[node])
        value = lift.env.get(node)
    if value is not None:
        _replay_writes(lift, node)
        value = lift.operand(node)
    return value if isinstance(value, Value) else None


def _leads_to_rows(lift: Lifter, node: fx.Node, inner: fx.Node) -> bool:
    if op_name(node) in _PASS_THROUGH:
        return resolve(lift, inner) is not None
    return not lift.single and lift.facts.has_shape(node, lift.pairs)


def _routing_weight(lift: Lifter, node: fx.Node) -> Value | None:
    """A float tensor with one entry per pair."""
    shape = lift.facts.shape(node)
    flat = lift.single and len(shape) == 1 and same(shape[0], lift.tokens)
    if (source := _flattened(lift, node)) is not None:
        holder = lift.weights[source] = lift.graph.placeholder("weight")
        return lift.rows(lift.resized(holder, (Dim.PAIR,), shape), (Dim.PAIR,), node, {"weight"})
    by_pair = flat or lift.facts.has_shape(node, lift.tokens, lift.choices)
    if not held(node).is_floating_point() or not by_pair or not all(same(size, 1) for size in shape[2:]):
        return None
    holder = lift.weights[node] = lift.graph.placeholder("weight")
    leading: Dims = (Dim.PAIR, None) if lift.single else (Dim.TOKEN, Dim.CHOICE)
    dims = leading[: len(shape)] + (None,) * len(shape[2:])
    lifted = holder if len(shape) == 2 else lift.resized(holder, dims, shape)
    return lift.rows(lifted, dims, node, {"weight"})


def _flattened(lift: Lifter, node: fx.Node) -> fx.Node | None:
    """The weights [..., K] that a node lays out as pairs, where several leading dims count as one: w.view(-1)."""
    source = node.args[0] if is_call(node) and op_name(node) in RESHAPES else None
    if lift.single or not isinstance(source, fx.Node) or tensor(source) is None or len(lift.facts.shape(node)) != 1:
        return None
    *leading, last = lift.facts.shape(source)
    fits = len(leading) > 1 and same(last, lift.choices) and same(product(leading), lift.tokens)
    return source if fits and held(source).is_floating_point() else None


def _token_rows(lift: Lifter, node: fx.Node) -> Value | None:
    """Token states, each once per choice: repeat_interleave(h, K), or h[:, None] expanded."""
    if lift.single:
        if len(lift.facts.shape(node)) == 2 and lift.facts.has_shape(node, lift.tokens):
            return dispatch(lift, node, Dim.PAIR)
        return None
    name = op_name(node)
    if name == "repeat_interleave" and lift.facts.has_shape(node, lift.pairs):
        source, repeats = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if isinstance(source, fx.Node) and dim == 0 and same_as(repeats, lift.choices):
            return dispatch(lift, source, Dim.PAIR)
    if name == "expand" and lift.facts.has_shape(node, lift.tokens, lift.choices):
        source = _unsqueezed(lift, node.all_input_nodes[0])
        if source is not None:
            value = dispatch(lift, source, Dim.PAIR)
            return lift.as_shape(value, (Dim.TOKEN, Dim.CHOICE, None), lift.facts.shape(node))
    return None


def _unsqueezed(lift: Lifter, node: Any) -> fx.Node | None:
    """h where the node is h with a dim of 1 behind the tokens."""
    is_made = isinstance(node, fx.Node) and is_call(node) and len(node.all_input_nodes) == 1
    source = node.all_input_nodes[0] if is_made else None
    if not isinstance(source, fx.Node):
        return None
    shape = lift.facts.shape(node) if tensor(node) is not None else ()
    if op_name(node) not in RESHAPES | {"unsqueeze", "getitem"} or tensor(source) is None or len(shape) != 3:
        return None
    wanted = (lift.tokens, 1, shape[2])
    if not lift.facts.has_shape(node, *wanted) or not lift.facts.has_shape(source, lift.tokens, shape[2]):
        return None
    return source if len(lift.facts.shape(source)) == 2 else None


def dispatch(lift: Lifter, hidden: fx.Node, layout: Dim) -> Value:
    """Rows of the token states, one per pair."""
    if hidden in lift.env and hidden not in lift.row_sources:
        raise Refusal(f"gathers tokens from {hidden.name}, which is computed inside the site")
    if tensor(hidden) is None or len(lift.facts.shape(hidden)) != 2 or not lift.facts.has_shape(hidden, lift.tokens):
        raise Refusal(f"gathers tokens from {hidden.name}, which is not [tokens, width]")
    if hidden not in lift.row_sources:
        lift.row_sources[hidden] = lift.graph.placeholder("rows")
    sizes = (lift.pairs, lift.facts.shape(hidden)[1])
    node = lift.row_sources[hidden]
    return lift.note(Value(Kind.ROWS, (layout, None), sizes, held(hidden).dtype, node, frozenset({"rows"})))


def same_as(arg: Any, size: Any) -> bool:
    """Is an argument (an int or a node that holds a SymInt) this size?"""
    value = example(arg) if isinstance(arg, fx.Node) else arg
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and same(size_of(value), size)


def _replay_writes(lift: Lifter, node: fx.Node) -> None:
    """A tensor resolved late may have been written to before it is read: interpret these writes now."""
    order, reader = lift.facts.order, lift.position
    for user in list(node.users):
        if order[user] >= reader or not is_call(user):
            continue
        if functional_target(user)[0] and user.args[0] is node and user not in lift.reads:
            lift.visit(user)
        elif op_name(user) in VIEWS and user not in lift.env:
            for inner in user.users:
                if functional_target(inner)[0] and inner.args[0] is user and order[inner] < reader:
                    raise Refusal(f"{node.name} is written to through its view {user.name}")
