"""The row function of a site, compiled once to explicit forward and backward programs over masters and slots.

A site gives `y = f(rows, expert_id, params...)` in logical form: products `expert_mm(x, W, expert_id)`, takes
`expert_take(b, expert_id)`, and ops that treat every row alike. Here each parameter becomes a pair (masters, slots);
views of a parameter are replayed on both, and the two markers become the grouped ops of `ultraep_compile.ops`.

A custom op runs below autograd, so the gradient of f is traced ahead of time, with a symbolic number of rows, and split
so that the forward keeps only the rows and the products' outputs; everything else is recomputed row by row in backward.
Weights, slots in particular, are inputs of both programs and never kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from ultraep_compile.ops.grouped_gemm import expert_take, grouped_gemm, grouped_product_into


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one input; the leading dim of `rows` and `weight` is symbolic and not part of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RowSignature:
    """What a row program is specialised to.

    `params` are per-expert tensors without their leading expert dim.
    """

    masters: int
    slots: int
    rows: TensorSpec
    weight: TensorSpec | None
    params: tuple[TensorSpec, ...]
    consts: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    masters: Any
    slots: Any


class _Physical(fx.Interpreter):
    """Runs a logical row function on pairs of masters and slots."""

    def __init__(self, row_function: fx.GraphModule, offsets: Tensor, is_product: Callable, is_take: Callable) -> None:
        super().__init__(row_function)
        self.offsets, self.is_product, self.is_take = offsets, is_product, is_take

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_function" and self.is_product(n.target):
            x, weight = args[0], args[1]
            return grouped_gemm(x, weight.masters, weight.slots, self.offsets)
        if n.op == "call_function" and self.is_take(n.target):
            return expert_take(args[0].masters, args[0].slots, self.offsets, self._rows)
        if any(isinstance(a, _Pair) for a in args):
            both = [[getattr(a, side) if isinstance(a, _Pair) else a for a in args] for side in ("masters", "slots")]
            run = getattr(self, n.op)
            return _Pair(run(n.target, tuple(both[0]), kwargs), run(n.target, tuple(both[1]), kwargs))
        return getattr(self, n.op)(n.target, args, kwargs)

    def run_on(self, rows: Tensor, inputs: Sequence[Any]) -> Any:
        self._rows = rows.shape[0]
        return self.run(rows, None, *inputs)  # ids of rows are implied by the offsets


@dataclass(frozen=True, slots=True)
class LastProduct:
    """A program whose first output is a grouped product, taken apart so that the product can be written to a given place."""

    before: fx.GraphModule
    """The program with the rows that enter that product as its first output."""
    weights: fx.GraphModule
    """Masters and slots, as the product reads them, and offsets: views of inputs."""

    @classmethod
    def of(cls, program: fx.GraphModule) -> LastProduct | None:
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        first, *rest = next(n for n in program.graph.nodes if n.op == "output").args[0]
        if not isinstance(first, fx.Node) or first.target is not torch.ops.ultraep.grouped_gemm.default or first in rest:
            return None
        x, *others = first.args
        return cls(_extract(program, inputs, [x, *rest]), _extract(program, inputs, others))  # pyright: ignore


@dataclass(frozen=True, slots=True)
class RowProgram:
    """Explicit forward and backward of a row function.

    `forward(rows, weight?, masters..., slots..., consts..., offsets) -> (y, *kept)`;
    `backward(inputs of forward, *kept, grad_y) -> gradients of (rows, weight?, masters..., slots..., consts...)`.
    """

    key: str
    signature: RowSignature
    forward_module: fx.GraphModule
    backward_module: fx.GraphModule
    result: TensorSpec
    """One row of the result."""
    kept: int
    """How many tensors, all with N leading rows, the forward keeps beside its inputs."""
    flops_per_row: int
    """Multiplications and additions of the forward's products, per row."""
    out_bytes_per_row: int
    kept_bytes_per_row: int
    """Memory that one row holds between forward and backward."""
    fuse: bool = False
    """Let Inductor fuse what lies between the products, on a GPU."""
    forward_end: LastProduct | None = None
    """How the forward ends, if with a product."""
    backward_end: LastProduct | None = None
    """Likewise how the backward makes the gradient of `rows`."""

    def forward_into(self, inputs: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        """`forward` with the result in `out`; returns what is kept."""
        if self.forward_end is None:
            y, kept = self.forward(inputs)
            out.copy_(y)
            return kept
        x, *kept = self._pick(self.forward_end.before, inputs)(*inputs)
        grouped_product_into(x, *self.forward_end.weights(*inputs), out)
        return kept

    def backward_into(
        self, inputs: Sequence[Tensor], kept: Sequence[Tensor], grad_y: Tensor, out: Tensor
    ) -> list[Tensor | None]:
        """`backward` with the gradient of `rows` in `out`; returns the others."""
        if self.backward_end is None:
            grad_rows, *rest = self.backward(inputs, kept, grad_y)
            out.zero_() if grad_rows is None else out.copy_(grad_rows)
            return rest
        x, *rest = self._pick(self.backward_end.before, inputs)(*inputs, *kept, grad_y)
        grouped_product_into(x, *self.backward_end.weights(*inputs, *kept, grad_y), out)
        return rest

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        y, *kept = self._pick(self.forward_module, inputs)(*inputs)
        return y, kept

    def backward(self, inputs: Sequence[Tensor], kept: Sequence[Tensor], grad_y: Tensor) -> list[Tensor | None]:
        return list(self._pick(self.backward_module, inputs)(*inputs, *kept, grad_y))

    def _pick(self, plain: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """The fused program for real rows on a GPU; fake ones, in a compiler's hands, only need shapes."""
        if not self.fuse or not inputs[0].is_cuda or isinstance(inputs[0], FakeTensor):
            return plain
        return _fused(plain)


@functools.cache
def _fused(plain: fx.GraphModule) -> Callable[..., Any]:
    """A program compiled by Inductor. As a new module: Dynamo never compiles code that was made while it compiled other code."""
    return torch.compile(fx.GraphModule(plain, plain.graph))


_programs: dict[tuple, RowProgram] = {}


def compile_row_function(
    row_function: fx.GraphModule,
    signature: RowSignature,
    *,
    is_product: Callable[[Any], bool],
    is_take: Callable[[Any], bool],
    fuse: bool = False,
) -> RowProgram:
    """Trace a logical row function into a `RowProgram`; equal functions with equal signatures share one.

    Args:
        row_function: placeholders rows, expert_id, (weight if signature.weight), params..., consts...; returns [N, D_out].
        is_product, is_take: recognise the two markers by call target.
        fuse: let Inductor fuse what lies between the products, on a GPU. Values then differ from those of the op-by-op program
            by fewer roundings; rows stay independent of one another.
    """
    text = row_function.print_readable(print_output=False, include_stride=False, include_device=False)
    key = (row_function.code, text, signature, fuse)
    if key not in _programs:
        with unset_fake_temporarily(), undisturbed():
            program = _trace(row_function, signature, is_product, is_take)
        _programs[key] = dataclasses.replace(program, fuse=fuse)
    return _programs[key]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever the user's step runs under (an activation checkpoint, which counts the tensors that autograd saves; hooks that
    offload them; anomaly detection) is no concern of traces and trials.
    """
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with as_it_is, torch.autograd.set_detect_anomaly(False):
        yield


def _trace(row_function: fx.GraphModule, sig: RowSignature, is_product: Callable, is_take: Callable) -> RowProgram:
    count = len(sig.params)
    weights = 0 if sig.weight is None else 1

    def physical(flat: Sequence[Tensor]) -> Tensor:
        rows, rest, offsets = flat[0], flat[1:-1], flat[-1]
        weight, masters = rest[:weights], rest[weights : weights + count]
        slots, consts = rest[weights + count : weights + 2 * count], rest[weights + 2 * count :]
        pairs = [_Pair(m, s) for m, s in zip(masters, slots, strict=True)]
        return _Physical(row_function, offsets, is_product, is_take).run_on(rows, [*weight, *pairs, *consts])

    def joint_function(flat: Sequence[Tensor], grad_y: Tensor) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(t.dtype.is_floating_point) for t in flat]
        with torch.enable_grad():
            y = physical(leaves)
        wanted = [t for t in leaves[:-1] if t.requires_grad]  # quantised weights have no gradient
        grads = iter(torch.autograd.grad(y, wanted, grad_y, allow_unused=True))
        return [y, *(next(grads) if t.requires_grad else None for t in leaves[:-1])]

    rows = _marker_size(sig)
    inputs = _meta_inputs(sig, rows)
    with torch.no_grad():
        y = physical(inputs)
    joint = make_fx(joint_function)(inputs, torch.empty_like(y))
    _generalise_rows(joint, rows)
    forward, backward, kept = _split(joint)
    digest = hashlib.sha256((forward.code + backward.code + repr(sig)).encode()).hexdigest()[:16]
    products = [n for n in forward.graph.nodes if n.target is torch.ops.ultraep.grouped_gemm.default]
    flops = sum(2 * n.args[0].meta["val"].shape[1] * n.meta["val"].shape[1] for n in products)
    results = next(n for n in forward.graph.nodes if n.op == "output").args[0]
    out_bytes, *kept_bytes = [math.prod(n.meta["val"].shape[1:]) * n.meta["val"].dtype.itemsize for n in results]
    ends = {"forward_end": LastProduct.of(forward), "backward_end": LastProduct.of(backward)}
    result = TensorSpec(tuple(y.shape[1:]), y.dtype)
    return RowProgram(digest, sig, forward, backward, result, kept, flops, out_bytes, sum(kept_bytes), **ends)


def _marker_size(sig: RowSignature) -> int:
    """A number of rows that no other size of the trace is a multiple of, so that it can be told apart."""
    specs = [sig.rows, *([sig.weight] if sig.weight else []), *sig.params, *sig.consts]
    sizes = {d for spec in specs for d in spec.shape}
    return next(p for p in _MARKERS if not any(d and d % p == 0 for d in sizes))


_MARKERS = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121, 1000133, 1000151)


def _meta_inputs(sig: RowSignature, rows: int) -> list[Tensor]:
    def meta(leading: tuple[int, ...], spec: TensorSpec) -> Tensor:
        return torch.empty(*leading, *spec.shape, dtype=spec.dtype, device="meta")

    made = [meta((rows,), sig.rows)]
    if sig.weight is not None:
        made.append(meta((rows,), sig.weight))
    made += [meta((sig.masters,), spec) for spec in sig.params]
    made += [meta((sig.slots,), spec) for spec in sig.params]
    made += [meta((), spec) for spec in sig.consts]
    made.append(torch.empty(sig.masters + sig.slots + 1, dtype=torch.int32, device="meta"))
    return made


def _generalise_rows(joint: fx.GraphModule, rows: int) -> None:
    """Replace the marker size by the actual number of rows wherever the trace wrote it down as a constant."""
    first = next(n for n in joint.graph.nodes if n.op == "placeholder")
    last = [n for n in joint.graph.nodes if n.op == "placeholder"][-1]
    with joint.graph.inserting_after(last):
        size = joint.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))

    def general(value: Any, node: fx.Node) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(general(v, node) for v in value)
        if isinstance(value, int) and value >= rows and value % rows == 0:
            if value == rows:
                return size
            with joint.graph.inserting_before(node):
                return joint.graph.call_function(operator.mul, (size, value // rows))
        return value

    for node in list(joint.graph.nodes):
        if node.op == "call_function" and node is not size:
            node.args = tuple(general(a, node) for a in node.args)
            node.kwargs = {k: general(v, node) for k, v in node.kwargs.items()}
        if node.kwargs.get("device") == torch.device("meta"):
            with joint.graph.inserting_before(node):
                node.kwargs = {**node.kwargs, "device": joint.graph.call_function(getattr, (first, "device"))}


def _is_kept(node: fx.Node) -> bool:
    """Products are dear, and a random draw cannot be drawn again: everything else is recomputed in backward."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return (
        node.target is torch.ops.ultraep.grouped_gemm.default or torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _split(joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """Joint graph -> forward and backward graphs with the calling convention of `RowProgram`."""
    holders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    primals, tangent = holders[:-1], holders[-1]
    output = next(n for n in joint.graph.nodes if n.op == "output")
    y, *grads = output.args[0]
    after_tangent: set[fx.Node] = {tangent}
    for n in joint.graph.nodes:
        if any(a in after_tangent for a in n.all_input_nodes):
            after_tangent.add(n)
    ahead = _ancestors([y], stop=set())
    candidates = [n for n in joint.graph.nodes if n in ahead and _is_kept(n) and n is not y]
    needed = _ancestors([g for g in grads if isinstance(g, fx.Node)], stop=set(candidates))
    kept = [n for n in candidates if n in needed]
    assert all(n not in after_tangent for n in kept)
    forward = _extract(joint, primals, [y, *kept])
    backward = _extract(joint, [*primals, *kept, tangent], grads[: len(primals) - 1])  # offsets have no gradient
    return forward, backward, len(kept)


def _ancestors(nodes: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            if n not in stop:
                todo += n.all_input_nodes
    return seen


def _extract(joint: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node | None]) -> fx.GraphModule:
    """The part of a graph between inputs and outputs, as a module of its own."""
    graph, env = fx.Graph(), {}
    for n in inputs:
        env[n] = graph.placeholder(n.name)
    wanted = _ancestors([o for o in outputs if o is not None], stop=set(inputs))
    for n in joint.graph.nodes:
        if n in wanted and n not in env:
            env[n] = graph.node_copy(n, lambda a: env[a])
    graph.output(tuple(None if o is None else env[o] for o in outputs))
    return fx.GraphModule(joint, graph)
