"""Which tensors values are made from, with or without gradients: seen from every operation, not from the autograd graph."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FILLED = frozenset(
    (
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "empty_like",
        "new_empty",
        "new_empty_strided",
    )
)
"""Operations that take the shape of a tensor, and none of its values."""
_LEAVING = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__))
_LOOKED_AT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_BY_SELECTION = {"index": 1, "masked_select": 1}


def name_of(op: Any) -> str:
    """`zeros_like` of `aten::zeros_like`."""
    return op._schema.name.partition("::")[2]


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def looked_at(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Arguments whose values Python gets to know, as numbers or as sizes: whatever it does then leaves no trace."""
    if not _LOOKED_AT.intersection(op.tags):
        return []
    place = _BY_SELECTION.get(name_of(op))
    if place is None:
        return tensors_in((args, kwargs))
    chosen = tensors_in(args[place] if len(args) > place else kwargs)
    return [x for x in chosen if x.dtype in (torch.bool, torch.uint8)]


def written(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Arguments that an operation writes into."""
    found = []
    for n, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[n] if n < len(args) else kwargs.get(argument.name))
    return found


class Reads(TorchDispatchMode):
    """Notes which of the watched tensors every value is made from, while it is entered.

        with Reads({"weight": w, "bias": b}) as reads:
            y = x @ w
        reads.behind([y]) == {"weight"}

    Tensors are known by their memory, so views, `.data` and other references count. Errs on the side of too many: what stood in a
    tensor that was overwritten since counts as well. Compiled code runs eagerly meanwhile.
    """

    def __init__(self, watched: Mapping[Any, Tensor] | None = None) -> None:
        super().__init__()
        watched = watched or {}
        self.names: dict[Hashable, int] = {name: 1 << n for n, name in enumerate(watched)}
        self.written: set[Any] = set()
        """Watched tensors that were written into."""
        self._looked = 0
        self._spans: dict[Any, list[tuple[int, int, int]]] = {}
        self._made: dict[Any, tuple[Any, int]] = {}  # memory -> (what keeps its key from being used again, bits)
        self._around = contextlib.ExitStack()
        for name, tensor in watched.items():
            for part in _plain(tensor):
                key, _ = _memory(part)
                self._spans.setdefault(key, []).append((*_extent(part), self.names[name]))

    def __enter__(self) -> Reads:
        self._around.enter_context(_stance())
        self._around.enter_context(_Leaving(self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        bits = self._bits(tensors_in((args, kwargs)))
        self.look(looked_at(func, args, kwargs))
        targets = written(func, args, kwargs)
        for target in targets:
            self.written |= self._named(self._watched(target))
        if name_of(func) == "copy_" and _is_all(args[0]):  # what stood there is gone
            self._made.pop(_memory(args[0])[0], None)
            bits = self._bits(tensors_in(args[1]))
        if bits and name_of(func) not in FILLED:
            for tensor in (*tensors_in(output), *targets):
                for part in _plain(tensor):
                    key, keeper = _memory(part)
                    if key not in self._spans or targets:  # otherwise it is a view of something watched
                        self._made[key] = (keeper, bits | self._made.get(key, (None, 0))[1])
        return output

    def look(self, tensors: Iterable[Tensor]) -> None:
        """Python gets to know the values of tensors."""
        self._looked |= self._bits(tensors)

    def behind(self, values: Any) -> set[Any]:
        """Names of the watched tensors that values are made from, or that Python has looked at."""
        return self._named(self._looked | self._bits(tensors_in(values)))

    def made_from(self, values: Any) -> set[Any]:
        """Names of the watched tensors that values are computed from by operations alone."""
        return self._named(self._bits(tensors_in(values)))

    def name(self, tensor: Tensor, name: Hashable) -> None:
        """Watch a tensor that was made meanwhile, too; several may have one name."""
        bit = self.names.setdefault(name, 1 << len(self.names))
        for part in _plain(tensor):
            key, keeper = _memory(part)
            self._made[key] = (keeper, bit | self._made.get(key, (None, 0))[1])

    def unname(self, tensor: Tensor, name: Hashable) -> None:
        """The tensor has this name no more; what was made from it meanwhile has."""
        for part in _plain(tensor):
            key, keeper = _memory(part)
            self._made[key] = (keeper, self._made.get(key, (None, 0))[1] & ~self.names.get(name, 0))

    def cut(self, tensor: Tensor, name: Hashable) -> Tensor:
        """A copy of a tensor that has this name, and of which nothing else counts any more."""
        copy = tensor.detach().clone()
        for part in _plain(copy):
            self._made.pop(_memory(part)[0], None)
        self.name(copy, name)
        return copy

    def passed(self, tensor: Tensor, name: Hashable, before: Iterable[Hashable]) -> Tensor:
        """A copy of a tensor that has this name, and of which the names `before` count no more; all others do."""
        bits = self._bits([tensor])
        for gone in before:
            bits &= ~self.names.get(gone, 0)
        copy = tensor.clone()
        for part in _plain(copy):
            key, keeper = _memory(part)
            self._made[key] = (keeper, bits)
        self.name(copy, name)
        return copy

    def _named(self, bits: int) -> set[Any]:
        return {name for name, bit in self.names.items() if bits & bit} if bits else set()

    def _bits(self, tensors: Iterable[Tensor]) -> int:
        bits = 0
        for tensor in tensors:
            bits |= self._watched(tensor)
            for part in _plain(tensor):
                bits |= self._made.get(_memory(part)[0], (None, 0))[1]
        return bits

    def _watched(self, tensor: Tensor) -> int:
        bits = 0
        for part in _plain(tensor):
            if spans := self._spans.get(_memory(part)[0]):
                start, stop = _extent(part)
                for first, last, bit in spans:
                    bits |= bit if first < stop and start < last else 0
        return bits


class _Leaving(TorchFunctionMode):
    """Values that leave torch without an operation that a dispatch mode sees."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVING:
            self.reads.look(tensors_in(args))
        return func(*args, **(kwargs or {}))


def _stance() -> contextlib.AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own that a tensor consists of."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        yield tensor
    else:
        for name in parts()[0]:
            yield from _plain(getattr(tensor, name))


def _memory(tensor: Tensor) -> tuple[Any, Any]:
    """A key of a tensor's memory, and what keeps the key from being used again."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors
        return id(tensor), tensor
    return ("storage", storage._cdata), StorageWeakRef(storage)


def _is_all(tensor: Tensor) -> bool:
    """Is it all there is in its memory?"""
    if tensor.layout is not torch.strided or any(part is not tensor for part in _plain(tensor)):
        return False
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Bytes of its memory from the first to behind the last element."""
    if tensor.layout is not torch.strided:
        return 0, 1
    start = tensor.storage_offset() * tensor.element_size()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return int(start), int(start + (last + 1) * tensor.element_size())
