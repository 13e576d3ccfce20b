"""Questions about single nodes of a Dynamo graph: what they call, what they hold, where they come from."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ultraep_compile.passes.lift.sizes import Size, same, size_of

CASTS = frozenset(
    {
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "int",
        "long",
        "type",
        "type_as",
        "contiguous",
        "clone",
        "detach",
    }
)
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as"})
VIEWS = RESHAPES | {
    "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "unsqueeze", "squeeze", "getitem", "select", "narrow",
    "chunk", "split", "unbind", "getattr", "expand",
}  # fmt: skip
_RANDOM = frozenset({"bernoulli", "multinomial", "normal", "uniform", "exponential", "gumbel_softmax", "rrelu"})
_TRANSFORM = re.compile(
    r"_(?P<kind>vmap|grad|jvp)_((?P<begin>increment)|decrement)_nesting|_((?P<enter>enter)|exit)_dual_level"
)
_OPERATORS_IN_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}


def is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def op_name(node: fx.Node) -> str:
    """Short name of what a node calls, in-place or not: `softmax` for `F.softmax`, `x.softmax_`,
    `aten.softmax.int`.
    """
    return _name(node.op, node.target)


@functools.lru_cache(maxsize=4096)
def _name(op: str, target: Any) -> str:
    if op == "call_method":
        name = str(target)
        if name.startswith("__") and hasattr(operator, name):  # `x.__eq__(y)`, as torch 2.11 writes `x == y`
            return _name("call_function", getattr(operator, name))
    elif op != "call_function":
        return op
    elif target in _OPERATORS_IN_PLACE:
        name = _OPERATORS_IN_PLACE[target].__name__
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
    else:
        name = getattr(target, "__name__", str(target))
    return name if name.startswith("__") else name.rstrip("_")


@functools.cache
def _inplace_position(target: Any) -> int | None:
    """Position of a parameter named `inplace`, as in `F.relu(x, inplace=True)`."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def functional_target(node: fx.Node) -> tuple[bool, Callable[..., Any] | str | None]:
    """(writes into its first argument?, the same op without writing; None if there is none that we know)."""
    target = node.target
    if target in _OPERATORS_IN_PLACE:
        return True, _OPERATORS_IN_PLACE[target]  # type: ignore[index]
    if target is operator.setitem:
        return True, None
    if isinstance(target, str):
        in_place = node.op == "call_method" and target.endswith("_") and not target.endswith("__")
        return in_place, target[:-1] if in_place else target
    if "out" in node.kwargs and node.kwargs["out"] is not None:
        return True, None
    if isinstance(target, torch._ops.OpOverload):
        return (True, None) if target._schema.is_mutable else (False, target)
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.startswith("_") and target is not getattr(operator, name, None):
        return True, getattr(torch, name[:-1], None) or getattr(nn.functional, name[:-1], None)
    position = _inplace_position(target)
    if position is not None and (node.args[position] if len(node.args) > position else node.kwargs.get("inplace")):
        return True, target
    return False, target


def draws_random(node: fx.Node) -> bool:
    """Does a node draw from a random generator?"""
    name = op_name(node)
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "rand" in name or "dropout" in name or name in _RANDOM


def example(node: Any) -> Any:
    """What Dynamo saw flow through a node: a fake tensor, a SymInt, a tuple of these."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def tensor(node: Any) -> torch.Tensor | None:
    value = example(node)
    return value if isinstance(value, torch.Tensor) else None


def held(node: Any) -> torch.Tensor:
    """The fake tensor of a node known to hold one."""
    value = tensor(node)
    assert value is not None, node
    return value


def is_unshard(node: fx.Node) -> bool:
    """The op that gathers a parameter sharded over ranks; what it returns stands for the parameter."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    schema_name = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
    return schema_name == "ultraep::unshard"


def is_param(node: fx.Node) -> bool:
    """A parameter of the model as it enters the graph, or what `functional_call` has put in the place of one."""
    if node.op in ("placeholder", "get_attr"):
        return isinstance(example(node), nn.Parameter) or is_substitute(node)
    return is_unshard(node)


def is_substitute(node: fx.Node) -> bool:
    """A plain tensor in the place of a parameter, as `torch.func.functional_call` leaves it there for one call."""
    place = node.op in ("placeholder", "get_attr") and "_parameters_" in str(node.target)
    return place and tensor(node) is not None and not isinstance(example(node), nn.Parameter)


def is_buffer(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") and "_buffers_" in str(node.target) and tensor(node) is not None


def is_attribute(node: fx.Node) -> bool:
    """A tensor that a module holds without having registered it, as libraries do with LoRA factors while they run."""
    name = str(node.target)  # as Dynamo makes it from the way to the tensor
    outside = node.op == "get_attr" or (node.op == "placeholder" and ("_modules_" in name or name.startswith("L_self_")))
    return outside and tensor(node) is not None and not is_param(node) and not is_buffer(node)


def upstream(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        new = [a for a in todo.pop().all_input_nodes if a not in found]
        found.update(new)
        todo += new
    return found


def module_path(node: fx.Node) -> str:
    """Path of the innermost module a node was called in, as in `named_modules()`; "" at the top or if
    unknown.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"^L\[['\"]\w+['\"]\]|^L__\w+?__", "", path)
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    return re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path).strip(".")


def input_name(node: fx.Node) -> str:
    """A parameter's or buffer's name as in `named_parameters()` where Dynamo says whence it has an input, else the input's own."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    way = re.findall(r"\['([^']+)'\]", name() if callable(name) else name)
    return ".".join(way[1:]) or str(node.target)


def source_line(node: fx.Node) -> str:
    """`file:line, in function: code` of the innermost frame that made a node, if known."""
    trace = (node.meta.get("stack_trace") or "").strip()
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', trace)
    if not frames:
        return ""
    file, line, function, code = frames[-1]
    return f"{file}:{line}, in {function}: {code.strip()}"


class GraphFacts:
    """What several sites of one graph ask again and again, computed once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self._shapes: dict[fx.Node, tuple[Size, ...]] = {}
        self._roots: dict[fx.Node, fx.Node | None] = {}

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """Sizes of a node that holds a tensor."""
        if node not in self._shapes:
            self._shapes[node] = tuple(size_of(d) for d in held(node).shape)
        return self._shapes[node]

    def has_shape(self, node: fx.Node, *sizes: Size) -> bool:
        """Does a node hold a tensor whose first sizes are these?"""
        if tensor(node) is None:
            return False
        shape = self.shape(node)
        return len(shape) >= len(sizes) and all(same(a, b) for a, b in zip(shape, sizes, strict=False))

    def param_root(self, node: Any) -> fx.Node | None:
        """The parameter or buffer a node is a view or cast of (the node itself if it is one), or None.

        What is computed from such alone (weights times scales, LoRA factors added) stands for a parameter, too.
        """
        if not isinstance(node, fx.Node):
            return None
        if node not in self._roots:
            seen_through = is_call(node) and op_name(node) in VIEWS | CASTS and not functional_target(node)[0]
            if not is_param(node) and seen_through and len(node.all_input_nodes) == 1:
                root = self.param_root(node.args[0])
            else:
                root = node if node in self.held_by_modules and not is_attribute(node) else None
            self._roots[node] = root
        return self._roots[node]

    @functools.cached_property
    def constants(self) -> frozenset[fx.Node]:
        """Parameters, buffers, and what is computed from such alone: the same for all rows of all batches."""
        return self._made_of(lambda node: is_param(node) or is_buffer(node))

    @functools.cached_property
    def held_by_modules(self) -> frozenset[fx.Node]:
        """The same with unregistered tensors of modules among what it may be computed from."""
        return self._made_of(lambda node: is_param(node) or is_buffer(node) or is_attribute(node))

    def _made_of(self, is_source: Callable[[fx.Node], bool]) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if is_source(node):
                found.add(node)
            elif is_call(node) and node.all_input_nodes and found.issuperset(node.all_input_nodes):
                if tensor(node) is not None and not functional_target(node)[0] and not draws_random(node):
                    found.add(node)
        return frozenset(found)

    @functools.cached_property
    def _transforms(self) -> list[tuple[int, tuple[str, ...]]]:
        """(index, what torch.func and forward-mode AD have opened from there on), at every change."""
        opened: list[str] = []
        changes = []
        for index, node in enumerate(self.nodes):
            if found := _TRANSFORM.fullmatch(op_name(node)):
                if found["begin"] or found["enter"]:
                    opened.append(found["kind"] or "forward-mode AD")
                elif opened:
                    opened.pop()
                changes.append((index, tuple(opened)))
        return changes

    def transform_at(self, index: int) -> str:
        """The innermost transform that a place in the graph is inside of: `vmap`, `grad`, `jvp`, `forward-mode AD`, or ""."""
        opened = next((opened for at, opened in reversed(self._transforms) if at < index), ())
        return opened[-1] if opened else ""

    @functools.cached_property
    def _modes(self) -> list[tuple[int, tuple]]:
        """(index, grad mode and the autocasts entered from there on), at every change."""
        grad, entered, changes = torch.is_grad_enabled(), (), []
        for index, node in enumerate(self.nodes):
            name = op_name(node)
            if name == "_set_grad_enabled":
                grad = node.args[0]
            elif name in ("_enter_autocast", "_enter_inference_mode"):
                entered = (*entered, node)
            elif name in ("_exit_autocast", "_exit_inference_mode"):
                entered = tuple(n for n in entered if n is not node.args[0])
            else:
                continue
            changes.append((index, (grad, entered)))
        return changes

    def mode_at(self, index: int) -> tuple | None:
        """Grad mode and autocast at a place in the graph; None stands for those at its start."""
        before = [mode for at, mode in self._modes if at < index]
        return before[-1] if before and before[-1] != (torch.is_grad_enabled(), ()) else None
