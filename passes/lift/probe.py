"""Shape rules for every op without writing one: run the op where each labelled dim has a prime size of its
own.

The primes found in the result are its labels. An op that mixes layouts, reads a tensor of another length or
reduces over rows either fails to broadcast or loses a prime. What keeps all shapes and mixes rows none the
less (softmax over dim 0) is caught by the table of ops with a `dim`, and by the run-time proof in `verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import map_aggregate

from ultraep_compile.passes.lift.faults import run_theirs
from ultraep_compile.passes.lift.values import DIM_OF_SIZE, ROW_DIMS, Dim, Dims, Refusal, Value

# Ops that keep the shape and work along a dim: position of that argument (after the tensor) and its default.
ALONG_A_DIM: dict[str, tuple[int, Any]] = {
    "softmax": (1, None), "log_softmax": (1, None), "softmin": (1, None), "gumbel_softmax": (4, -1),
    "cumsum": (1, None), "cumprod": (1, None), "cummax": (1, None), "cummin": (1, None), "logcumsumexp": (1, None),
    "sort": (1, -1), "argsort": (1, -1), "flip": (1, None), "roll": (2, None), "normalize": (2, 1), "renorm": (2, None),
    "index_fill": (1, None), "index_copy": (1, None), "scatter": (1, None), "gather": (1, None), "take_along_dim": (2, None),
    "fft": (2, -1), "ifft": (2, -1), "hfft": (2, -1),
}  # fmt: skip
CHOICE_BY_CHOICE = frozenset({
    "add", "sub", "rsub", "mul", "truediv", "div", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "abs",
    "relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "softplus", "elu", "leaky_relu", "mish", "hardswish", "hardtanh",
    "clamp", "clip", "clamp_min", "clamp_max", "minimum", "maximum", "where", "masked_fill", "zeros_like", "ones_like",
    "chunk", "split", "getitem", "unsqueeze", "transpose", "permute", "narrow", "cat", "to", "float", "double", "half",
    "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "dropout", "layer_norm", "rms_norm", "linear", "glu",
    "sum", "mean", "bmm", "matmul", "einsum",
})  # fmt: skip
"""Ops that, on [T, K, ...], either treat each choice apart or lose the dim of choices. The run-time proof
works on rows of one choice each and would not see choices being mixed, so here only what is known passes.
"""
WHOLE_TENSOR = frozenset(
    {"batch_norm", "instance_norm", "fliplr", "flipud", "rot90", "cov", "corrcoef", "inverse", "inv"}
)
"""Ops that keep the shape and mix everything, or the first dims."""


@dataclass(frozen=True, slots=True)
class Probed:
    """Labels of one tensor that an op returns, and which tensor argument it may alias."""

    dims: Dims
    sizes: tuple[int, ...]
    dtype: torch.dtype
    alias: int | None


def check_dims(name: str, values: list[Value], args: tuple, kwargs: dict) -> None:
    """Refuse an op that works along a labelled dim of its first operand."""
    dims = values[0].dims
    if any(Dim.CHOICE in v.dims for v in values) and name not in CHOICE_BY_CHOICE | ALONG_A_DIM.keys():
        raise Refusal(f"{name} on [tokens, k, ...]: not known to treat the k choices of a token apart")
    if not ROW_DIMS.intersection(dims):
        return
    if name in WHOLE_TENSOR and (name != "batch_norm" or kwargs.get("training") or True in args[5:6]):
        raise Refusal(f"{name} mixes rows")
    if name not in ALONG_A_DIM:
        return
    position, default = ALONG_A_DIM[name]
    along = kwargs.get("dim", kwargs.get("dims", args[position] if len(args) > position else default))
    along = along if isinstance(along, (tuple, list)) else [along]
    for dim in along:
        if dim is None or not isinstance(dim, int) or dims[dim] in ROW_DIMS:
            raise Refusal(f"{name} along dim {dim} mixes rows")


def probe(op: str, target: Callable[..., Any] | str, args: tuple, kwargs: dict) -> Probed | tuple[Probed, ...]:
    """Labels of what an op returns. Operands are `Value`s, example tensors (shared by all rows) or plain
    arguments.
    """
    key = (op, target, _freeze(args), _freeze(kwargs))
    if key not in _cache:
        if len(_cache) > 20000:
            _cache.clear()
        _cache[key] = _run(op, target, args, kwargs)
    return _cache[key]


_cache: dict[Any, Probed | tuple[Probed, ...]] = {}


def _freeze(arg: Any) -> Any:
    if isinstance(arg, Value):
        return ("value", arg.dims, arg.probe_sizes(), arg.dtype)
    if isinstance(arg, torch.Tensor):
        return ("tensor", tuple(arg.shape), arg.dtype)
    if isinstance(arg, (tuple, list)):
        return (type(arg).__name__, *map(_freeze, arg))
    if isinstance(arg, dict):
        return tuple((k, _freeze(v)) for k, v in arg.items())
    if isinstance(arg, slice):
        return ("slice", arg.start, arg.stop, arg.step)
    return (type(arg).__name__, arg)


def _run(op: str, target: Callable[..., Any] | str, args: tuple, kwargs: dict) -> Probed | tuple[Probed, ...]:
    storages: list[int] = []

    def stand_in(arg: Any) -> Any:
        if isinstance(arg, (Value, torch.Tensor)):
            meta = arg.meta() if isinstance(arg, Value) else torch.empty(arg.shape, dtype=arg.dtype, device="meta")
            storages.append(meta.untyped_storage()._cdata)
            return meta
        if isinstance(arg, torch.device):
            return torch.device("meta")
        return arg

    plain_args = map_aggregate(args, stand_in)
    plain_kwargs = map_aggregate(kwargs, stand_in)
    with torch.no_grad():
        if op == "call_method":
            target = getattr(plain_args[0], str(target))  # type: ignore[index]
            plain_args = plain_args[1:]  # type: ignore[index]
        assert callable(target)
        result = run_theirs(target, *plain_args, **plain_kwargs)  # type: ignore[misc]

    def read(tensor: Any) -> Probed:
        if not isinstance(tensor, torch.Tensor):
            raise Refusal("does not give a tensor")
        dims = tuple(DIM_OF_SIZE.get(size) for size in tensor.shape)
        storage = tensor.untyped_storage()._cdata
        alias = storages.index(storage) if storage in storages else None
        return Probed(dims, tuple(tensor.shape), tensor.dtype, alias)

    return tuple(read(t) for t in result) if isinstance(result, (tuple, list)) else read(result)


def check_labels(name: str, operands: list[Value], result: Probed) -> None:
    """Refuse a result in which a label was lost (rows reduced or mixed) or doubled (every row against every
    row).
    """
    had = {dim for value in operands for dim in value.dims if dim}
    has = [dim for dim in result.dims if dim]
    lost = had - set(has)
    if Dim.TOKEN in has:
        lost -= {Dim.CHOICE}  # the sum over K: the end of the region
    if lost:
        raise Refusal(f"{name} mixes rows: the {'/'.join(sorted(d.name.lower() for d in lost))} dim is gone")
    if len(has) != len(set(has)):
        raise Refusal(f"{name} sets every row against every other")
