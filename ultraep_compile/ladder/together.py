"""Layers that several processes run together, each with experts of its own: what their ranks settle in common.

Whatever one rank finds out about such a layer, all must: a rank that refused it alone would leave the others waiting in the
middle of an exchange. So every step that may fail is taken by `agreed`, and what is measured is put together by `every`.
A layer of one process is the case of one rank, for which both are nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from ultraep_compile.exchange import line_of
from ultraep_compile.ladder.routing import Missed, Unbalanceable
from ultraep_compile.passes.lift.faults import internal_error, run_theirs
from ultraep_compile.passes.lift.values import Refusal

T = TypeVar("T")
_KINDS = (Unbalanceable, Missed, Refusal)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that run a layer; without a group, this one."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def name(self) -> str:
        """The group's name, as our ops take it; "" for one process."""
        return "" if self.group is None else self.group.group_name

    def every(self, value: T) -> list[T]:
        """What all ranks have, by rank. Tensors must be on the CPU."""
        if self.group is None:
            return [value]
        return line_of(self.group).gather_objects(value, "what every rank finds of an expert-parallel layer")

    def agreed(self, run: Callable[[], T]) -> T:
        """The result of a step without exchanges; a refusal on one rank is one on all, and so is a bug.

        Raises: this rank's own exception, or another rank's refusal as one of the same kind.
        """
        if self.group is None:
            return run()
        result: Any = None
        own: Exception | None = None
        try:
            result = run()
        except Exception as reason:  # raised again below, when the others know of it
            own = reason
        kind = next((i for i, k in enumerate(_KINDS) if isinstance(own, k)), _KINDS.index(Missed))
        text = str(own) if own is None or isinstance(own, Refusal) else internal_error(own)
        said = self.every(None if own is None else (kind, text))
        if own is not None:
            raise own
        for rank, reason in enumerate(said):
            if reason is not None:
                raise _KINDS[reason[0]](f"{reason[1]} (on rank {rank})")
        return result


ALONE = Ranks()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- noticing exchanges ---------------------------------------------------------------------------------------------

_METHODS = (
    "alltoall_base", "alltoall", "all_to_all_single", "_allgather_base", "allgather", "all_gather_single", "_reduce_scatter_base",
    "reduce_scatter", "reduce_scatter_single", "allreduce",
)  # fmt: skip
"""Of process groups, under the names of several versions of torch."""
_NAMES = {"alltoall_base": "all_to_all_single", "alltoall": "all_to_all", "allreduce": "all_reduce"}
_SEVERAL = 2


def is_dispatch(name: str) -> bool:
    """Does this collective send rows to where their experts are?"""
    return "all_to_all" in name


def is_gathering(name: str) -> bool:
    """Does it bring all rows to all ranks, or divide sums of them again? Experts can be divided over ranks by these, too."""
    return "gather" in name or "reduce_scatter" in name


def is_repeatable(name: str) -> bool:
    """May a new forward do this exchange too? What is summed over ranks beside the experts, loads say, is no row of a token."""
    return name == "all_reduce"


_REDUCTIONS = {
    dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg", dist.ReduceOp.MAX: "max", dist.ReduceOp.MIN: "min",
    dist.ReduceOp.PRODUCT: "product",
} if dist.is_available() else {}  # fmt: skip


def reduction_of(args: tuple) -> str:
    """The operation of an `all_reduce`, by the arguments of the process group's method; "" for one of another kind."""
    op = getattr(args[1], "reduceOp", None) if len(args) > 1 else dist.ReduceOp.SUM
    return next((name for known, name in _REDUCTIONS.items() if op == known), "")


def reduced(tensor: Tensor, operation: str, group: str) -> Tensor:
    """What `all_reduce` writes into a tensor, as a new one."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(tensor, operation, group))


@contextlib.contextmanager
def noticed(note: Callable[[str, dist.ProcessGroup, tuple], None]) -> Iterator[None]:
    """Call `note(name, group, arguments)` after every collective of more than one rank, however it is called."""
    if not dist.is_available() or not dist.is_initialized():
        yield
        return
    plain = {n: vars(dist.ProcessGroup)[n] for n in _METHODS if n in vars(dist.ProcessGroup)}

    def noting(name: str) -> Callable:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            out = run_theirs(plain[name], group, *args, **kwargs)
            if group.size() >= _SEVERAL:
                note(_NAMES.get(name, name.strip("_")), group, args)
            return out

        return call

    for name in plain:
        setattr(dist.ProcessGroup, name, noting(name))
    try:
        with _Functional(note):
            yield
    finally:
        for name, method in plain.items():
            setattr(dist.ProcessGroup, name, method)


class _Functional(TorchFunctionMode):
    """Sees the functional collectives, which never come to a process group's methods."""

    def __init__(self, note: Callable[[str, dist.ProcessGroup, tuple], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run_theirs(func, *args, **(kwargs or {}))
        if str(func).startswith("_c10d_functional"):
            names = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, str)]
            if names:
                group = dist.distributed_c10d._resolve_process_group(names[-1])  # pyright: ignore
                if group.size() >= _SEVERAL:
                    self.note(str(func).split(".")[1].removesuffix("_autograd"), group, ())
        return out
