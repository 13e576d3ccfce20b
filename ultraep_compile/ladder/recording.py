"""Record one eager forward of a module as a graph of torch functions, with the value of every node.

A compiler gives up where Python follows the data (a loop over the experts that were hit, rows picked by `nonzero`); an
eager run does not. What is recorded holds for the probe batch only; which parts of it hold for all batches is for the
rest of this package to prove.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import linecache
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ultraep_compile.ladder.explicit import explicit
from ultraep_compile.ladder.guards import Reads, note_running, own_class
from ultraep_compile.ladder.together import is_repeatable, noticed, reduced, reduction_of
from ultraep_compile.passes.lift.faults import ModelFault, is_theirs, run_theirs, told
from ultraep_compile.passes.lift.values import Refusal

_NUMBERS = frozenset({
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose", "is_nonzero", "__contains__",
})  # fmt: skip
"""Functions that tell Python what is in a tensor."""
_QUESTIONS = frozenset({
    "dtype", "device", "requires_grad", "shape", "ndim", "layout", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_quantized",
    "is_sparse",
})  # fmt: skip
_ASKING = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex", "element_size", "get_device",
})  # fmt: skip
"""Attributes and methods that tell Python what a tensor is, whatever is in it."""
_UNRECORDED = frozenset({"size", "dim", "stride", "numel", "backward", "requires_grad_", "storage_offset", "data_ptr"})


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def sizes(self) -> list[list[int]]:
        """Arguments that are lists of integers: rows of each expert, as Python has counted them."""
        return [list(a) for a in (*self.args, *self.kwargs.values()) if is_sizes(a)]

    def inputs(self) -> list[Tensor]:
        """What a replayed forward is given: the tensors, then the lists of sizes as tensors."""
        return [*self.tensors(), *(torch.tensor(s) for s in self.sizes())]

    def with_tensors(self, new: list[Tensor]) -> Call:
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        rest = iter(new)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
        return Call(args, kwargs)

    def with_sizes(self, new: list[list[int]]) -> Call:
        rest = iter(new)
        swap = lambda a: next(rest) if is_sizes(a) else a  # noqa: E731
        return Call(tuple(map(swap, self.args)), {k: swap(v) for k, v in self.kwargs.items()})


def is_sizes(argument: Any) -> bool:
    whole = isinstance(argument, (list, tuple)) and len(argument) >= 2
    return whole and all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in argument)


@dataclass(slots=True)
class Recording:
    """One forward: the graph (placeholders are the call's tensors in order), and what the module returned."""

    graph: fx.Graph
    values: dict[fx.Node, Any]
    """Of each node that holds a tensor, a copy as it was when the node ran."""
    raw: dict[fx.Node, Tensor]
    """The tensor itself: views of parameters share their memory."""
    owner: nn.Module
    inputs: list[fx.Node]
    output: Any
    """The return value with nodes for tensors."""
    stored: dict[str, fx.Node]
    """Attribute path -> tensor that the forward left in an attribute of a module (an auxiliary loss, say)."""
    exchanges: list[tuple[str, dist.ProcessGroup]]
    """Collectives of several ranks, by name. The node that contains one has it in its `meta["exchange"]`."""
    call: Call
    """What was recorded, as it was given."""
    leaves: dict[nn.Module, str]

    @property
    def result(self) -> Any:
        """The return value itself."""
        return pytree.tree_map(lambda n: self.raw[n] if isinstance(n, fx.Node) else n, self.output)


Planted = tuple[int, Callable[[Tensor], Tensor]]
"""Which of the tensors that a forward makes (its `meta["turn"]`) is to be overwritten as soon as it is there, and with what."""


def record(
    owner: nn.Module,
    call: Call,
    leaves: dict[nn.Module, str],
    reads: Reads | None = None,
    *,
    planted: Planted | None = None,
    live: bool = False,
) -> Recording:
    """Run `owner.forward` once, with a seed that is always the same. What it changes in Python and buffers is afterwards as it was.

    Args:
        leaves: modules to record as one node (by their path), because nothing inside is of interest.
        reads: where to note what Python reads and writes.
        live: the tensors of the call are not leaves already, and gradients are to reach them.
    Raises: ModelFault where the forward itself raises.
    """
    given = call
    if not live:
        call = call.with_tensors([_live(t) for t in call.tensors()])
    reads = reads or Reads(owner, leaves.values())
    recorder = _Recorder(owner, call, reads, planted)
    before = _attributes(owner)
    buffers = [(b, b.detach().clone(), b._version) for b in owner.buffers()]
    devices = sorted({p.device.index or 0 for p in owner.parameters() if p.device.type == "cuda"})
    stored = {}
    try:
        with reads.watching(lambda: recorder.paused > 0, leaves, sys._getframe()):
            with torch.random.fork_rng(devices=devices), torch.enable_grad(), recorder.around(leaves):
                torch.manual_seed(0)
                result = run_theirs(author_forward(owner), owner, *call.args, **call.kwargs)
            recorder.paused += 1  # what we read ourselves is no state
            for path, value in _attributes(owner).items():
                if before.get(path) is not value and id(value) in recorder.env:
                    stored[path] = recorder.env[id(value)]
    except Refusal:
        raise
    except Exception as fault:  # the door to the model's own code
        if is_theirs(fault):
            raise ModelFault(f"its own forward fails: {told(fault)}") from fault
        raise
    finally:
        _restore(owner, before)
        for buffer, value, version in buffers:
            if buffer._version != version:
                buffer.data.copy_(value)  # by its data: to autograd, what was recorded stays as it is
    output = pytree.tree_map(lambda t: recorder.node_of(t) if isinstance(t, Tensor) else t, result)
    return Recording(
        recorder.graph,
        recorder.values,
        recorder.raw,
        owner,
        recorder.inputs,
        output,
        stored,
        recorder.exchanges,
        given,
        leaves,
    )


def author_forward(owner: nn.Module) -> Any:
    """The forward of the module's own class, whatever this package has put before it."""
    return own_class(type(owner)).forward


def _live(tensor: Tensor) -> Tensor:
    """Not a leaf, so that a forward may write into it, and gradients tell what depends on what."""
    tensor = tensor.detach()
    return tensor.requires_grad_().clone() if tensor.is_floating_point() else tensor.clone()


def _attributes(owner: nn.Module) -> dict[str, Any]:
    """Plain tensor attributes of all modules, by path."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in owner.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _restore(owner: nn.Module, before: dict[str, Any]) -> None:
    for path in _attributes(owner):
        parent, _, name = path.rpartition(".")
        module = owner.get_submodule(parent)
        if path in before:
            setattr(module, name, before[path])
        else:
            delattr(module, name)


class _Recorder(TorchFunctionMode):
    def __init__(self, owner: nn.Module, call: Call, reads: Reads, planted: Planted | None) -> None:
        super().__init__()
        self.owner, self.reads = owner, reads
        self.planted, self.turn = planted, 0
        self.graph, self.env, self.alive = fx.Graph(), {}, []
        self.values: dict[fx.Node, Any] = {}
        self.raw: dict[fx.Node, Tensor] = {}
        self.exchanges: list[tuple[str, dist.ProcessGroup]] = []
        self.paused = 0
        self.names = {id(t): n for n, t in (*owner.named_parameters(), *owner.named_buffers())}
        self.plain = {id(t): n for n, t in _attributes(owner).items()}
        self.inputs = []
        for index, tensor in enumerate(call.inputs()):
            node = self.graph.placeholder(f"input{index}")
            self._bind(tensor, node)
            self.inputs.append(node)

    # ---- what a call leaves ----------------------------------------------------------------------------------------

    def _bind(self, tensor: Tensor, node: fx.Node) -> Tensor:
        """Let a node stand for a tensor; returns the one that goes on from here, which is another where something is planted."""
        if node.op != "get_attr":
            node.meta["turn"], self.turn = self.turn, self.turn + 1
            if self.planted is not None and self.planted[0] == node.meta["turn"]:
                tensor = self._plant(tensor, given=node.op == "placeholder")
        self.env[id(tensor)] = node
        self.alive.append(tensor)  # an id is unique only while its object lives
        self.raw[node] = getattr(tensor, "elem", tensor)  # of a result that is still on its way, where it will be
        self.values[node] = tensor if node.op == "get_attr" else tensor.detach().clone()
        return tensor

    def _plant(self, tensor: Tensor, *, given: bool) -> Tensor:
        assert self.planted is not None
        with torch.no_grad():
            new = self.planted[1](tensor)
            return tensor.copy_(new) if given else new

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that holds a tensor; one that nothing recorded made is a parameter, a buffer or a constant."""
        if id(tensor) not in self.env and id(getattr(tensor, "elem", None)) in self.env:
            return self.env[id(tensor.elem)]  # type: ignore[attr-defined]  # a result that is still on its way
        if id(tensor) not in self.env:
            path = self.names.get(id(tensor)) or self.plain.get(id(tensor))
            with self.graph.inserting_after(self.inputs[-1] if self.inputs else None):  # type: ignore[arg-type]
                node = self.graph.create_node("get_attr", path or "constant")
            node.meta["parameter"] = path if id(tensor) in self.names else ""
            node.meta["foreign"] = path is None
            self._bind(tensor, node)
        return self.env[id(tensor)]

    def _emit(self, op: str, target: Any, args: Any, kwargs: Any, out: Any) -> tuple[fx.Node, Any]:
        """Write a call down; returns its node, and its result as it goes on."""
        args = tuple(self._argument(a) for a in args)
        kwargs = {k: self._argument(v) for k, v in kwargs.items()}
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["no_grad"] = not torch.is_grad_enabled()
        node.meta["source"] = _source()
        return node, self._unpack(out, node)

    def _argument(self, value: Any) -> Any:
        """What a call was given, as the graph has it: nodes for tensors, and what Python and numpy values mean to torch."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, slice):
            return slice(*(self._argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, range):
            return list(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, (tuple, list)):
            inner = [self._argument(v) for v in value]
            return type(value)(*inner) if hasattr(value, "_fields") else list(inner) if isinstance(value, list) else tuple(inner)
        if isinstance(value, dict):
            return {k: self._argument(v) for k, v in value.items()}
        if isinstance(value, np.ndarray):
            return self.node_of(torch.as_tensor(value))
        return _plain_value(value)

    def _unpack(self, out: Any, node: fx.Node) -> Any:
        if isinstance(out, Tensor):
            return self._bind(out, node)
        if not isinstance(out, (tuple, list, dict)):
            return out
        new = {}
        for key, part in out.items() if isinstance(out, dict) else enumerate(out):
            if isinstance(part, (Tensor, tuple, list, dict)):
                item = self.graph.call_function(operator.getitem, (node, key))
                item.meta |= {k: node.meta[k] for k in ("no_grad", "source")}
                if (changed := self._unpack(part, item)) is not part:
                    new[key] = changed
        if not new:
            return out
        if isinstance(out, dict):
            return {**out, **new}
        parts = [new.get(index, part) for index, part in enumerate(out)]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)

    # ---- what is intercepted ---------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.paused and args and (name == "__get__" or name in _ASKING):
            self._note_question(func, name, args, kwargs)
        if self.paused or name in _UNRECORDED:
            return run_theirs(func, *args, **kwargs)
        note_running(sys._getframe(1))
        if not kwargs and name in ("einsum", "matmul", "__matmul__"):
            with self:  # its steps are recorded
                if (out := explicit(name, args)) is not None:
                    return out
        if "dropout" in name:  # a random draw says nothing; its node is kept
            out = args[0] if args else kwargs["input"]
            out = out.clone()
        else:
            out = run_theirs(func, *args, **kwargs)
        if name == "__setitem__":
            self._emit("call_function", operator.setitem, args, kwargs, None)
            self._bind(args[0], next(iter(reversed(self.graph.nodes))))
        elif any(isinstance(t, Tensor) for t in pytree.tree_leaves(out)):
            functional = str(func).startswith("_c10d_functional") and "wait_tensor" not in name
            name = name.partition(".")[0]
            if functional and is_repeatable(name) and not kwargs:  # its result is waited for where no recording sees it
                node, out = self._emit("call_function", reduced, args, kwargs, out)
            else:
                node, out = self._emit(*_target(func, name, args), kwargs, out)
            if functional:
                node.meta["exchange"] = name
        elif name in _NUMBERS:
            self._note_numbers(args)
        return out

    def _note_question(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Python asks what a parameter or buffer is."""
        path = self.names.get(id(args[0]))
        if path is None or kwargs:
            return
        if name != "__get__":
            question = operator.methodcaller(name, *args[1:])
        elif (name := func.__self__.__name__) in _QUESTIONS:
            question = operator.attrgetter(name)
        else:
            return
        with torch._C.DisableTorchFunction():
            answer = question(args[0])
        self.reads.ask(self.owner, path, question, name + "".join(f"({a})" for a in args[1:] if isinstance(a, int)), answer)

    def _note_numbers(self, args: Any) -> None:
        """Python was told numbers: where they come from what the module holds alone, nothing but these tells others."""
        todo, held = [], dict[str, Tensor]()
        for tensor in (t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
            if id(tensor) in self.env:
                todo.append(self.env[id(tensor)])
            elif path := self.names.get(id(tensor)) or self.plain.get(id(tensor)):
                held[path] = tensor
        seen = set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op in ("placeholder", "call_module"):
                return  # numbers of the batch
            if node.op == "get_attr" and not node.meta.get("foreign"):
                held[str(node.target)] = self.raw[node]
            todo += node.all_input_nodes
        for path, tensor in held.items():
            self.reads.numbers(path, tensor)

    @contextlib.contextmanager
    def around(self, leaves: dict[nn.Module, str]) -> Iterator[None]:
        plain_apply = torch.autograd.Function.__dict__["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            run = plain_apply.__get__(None, cls)
            if self.paused:
                return run_theirs(run, *args, **kwargs)
            if cls.__name__ == "_ToTorchTensor" and (path := self.names.get(id(args[0]))):
                return self._own_part(path, run, args, kwargs)
            return self._opaque("call_function", cls.apply, run, args, kwargs)

        for module, path in leaves.items():
            module.forward = self._leaf(module, path)
        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
        try:
            with noticed(self._exchanged), self:
                yield
        finally:
            torch.autograd.Function.apply = plain_apply
            for module in leaves:
                del module.forward

    def _own_part(self, path: str, run: Any, args: Any, kwargs: Any) -> Any:
        """What this rank holds of a distributed parameter: a parameter like any other."""
        self.paused += 1
        try:
            out = run(*args, **kwargs)
        finally:
            self.paused -= 1
        node = self.graph.create_node("get_attr", path)
        node.meta |= {"parameter": path, "foreign": False}
        self._bind(out, node)
        return out

    def _exchanged(self, name: str, group: dist.ProcessGroup, args: tuple) -> None:
        self.exchanges.append((name, group))
        written = [t for t in pytree.tree_leaves(args[:1]) if isinstance(t, Tensor) and id(t) in self.env]
        if self.paused or not written:  # inside of something that is one node
            return
        for tensor in written:
            if name == "all_reduce" and (operation := reduction_of(args)):
                node = self.graph.call_function(reduced, (self.node_of(tensor), operation, group.group_name))
            else:
                given = pytree.tree_map(lambda t: self.node_of(t) if isinstance(t, Tensor) else None, args[:2])
                node = self.graph.call_function(getattr(dist, name, dist.all_to_all_single), given)
            node.meta |= {"exchange": name, "no_grad": True, "source": _source()}
            self._bind(tensor, node)

    def _leaf(self, module: nn.Module, path: str) -> Any:
        run = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return run_theirs(run, *args, **kwargs)
            return self._opaque("call_module", path, run, args, kwargs)

        return forward

    def _opaque(self, op: str, target: Any, run: Any, args: Any, kwargs: Any) -> Any:
        self.paused += 1
        before = len(self.exchanges)
        try:
            out = run_theirs(run, *args, **kwargs)
            node, out = self._emit(op, target, args, kwargs, out)
        finally:
            self.paused -= 1
        if len(self.exchanges) > before:
            names = [name for name, _ in self.exchanges[before:]]
            node.meta["exchange"] = next((n for n in names if not is_repeatable(n)), names[0])
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """An object that a call was given and that has no name in generated source, a random generator say; `name` stands for it there."""

    value: Any

    @property
    def name(self) -> str:
        return f"{type(self.value).__name__.lower()}_{id(self.value):x}"

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
"""What torch takes Python's types for."""
_WRITTEN = (type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout)
"""Values that generated source names as they print."""


def _plain_value(value: Any) -> Any:
    if isinstance(value, type) and value in _DTYPES:
        return _DTYPES[value]
    if isinstance(value, np.generic):
        return value.item()
    for kind in (bool, int, float, complex, str):
        if type(value) is kind:
            return value
        if isinstance(value, kind):  # an enum, or a class of the user's
            return kind(value.value if isinstance(value, enum.Enum) else value)  # type: ignore[arg-type]
    return value if isinstance(value, _WRITTEN) else Constant(value)


def _target(func: Any, name: str, args: Any) -> tuple[str, Any, Any]:
    """How to write a call down: operators as such, methods as methods."""
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name.startswith("__") and name.endswith("__"):
        short = name[2:-2]
        if hasattr(operator, name):
            return "call_function", getattr(operator, name), args
        if short[0] == "r" and hasattr(operator, f"__{short[1:]}__"):
            return "call_function", getattr(operator, f"__{short[1:]}__"), tuple(reversed(args))
        if short in ("rdiv", "div"):
            return "call_function", operator.truediv, args if short == "div" else tuple(reversed(args))
        if short in ("idiv",):
            return "call_function", operator.itruediv, args
    if getattr(torch.Tensor, name, None) is func:
        return "call_method", name, args
    if getattr(torch.Tensor, f"__{name}__", None) is func:  # an operator under another name, as `**` is
        return "call_function", getattr(operator, f"__{name}__"), args
    return "call_function", func, args


def _source() -> str:
    """`file:line: code` of the innermost frame outside torch and this package."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith(_HERE):
            line = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
            return f"{file}:{frame.f_lineno}, in {frame.f_code.co_name}: {line}"
        frame = frame.f_back
    return ""


_HERE = __file__.rsplit("/", 1)[0]


def refuse_foreign(nodes: list[fx.Node]) -> None:
    for node in nodes:
        if node.meta.get("foreign"):
            readers = ", ".join(str(u.target) for u in list(node.users)[:2])
            raise Refusal(f"{readers} reads a tensor that is neither made by the forward nor held by the module")
