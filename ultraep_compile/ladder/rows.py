"""An expert's recorded computation as a row function `f(rows, expert_id, params...)`.

The recorded tensors hold rows in one or more leading dims (capacity slots, batches, experts); here every tensor is [N,
...] with one leading dim. What is written is a proposal: it is run against the recorded values, and proven row by row
before use.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ultraep_compile.ladder.recording import Constant, Recording
from ultraep_compile.ladder.regions import ALL, Parts, Region, in_order, row_count
from ultraep_compile.passes.lift.markers import expert_mm, expert_take
from ultraep_compile.passes.lift.nodes import CASTS, RESHAPES, functional_target, op_name
from ultraep_compile.passes.lift.probe import ALONG_A_DIM, WHOLE_TENSOR
from ultraep_compile.passes.lift.rules.products import GROUPED
from ultraep_compile.passes.lift.values import Refusal


@dataclass(frozen=True, slots=True)
class RowFunction:
    module: fx.GraphModule
    """(rows, expert_id, [weight], params..., consts...) -> [N, D_out]."""
    rows: fx.Node
    """The entry that holds the rows."""
    weight: fx.Node | None
    """The entry [.., 1] that scales rows inside, if there is one."""
    roles: list[str]
    """Per-expert tensors, in the order of the parameters."""
    layouts: dict[str, tuple[int, ...]]
    """Role -> shape of one expert's part as it lies in memory."""
    consts: list[fx.Node]


@dataclass(frozen=True, slots=True)
class _Theta:
    node: fx.Node


@dataclass(frozen=True, slots=True)
class _Rows:
    node: fx.Node
    lead: int
    """How many leading dims of the recorded tensor run over rows."""


def row_function(recording: Recording, parts: Parts, region: Region, *, scaled: bool) -> RowFunction:
    """Rewrite a region.

    Args:
        scaled: the entry holds rows times a routing weight, which becomes an input of its own.
    """
    return _Writer(recording, parts, region).write(scaled)


class _Writer:
    def __init__(self, recording: Recording, parts: Parts, region: Region) -> None:
        self.recording, self.parts, self.region = recording, parts, region
        self.count = row_count(recording.raw[region.end])
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.params: dict[str, fx.Node] = {}
        self.layouts: dict[str, tuple[int, ...]] = {}
        self.consts: dict[fx.Node, fx.Node] = {}

    def write(self, scaled: bool) -> RowFunction:
        rows, weight = self._entries()
        rows_in, ids = self.graph.placeholder("rows"), self.graph.placeholder("expert_id")
        self.ids = ids
        weight_in = self.graph.placeholder("weight") if weight is not None or scaled else None
        roles = list(dict.fromkeys(self.parts.parts[n].role for n in self._parts_read()))
        for role in roles:
            self.params[role] = self.graph.placeholder(f"param{len(self.params)}")
        consts = [n for n in self.region.entries if n not in (rows, weight) and n not in ends_of_groups(self.region)]
        for node in consts:
            self.consts[node] = self.graph.placeholder(f"const{len(self.consts)}")
        start: fx.Node = rows_in
        if scaled:
            product = self.graph.call_function(operator.mul, (rows_in, weight_in))
            start = self.graph.call_method("to", (product, self.recording.raw[rows].dtype))
        self.env[rows] = _Rows(start, self.recording.raw[rows].dim() - 1)
        if weight is not None and weight_in is not None:
            self.env[weight] = _Rows(weight_in, self.recording.raw[weight].dim() - 1)
        for node in in_order(self.recording, self.region.nodes):
            self.env[node] = self._step(node)
        end = self.env[self.region.end]
        if not isinstance(end, _Rows):
            raise Refusal("the experts' output does not hold rows")
        self.graph.output(self._flat(end, self.recording.raw[self.region.end].shape[-1]))
        module = fx.GraphModule(nn.Module(), self.graph, "RowFunction")
        return RowFunction(module, rows, weight, roles, self.layouts, consts)

    def _parts_read(self) -> list[fx.Node]:
        read = {a for n in self.region.nodes for a in n.all_input_nodes if a in self.parts.parts}
        return [n for n in self.recording.graph.nodes if n in read]

    def _entries(self) -> tuple[fx.Node, fx.Node | None]:
        rows, weights = [], []
        for node in self.region.entries:
            value = self.recording.raw[node]
            if (node.op == "get_attr" and not node.meta.get("foreign")) or node in ends_of_groups(self.region):
                continue
            if not value.is_floating_point() or row_count(value) != self.count or value.dim() < 2:
                raise Refusal(f"an expert reads {_say(node)} {list(value.shape)}, which has not one row for each of its rows")
            (weights if value.shape[-1] == 1 else rows).append(node)
        if len(rows) != 1 or len(weights) > 1:
            raise Refusal(f"an expert reads {len(rows)} tensors of rows and {len(weights)} of weights, expected one and at "
                         "most one. Put what they read side by side in one tensor")
        return rows[0], weights[0] if weights else None

    # ---- one node ----------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        if node in self.env:
            return self.env[node]
        if node in self.parts.parts:
            self.env[node] = _Theta(self._part(node))
            return self.env[node]
        return self.consts.get(node, node)

    def _part(self, node: fx.Node) -> fx.Node:
        """The stacked parameter, seen as the recorded part is seen."""
        part, raw = self.parts.parts[node], self.recording.raw[node]
        depth = len(self.parts.lead)
        shape, stride = raw.shape[depth:], raw.stride()[depth:]
        order = sorted(range(len(shape)), key=lambda d: -stride[d])
        layout = tuple(shape[d] for d in order)
        if self.layouts.setdefault(part.role, layout) != layout:
            raise Refusal(f"{part.role} is read in two layouts, {layout} and {self.layouts[part.role]}")
        if order == list(range(len(shape))):
            return self.params[part.role]
        back = [order.index(d) + 1 for d in range(len(shape))]
        return self.graph.call_method("permute", (self.params[part.role], (0, *back)))

    def _step(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            raise Refusal(f"an expert calls {node.target}, which was not looked into")
        name = "getattr" if node.target is getattr else op_name(node)
        if held := [c for c in _leaves((node.args, dict(node.kwargs))) if isinstance(c, Constant)]:
            raise Refusal(f"an expert hands a {type(held[0].value).__name__} to {name}")
        args = tuple(map_arg(a, self.value) for a in node.args)
        kwargs = {k: map_arg(v, self.value) for k, v in node.kwargs.items()}
        leaves = [v for v in _leaves((args, kwargs)) if isinstance(v, (_Theta, _Rows))]
        if not leaves:
            raise Refusal(f"{name} makes a tensor inside the experts")
        if all(isinstance(v, _Theta) for v in leaves):
            return _Theta(self._view_of_part(node, name, args, kwargs))
        if name in WHOLE_TENSOR:
            raise Refusal(f"{name} inside the experts mixes rows: what a token becomes depends on those that came along")
        if name in _PRODUCTS and any(isinstance(v, _Theta) for v in leaves):
            return _PRODUCTS[name](self, node, args, kwargs)
        if name in _NORMS and any(isinstance(v, _Theta) for v in leaves):
            return self._norm(node, name, args, kwargs)
        return self._row_by_row(node, name, args, kwargs)

    def _view_of_part(self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict) -> fx.Node:
        source = args[0]
        if not isinstance(source, _Theta) or len([v for v in _leaves((args, kwargs)) if isinstance(v, _Theta)]) != 1:
            raise Refusal(f"{name} of weights alone")
        depth = len(self.parts.lead)
        shift = 1 - depth
        out = self.recording.raw.get(node)
        if name == "t" or (name == "getattr" and args[-1] in ("T", "mT")):
            return self.graph.call_method("transpose", (source.node, -2, -1))
        if name in RESHAPES and out is not None:
            return self.graph.call_method("reshape", (source.node, (-1, *out.shape[depth:])))
        if depth > 1 and name not in CASTS:
            raise Refusal(f"{name} of weights with {depth} dims of experts")
        if name in ("transpose", "swapaxes", "unsqueeze", "squeeze", "select"):
            dims = [d + shift if isinstance(d, int) and d >= 0 else d for d in args[1:]]
            return self.graph.call_method(name, (source.node, *dims), kwargs)
        if name == "permute":
            dims = [d + shift if d >= 0 else d for d in _leaves(args[1:])]
            return self.graph.call_method("permute", (source.node, (*range(shift), *dims)))
        if name in ("chunk", "split") and out is None:
            size, *rest = args[1:]
            dim = kwargs.get("dim", rest[0] if rest else 0)
            return self.graph.call_method(name, (source.node, size), {"dim": dim + shift if dim >= 0 else dim})
        if name == "getitem":
            if isinstance(args[1], int) and node.all_input_nodes[0] not in self.recording.raw:
                return self.graph.call_function(operator.getitem, (source.node, args[1]))
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return self.graph.call_function(operator.getitem, (source.node, (*(slice(None),) * shift, *index)))
        if name in CASTS:
            return self.graph.create_node(node.op, node.target, (source.node, *args[1:]), kwargs)
        raise Refusal(f"{name} of an expert's weights")

    def _row_by_row(self, node: fx.Node, name: str, args: tuple, kwargs: dict) -> Any:
        """An op that treats every row alike: written down as it is, with its dims counted anew."""
        rows = [v for v in _leaves((args, kwargs)) if isinstance(v, _Rows)]
        out = self.recording.raw.get(node)
        if name == "getitem" and isinstance(args[1], int) and node.all_input_nodes[0] not in self.recording.raw:
            return _Rows(self.graph.call_function(operator.getitem, (args[0].node, args[1])), args[0].lead)
        lead = rows[0].lead
        if out is not None:
            lead = self._lead(out, lead)
        if name in RESHAPES | {"squeeze", "unsqueeze"} and out is not None:
            return _Rows(self.graph.call_method("reshape", (rows[0].node, (-1, *out.shape[lead:]))), lead)
        _, target = functional_target(node)
        if target is None:
            raise Refusal(f"{name} writes in place inside the experts")
        inner = max(self._inner(n) for n in node.all_input_nodes if isinstance(self.value(n), _Rows))

        def use(value: Any, recorded: Any) -> Any:
            if isinstance(value, _Rows):
                return value.node
            if isinstance(value, _Theta):
                return self._take(value, recorded, inner)
            return value

        new_args = tuple(_paired(use, v, r) for v, r in zip(args, node.args, strict=True))
        new_kwargs = {k: _paired(use, v, node.kwargs[k]) for k, v in kwargs.items() if k not in ("inplace", "out")}
        if target is node.target and len(new_args) > 1 and functional_target(node)[0]:
            new_args = tuple(a for a in new_args if a is not True)
        new_args, new_kwargs = self._dims(name, rows[0].lead, new_args, new_kwargs)
        op = "call_method" if isinstance(target, str) else "call_function"
        return _Rows(self.graph.create_node(op, target, new_args, new_kwargs), lead)  # type: ignore[arg-type]

    def _norm(self, node: fx.Node, name: str, args: tuple, kwargs: dict) -> _Rows:
        """A norm over the width, then each row's own scale and shift."""
        given = dict(zip(_NORMS[name], args, strict=False)) | kwargs
        recorded: dict[str, Any] = dict(zip(_NORMS[name], node.args, strict=False)) | node.kwargs
        x, shape = given["input"], given["normalized_shape"]
        if not isinstance(x, _Rows) or len(shape) != 1:
            raise Refusal(f"{name} over {len(shape)} dims inside the experts")
        eps = {"eps": given["eps"]} if given.get("eps") is not None else {}
        out = self.graph.call_function(getattr(torch.nn.functional, name), (x.node, tuple(shape)), eps)
        inner = self._inner(recorded["input"])
        for role, op in (("weight", operator.mul), ("bias", operator.add)):
            value = given.get(role)
            if value is not None:
                own = self._take(value, recorded[role], inner) if isinstance(value, _Theta) else value
                out = self.graph.call_function(op, (out, own))
        return _Rows(out, x.lead)

    def _dims(self, name: str, lead: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments that name a dim, for one leading dim instead of `lead`."""

        def moved(dim: Any) -> Any:
            if not isinstance(dim, int) or dim < 0:
                return dim
            if dim < lead:
                raise Refusal(f"{name} along dim {dim} inside the experts mixes rows")
            return dim - lead + 1

        place = _DIM_ARGUMENT.get(name, ALONG_A_DIM.get(name, (None, None))[0])
        if place is not None and len(args) > place:
            args = (*args[:place], moved(args[place]), *args[place + 1 :])
        if "dim" in kwargs:
            kwargs = {**kwargs, "dim": moved(kwargs["dim"])}
        if name == "getitem" and lead != 1 and isinstance(args[1], tuple) and args[1][0] is not Ellipsis:
            args = (args[0], (slice(None), *args[1][lead:]))
        return args, kwargs

    def _inner(self, node: fx.Node) -> int:
        return self.recording.raw[node].dim() - self.env[node].lead

    def _lead(self, out: Tensor, before: int) -> int:
        if math.prod(out.shape[:before]) == self.count:
            return before
        fits = [d for d in range(out.dim()) if math.prod(out.shape[:d]) == self.count]
        if not fits:
            raise Refusal(f"a tensor {list(out.shape)} inside the experts does not hold their {self.count} rows")
        return fits[0]

    def _take(self, theta: _Theta, recorded: fx.Node, inner: int) -> fx.Node:
        """Each row's part, shaped to meet rows with `inner` dims of their own."""
        value = self.recording.raw[recorded]
        depth = len(self.parts.lead)
        shape = value.shape[depth:]
        own = shape[max(0, len(shape) - inner) :]
        if math.prod(own) != math.prod(shape):
            raise Refusal(f"an expert's tensor {list(shape)} meets rows with {inner} dims")
        node = theta.node
        if depth and len(own) != len(shape):
            node = self.graph.call_method("reshape", (node, (-1, *own)))
        padded = (*(1,) * (inner - len(own)), *own)
        taken = self.graph.call_function(expert_take, (node, self.ids))
        return taken if len(padded) == len(own) else self.graph.call_method("reshape", (taken, (-1, *padded)))

    # ---- products ----------------------------------------------------------------------------------------------------

    def _flat(self, rows: _Rows, width: int) -> fx.Node:
        return self.graph.call_method("reshape", (rows.node, (-1, width)))

    def _product(self, node: fx.Node, x: Any, source: fx.Node, weight: Any, transposed: bool, bias: Any) -> _Rows:
        if not isinstance(x, _Rows) or not isinstance(weight, _Theta):
            raise Refusal(f"{op_name(node)} with the experts' weights on the side of the rows")
        out, width = self.recording.raw[node], self.recording.raw[source].shape[-1]
        matrix = self.graph.call_method("transpose", (weight.node, -2, -1)) if transposed else weight.node
        y = self.graph.call_function(expert_mm, (self._flat(x, width), matrix, self.ids))
        if bias is not None:
            holder, recorded = bias
            plain = holder if isinstance(holder, fx.Node) else self._take(holder, recorded, 1)
            y = self.graph.call_function(operator.add, (y, plain))
        inner = out.shape[x.lead :]
        if math.prod(out.shape[: x.lead]) != self.count:
            raise Refusal(f"{op_name(node)} gives {list(out.shape)} for {self.count} rows")
        return _Rows(y if len(inner) == 1 else self.graph.call_method("reshape", (y, (-1, *inner))), x.lead)

    def linear(self, node: fx.Node, args: tuple, kwargs: dict) -> _Rows:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        of_bias = node.args[2] if len(args) > 2 else node.kwargs.get("bias")
        return self._product(node, args[0], node.args[0], weight, True, None if bias is None else (bias, of_bias))  # type: ignore

    def matmul(self, node: fx.Node, args: tuple, kwargs: dict) -> _Rows:
        weight = args[1] if len(args) > 1 else kwargs.get("mat2", kwargs.get("other"))
        return self._product(node, args[0], node.args[0], weight, False, None)  # type: ignore[arg-type]

    def grouped(self, node: fx.Node, args: tuple, kwargs: dict) -> _Rows:
        if kwargs.get("bias") is not None or not any(p.expert == ALL for p in self.parts.parts.values()):
            raise Refusal("a grouped product with a bias, or of less than all experts")
        return self._product(node, args[0], node.args[0], args[1], False, None)  # type: ignore[arg-type]

    def addmm(self, node: fx.Node, args: tuple, kwargs: dict) -> _Rows:
        if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
            raise Refusal("a scaled addmm")
        return self._product(node, args[1], node.args[1], args[2], False, (args[0], node.args[0]))  # type: ignore[arg-type]

    def einsum(self, node: fx.Node, args: tuple, kwargs: dict) -> _Rows:
        equation, operands, recorded = args[0], list(args[1:]), list(node.args[1:])
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands, recorded = list(operands[0]), list(recorded[0])  # pyright: ignore[reportArgumentType]
        if len(operands) != 2 or isinstance(operands[0], _Theta) == isinstance(operands[1], _Theta):
            raise Refusal(f"einsum {equation} of other than rows and weights")
        inputs, _, out = equation.replace(" ", "").replace("...", "").partition("->")
        letters = inputs.split(",")
        at = 0 if isinstance(operands[0], _Theta) else 1
        of_weight, of_x = letters[at], letters[1 - at]
        matrix = of_weight[-2:]
        summed = [c for c in matrix if c in of_x and c not in out]
        if len(summed) != 1 or of_x[-1:] != summed[0] or out[-1:] != matrix.replace(summed[0], "") or of_x[:-1] != out[:-1]:
            raise Refusal(f"einsum {equation} is no product of rows and matrices")
        source = recorded[1 - at]
        assert isinstance(source, fx.Node)
        return self._product(node, operands[1 - at], source, operands[at], matrix[1] == summed[0], None)


_PRODUCTS: dict[str, Callable[[_Writer, fx.Node, tuple, dict], _Rows]] = {
    "linear": _Writer.linear, "matmul": _Writer.matmul, "mm": _Writer.matmul, "bmm": _Writer.matmul,
    "addmm": _Writer.addmm, "baddbmm": _Writer.addmm, "einsum": _Writer.einsum, **dict.fromkeys(GROUPED, _Writer.grouped),
}  # fmt: skip
_NORMS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
_OFFSETS = 2
"""Place of the groups' ends among the arguments of a grouped product."""
_DIM_ARGUMENT = {"chunk": 2, "split": 2, "glu": 1, "sum": 1, "mean": 1, "unbind": 1, "select": 1, "narrow": 1}


def ends_of_groups(region: Region) -> set[fx.Node]:
    """Tensors [E] that say where the rows of each expert end, as grouped products take them."""
    products = [n for n in region.nodes if op_name(n) in GROUPED]
    ends = [n.kwargs.get("offs", n.args[_OFFSETS] if len(n.args) > _OFFSETS else None) for n in products]
    return {n for n in ends if isinstance(n, fx.Node)}


def _leaves(arg: Any) -> list[Any]:
    if isinstance(arg, (tuple, list)):
        return [v for a in arg for v in _leaves(a)]
    if isinstance(arg, dict):
        return [v for a in arg.values() for v in _leaves(a)]
    return [arg]


def _paired(use: Callable[[Any, Any], Any], value: Any, recorded: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_paired(use, v, r) for v, r in zip(value, recorded, strict=True))
    return use(value, recorded)


def _say(node: fx.Node) -> str:
    return str(node.target) if node.op in ("get_attr", "placeholder") else f"the result of {op_name(node)}"
