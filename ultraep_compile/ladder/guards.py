"""What the forward of a module reads from Python, and whether it is still so.

A recording replaces a forward by what it did once. Whatever Python read on the way (attributes of modules and of the objects
that they hold, closures, globals, classes, which submodules there are) is baked into it, and a compiler that traces the new
forward never comes across it. So the reads are noted while the forward is recorded (`Reads`), and what is noted is compared
before each use (`Reads.hold`). What the forward writes in Python is found on the way, and taken back.
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import enum
import functools
import gc
import hashlib
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ultraep_compile.passes.lift.values import Refusal

_ABSENT = type("Absent", (), {"__repr__": lambda self: "nothing"})()
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    enum.Enum,
    slice,
    range,
)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_LARGEST = 10_000
"""Entries of a container that is compared."""
_SMALL = 4096
"""Numbers of a tensor that is compared."""
_NAMED = 16
"""Settings that ranks compare by name."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INNER = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl", "_call_impl", "call_super_init", "dump_patches"}
_MARKS = ("_ultraep_plain", "_ultraep_sharded_parameters")
"""In the classes that this package gives to modules."""
_OURS = ("_ultraep_", "__")
_get = dict.get


class Reads:
    """Reads of one module's forward: (container, key) -> value, as first read, and how to say what they are.

    Containers are instance dicts, module globals, classes: what is looked up again is the same object under the same name.
    """

    def __init__(self, owner: nn.Module, around: Iterable[str] = ()) -> None:
        self.owner_name = type(owner).__name__
        self.around = tuple(around)
        """Paths of modules that the new forward calls itself: a compiler sees into them."""
        self.same = _Facts(operator.is_)
        self.equal = _Facts(operator.eq)
        self.classes: dict[int, list[Any]] = {}
        """Objects and their classes."""
        self.lengths: dict[int, tuple[Any, int, str]] = {}
        self.computed: dict[tuple[int, str], tuple[Callable[[], Any], Any, str]] = {}
        """Values that no dict holds: slots, and what `__getattr__` makes up."""
        self.asked = _Asked()
        self.contents: dict[str, tuple[Callable[[], Tensor], list[Any]]] = {}
        """Tensors whose numbers Python read."""
        self.known: dict[int, tuple[Any, str]] = {}
        self.codes: set[types.CodeType] = set()
        self.written: dict[str, tuple[Any, Any]] = {}
        """What the forward itself changed: before and after."""
        self.scratch: dict[str, tuple[Any, Any]] = {}
        """The same of attributes of objects that are no modules, where it writes before it reads."""
        self.seen: set[tuple[int, str]] = set()
        for path, module in owner.named_modules():
            if not any(path == leaf or path.startswith(f"{leaf}.") for leaf in self.around):
                self.known[id(module)] = (module, path)
                self._structure(module, path)

    # ---- noting ------------------------------------------------------------------------------------------------------

    def _structure(self, module: nn.Module, path: str) -> None:
        """Which modules are inside; of the owner, the class is guarded by whoever traces it."""
        if path:
            self.classes[id(module)] = [module, type(module)]
        if module._modules:
            prefix = f"{path}." if path else ""
            self.same.note(module.__dict__, "_modules", module._modules, f"{prefix}_modules")
            self.lengths[id(module._modules)] = (
                module._modules,
                len(module._modules),
                f"number of modules in {path or self.owner_name}",
            )
            for name, child in module._modules.items():
                self.same.note(module._modules, name, child, f"{prefix}{name}")

    def note(self, obj: Any, name: str, value: Any) -> None:
        """An attribute was read, `_ABSENT` if there is none."""
        path = self.known[id(obj)][1]
        if (id(obj), name) in self.seen or (id(obj), name) in _spied.stored:  # what it has just written is no state
            return
        self.seen.add((id(obj), name))
        label = f"{path}.{name}" if path else name
        own = _instance_dict(obj)
        if isinstance(obj, nn.Module) and name in ("_modules", "_parameters", "_buffers"):
            held = getattr(obj, name)
            self.lengths[id(held)] = (held, len(held), f"number of entries in {label}")
            return
        if own is not None and name in own:
            self.keep(own, name, own[name], label)
            return
        if isinstance(obj, nn.Module):
            for held in (obj._parameters, obj._buffers, obj._modules):
                if name in held and isinstance(held[name], nn.Module):
                    return
                if name in held:
                    if held[name] is None:
                        self.same.note(held, name, None, label)
                    return
                if value is _ABSENT:
                    self.same.note(held, name, _ABSENT, label)
        if own is not None:
            self.same.note(own, name, _ABSENT, label)
        if not self._of_class(type(obj), name, label) and value is not _ABSENT:
            kept = self.copied(value, label)
            self.computed.setdefault((id(obj), name), (lambda: getattr(obj, name), kept, label))

    def _of_class(self, cls: type, name: str, label: str) -> bool:
        """Note where a class has a name; False if none has a value of its own there."""
        for each in own_class(cls).__mro__:
            if name in vars(each):
                value = vars(each)[name]
                if of_users(each.__module__):
                    self.keep(vars(each), name, value, f"{each.__name__}.{name}", label)
                    self.may_run(value.fget if isinstance(value, property) else value)
                return not isinstance(value, types.MemberDescriptorType)
            if of_users(each.__module__):
                self.same.note(vars(each), name, _ABSENT, f"{each.__name__}.{name}")
        return False

    def keep(self, holder: Any, name: Any, value: Any, label: str, path: str = "") -> None:
        """Note what an instance, a class or a namespace has under a name."""
        if isinstance(value, Tensor):
            return  # the new forward reads it too
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            now = lambda: (holder[name].dtype.str, holder[name].shape, holder[name].tobytes())  # noqa: E731
            self.computed.setdefault((id(holder), str(name)), (now, now(), label))
        elif isinstance(value, _PLAIN):
            self.equal.note(holder, name, value, label)
        elif isinstance(value, _CONTAINERS):
            self.same.note(holder, name, value, label) if isinstance(value, (tuple, frozenset)) and not _is_plain(
                value
            ) else None
            self.equal.note(holder, name, self.copied(value, path or label), label)
        else:
            self.same.note(holder, name, value, label)
            self.adopt(value, path or label)

    def copied(self, value: Any, label: str) -> Any:
        """A value that stays as it is now, to compare with."""
        if isinstance(value, _CONTAINERS):
            if len(value) > _LARGEST:
                raise Refusal(f"its forward reads {label}, which has {len(value)} entries: too many to watch")
            if isinstance(value, dict):
                return {k: self.copied(v, f"{label}[{k!r}]") for k, v in value.items()}
            parts = [self.copied(v, f"{label}[{i}]") for i, v in enumerate(value)]
            if isinstance(value, (set, frozenset)):
                return set(parts)
            return parts if isinstance(value, list) else tuple(parts)
        self.adopt(value, label)
        return value

    def adopt(self, value: Any, path: str) -> None:
        """Follow reads of an object of the user's, too."""
        if isinstance(value, types.MethodType):
            self.adopt(value.__self__, path)
        elif isinstance(value, functools.partial):
            self.adopt(value.func, path)
        elif isinstance(value, nn.Module):
            if id(value) not in self.known:
                self._adopt_module(value, path)
        elif _is_of_users(value):
            own = _instance_dict(value)
            if id(value) in self.known or (own is None and not hasattr(type(value), "__slots__")):
                return
            self.known[id(value)] = (value, path)
            self.classes[id(value)] = [value, type(value)]
            if (
                not _spied.follow(type(value)) and own is not None
            ):  # a class that Python cannot be made to report: all that it holds
                self.lengths[id(own)] = (own, len(own), f"number of attributes of {path}")
                for name in list(own):
                    self.keep(own, name, own[name], f"{path}.{name}")

    def _adopt_module(self, module: nn.Module, path: str) -> None:
        if any(module is leaf for leaf in _spied.leaves):
            return
        for name, inner in module.named_modules():
            label = f"{path}.{name}" if name else path
            self.known.setdefault(id(inner), (inner, label))
            self._structure(inner, label)

    def ran(self, frame: types.FrameType) -> None:
        """A function of the user's was called: what it may read besides its arguments."""
        code = frame.f_code
        if code in self.codes:
            return
        names = self._globals_of(code, frame.f_globals)
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        for cls in (first if isinstance(first, type) else type(first)).__mro__ if id(first) in self.known else ():
            if of_users(cls.__module__) and not any(mark in vars(cls) for mark in _MARKS):
                for name in names & vars(cls).keys():
                    if not name.startswith("__"):
                        self.keep(vars(cls), name, vars(cls)[name], f"{cls.__name__}.{name}")
        free = set(code.co_freevars) - {"__class__"}
        for function in gc.get_referrers(code) if free else ():
            if not isinstance(function, types.FunctionType):
                continue
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                if name in free and _contents(cell) is frame.f_locals.get(name, _ABSENT):
                    self._cell(
                        cell, f"{name} in {code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}", names
                    )

    def may_run(self, function: Any) -> None:
        """A function of the user's is at hand, and may be called: what it reads besides its arguments."""
        function = getattr(function, "__func__", function)  # of a class or static method
        if not isinstance(function, types.FunctionType) or not of_users(function.__module__ or ""):
            return
        code = function.__code__
        if code in self.codes:
            return
        names = self._globals_of(code, function.__globals__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._cell(cell, f"{name} in {function.__qualname__}", names)

    def _globals_of(self, code: types.CodeType, space: dict[str, Any]) -> set[str]:
        """Note the globals that a code reads, and those of functions made or named in it. Returns: the names of attributes in it."""
        self.codes.add(code)
        names = set(code.co_names)
        where = space.get("__name__", "")
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME"):
                self._global(space, str(step.argval), f"{where}.{step.argval}", names)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType) and inner not in self.codes:
                names |= self._globals_of(inner, space)
        return names

    def _global(self, space: dict[str, Any], name: str, label: str, names: set[str]) -> None:
        if name not in space:
            self.same.note(space, name, _ABSENT, label)
            return
        value = space[name]
        self.keep(space, name, value, label)
        self._members(value, label, names)
        self.may_run(value)

    def _members(self, value: Any, label: str, names: set[str]) -> None:
        """Attributes of modules, classes and functions, by the names in the code: reads of these cannot be followed."""
        if isinstance(value, types.ModuleType) and of_users(value.__name__):
            for name in names & vars(value).keys():
                self.keep(vars(value), name, vars(value)[name], f"{label}.{name}")
                self.may_run(vars(value)[name])
        elif isinstance(value, type) and of_users(value.__module__):
            for name in {n for n in names if not n.startswith("__")}:
                self._of_class(value, name, f"{label}.{name}")
        elif isinstance(value, types.FunctionType) and of_users(value.__module__ or ""):
            for name in names & vars(value).keys():
                self.keep(vars(value), name, vars(value)[name], f"{label}.{name}")

    def _cell(self, cell: types.CellType, label: str, names: set[str]) -> None:
        if (id(cell), "") in self.computed:
            return
        value = _contents(cell)
        self._members(value, label, names)
        self.may_run(value)
        if isinstance(value, Tensor):
            return
        self.computed[id(cell), ""] = (lambda: _contents(cell), self.copied(value, label), label)

    def numbers(self, path: str, tensor: Tensor) -> None:
        """Python read numbers out of a parameter or buffer."""
        if tensor.numel() > _SMALL:
            raise Refusal(
                f"its forward reads numbers of {path} in Python, which has {tensor.numel()} of them: too many to watch"
            )
        self.contents.setdefault(
            path, (_attribute_of(self.known, path), [tensor, tensor._version, tensor.detach().clone()])
        )

    def ask(self, owner: nn.Module, path: str, question: Callable[[Tensor], Any], label: str, answer: Any) -> None:
        """Python asked a parameter or buffer what it is: its dtype, say."""
        *above, name = path.split(".")
        module = owner
        for step in above:
            self.same.note(module._modules, step, module._modules[step], path)
            module = module._modules[step]
            assert module is not None
        holder = next((held for held in (module._parameters, module._buffers) if name in held), None)
        if holder is not None:
            self.asked.note(holder, name, question, answer, f"{path}.{label}")

    # ---- comparing ---------------------------------------------------------------------------------------------------

    def hold(self) -> bool:
        """Is everything that was read as it was?"""
        try:
            return (
                self.same.hold()
                and self.equal.hold()
                and self._classes_hold()
                and all(map(operator.eq, map(len, self._sized[0]), self._sized[1]))
                and self.asked.hold()
                and all(_is_like(read(), kept) for read, kept, _ in self.computed.values())
                and all(_holds_numbers(read, then) for read, then in self.contents.values())
            )
        except Exception:  # what cannot be read or compared is another
            return False

    def _classes_hold(self) -> bool:
        objects, classes = self._classed
        if all(map(operator.is_, map(type, objects), classes)):
            return True
        return all(type(entry[0]) is entry[1] or _is_still(entry) for entry in self.classes.values())

    @functools.cached_property
    def _classed(self) -> tuple[list[Any], list[type]]:
        """Objects and their classes in columns. A recording that is done is only compared from then on."""
        return [entry[0] for entry in self.classes.values()], [entry[1] for entry in self.classes.values()]

    @functools.cached_property
    def _sized(self) -> tuple[list[Any], list[int]]:
        return [held for held, *_ in self.lengths.values()], [size for _, size, _ in self.lengths.values()]

    def changes(self) -> Iterator[str]:
        """What is not as it was: `experts.0.2.p was 0.5 and is 0.0`."""
        for size_of, size, label in self.lengths.values():
            if len(size_of) != size:
                yield f"{label} was {size} and is {len(size_of)}"
        yield from self.same.changes()
        yield from self.equal.changes()
        yield from self.asked.changes()
        for obj, cls in self.classes.values():
            if own_class(type(obj)) is not own_class(cls):
                yield f"the class of {self.known.get(id(obj), (obj, 'a module'))[1]} was {cls.__name__} and is {type(obj).__name__}"
        for read, kept, label in self.computed.values():
            now = _attempted(read)
            if not _is_like(now, kept):
                yield f"{label} was {_shown(kept)} and is {_shown(now)}"
        for path, (read, then) in self.contents.items():
            if not _holds_numbers(read, then):
                yield f"numbers of {path} that Python reads have changed"

    def size(self) -> int:
        """How many things are compared."""
        kinds = (self.same.noted, self.equal.noted, self.classes, self.lengths, self.asked.noted, self.computed, self.contents)
        return sum(map(len, kinds))

    def digest(self) -> int:
        """Equal on all ranks that read the same, 63 bits."""
        lines = sorted(
            itertools.chain(self.same.lines(), self.equal.lines(), (f"{x[2]}={x[1]}" for x in self.lengths.values()))
        )
        lines += sorted(f"{label}={_shown(kept)}" for _, kept, label in self.computed.values())
        lines += sorted(f"{label}={_shown(answer)}" for *_, answer, label in self.asked.noted.values())
        return int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:8], "big") >> 1

    def told(self) -> dict[str, str]:
        """What was read, for ranks to compare: settings of the module itself by name, and a digest of everything.

        Example: {"temperature in Python": "0.3", "all that its forward reads in Python": "1f0c..."}
        """
        named = {
            label: _shown(value)
            for _, value, label in self.equal.noted.values()
            if "." not in label and isinstance(value, (bool, int, float, str))
        }
        first = {f"{label} in Python": named[label] for label in sorted(named)[:_NAMED]}
        return {**first, "all that its forward reads in Python": f"{self.digest():x}"}

    def holds_modules_of(self, owner: nn.Module) -> bool:
        """Are all modules with parameters that this keeps alive still the owner's?"""
        inside = {id(m) for m in owner.modules()}
        kept = (obj for obj, _ in self.known.values() if isinstance(obj, nn.Module))
        return all(id(m) in inside or not any(True for _ in m.parameters(recurse=False)) for m in kept)

    # ---- watching a run ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(
        self, paused: Callable[[], bool], leaves: Iterable[nn.Module], below: types.FrameType
    ) -> Iterator[None]:
        """Note what runs inside; what it changes in Python is changed back, and in `written`.

        Args:
            below: the frame that calls what is watched.
        """
        stored: dict[tuple[int, str], tuple[Any, Any]] = {}
        with _spied.watching(self, paused, tuple(leaves), stored, below):
            yield
        for (_, name), (obj, before) in stored.items():
            own = _instance_dict(obj)
            now = _ABSENT if own is None else own.get(name, _ABSENT)
            if isinstance(obj, nn.Module) and name in (*obj._parameters, *obj._buffers, *obj._modules):
                continue
            if isinstance(now, Tensor):  # the new forward writes it too
                if own is not None and not isinstance(before, Tensor):
                    own.pop(name, None) if before is _ABSENT else own.__setitem__(name, before)
                continue
            if not _is_like(now, before):
                path = self.known[id(obj)][1]
                found = self.written if isinstance(obj, nn.Module) or (id(obj), name) in self.seen else self.scratch
                found[f"{path}.{name}" if path else name] = (before, now)
                if own is not None:
                    own.pop(name, None) if before is _ABSENT else own.__setitem__(name, before)
        for label, before, now, undo in (*self.same.moved(), *self.equal.moved()):
            if "_modules" not in label:
                self.written.setdefault(label, (before, now))
                undo()

    def writes(self, *, exchanging: bool = False) -> str:
        """What the forward changes in Python, and the new one would not; "" if nothing.

        Args:
            exchanging: the module sends rows to other ranks. What its dispatcher notes for the way back is nobody else's.
        """
        written = self.written if exchanging else self.written | self.scratch
        if not written:
            return ""
        name, (before, now) = next(iter(written.items()))
        return (
            f"its forward writes {name} in Python (from {_shown(before)} to {_shown(now)}), which a new forward would not. Keep it in "
            "a buffer, or outside of the layer"
        )


class _Facts:
    """(container, key) -> value, compared all at once and without a step of Python for each."""

    def __init__(self, test: Callable[[Any, Any], bool]) -> None:
        self.test = test
        self.noted: dict[tuple[int, Any], tuple[Any, Any, str]] = {}
        self._columns: tuple[int, list[Any], list[Any], list[Any], list[tuple[Any, Any, Any]]] | None = None

    def note(self, holder: Any, key: Any, value: Any, label: str) -> None:
        self.noted.setdefault((id(holder), key), (holder, value, label))

    def columns(self) -> tuple[int, list[Any], list[Any], list[Any], list[tuple[Any, Any, Any]]]:
        if self._columns is None or self._columns[0] != len(self.noted):
            dicts = [(h, k, v) for (_, k), (h, v, _) in self.noted.items() if isinstance(h, dict)]
            rest = [(h, k, v) for (_, k), (h, v, _) in self.noted.items() if not isinstance(h, dict)]
            self._columns = (len(self.noted), [d[0] for d in dicts], [d[1] for d in dicts], [d[2] for d in dicts], rest)
        return self._columns

    def hold(self) -> bool:
        _, holders, keys, values, rest = self.columns()
        now = map(_get, holders, keys, itertools.repeat(_ABSENT))
        if not all(map(self.test, now, values)):
            return False
        return all(self.test(h.get(k, _ABSENT), v) for h, k, v in rest)

    def _different(self) -> Iterator[tuple[Any, Any, Any, Any, str]]:
        for (_, key), (holder, value, label) in self.noted.items():
            now = holder.get(key, _ABSENT)
            if not (now is value if self.test is operator.is_ else _is_like(now, value)):
                yield holder, key, value, now, label

    def changes(self) -> Iterator[str]:
        for _, _, value, now, label in self._different():
            yield f"{label} was {_shown(value)} and is {_shown(now)}"

    def moved(self) -> Iterator[tuple[str, Any, Any, Callable[[], None]]]:
        """What has changed, and how to change it back."""
        for holder, key, value, now, label in list(self._different()):
            yield label, value, now, functools.partial(_put_back, holder, key, value, now)

    def lines(self) -> Iterator[str]:
        for _, value, label in self.noted.values():
            yield f"{label}={_shown(value)}"


class _Asked:
    """What parameters and buffers said of themselves: (dict of a module, name, question) -> answer."""

    def __init__(self) -> None:
        self.noted: dict[tuple[int, str, str], tuple[dict[str, Any], str, Callable[[Tensor], Any], Any, str]] = {}
        self._columns: tuple[int, list[tuple[Callable[[Tensor], Any], list[Any], list[str], list[Any]]]] = (0, [])

    def note(
        self, holder: dict[str, Any], name: str, question: Callable[[Tensor], Any], answer: Any, label: str
    ) -> None:
        self.noted.setdefault((id(holder), name, label), (holder, name, question, answer, label))

    def hold(self) -> bool:
        if self._columns[0] != len(self.noted):
            found: dict[str, tuple[Callable[[Tensor], Any], list[Any], list[str], list[Any]]] = {}
            for holder, name, question, answer, _ in self.noted.values():
                _, holders, names, answers = found.setdefault(repr(question), (question, [], [], []))
                holders.append(holder), names.append(name), answers.append(answer)
            self._columns = len(self.noted), list(found.values())
        return all(
            all(map(operator.eq, map(question, map(operator.getitem, holders, names)), answers))
            for question, holders, names, answers in self._columns[1]
        )

    def changes(self) -> Iterator[str]:
        for holder, name, question, answer, label in self.noted.values():
            now = _attempted(lambda q=question, h=holder, n=name: q(h[n]))
            if not _is_like(now, answer):
                yield f"{label} was {_shown(answer)} and is {_shown(now)}"


def _put_back(holder: Any, key: Any, value: Any, now: Any) -> None:
    if isinstance(now, list) and isinstance(value, list):
        now[:] = value
    elif isinstance(now, (dict, set)) and isinstance(value, (dict, set)) and type(now) is not type(value):
        pass
    elif isinstance(now, (dict, set)) and isinstance(value, (dict, set)):
        now.clear()
        now.update(value)  # pyright: ignore
    elif not isinstance(holder, dict):
        pass  # a class
    elif value is _ABSENT:
        holder.pop(key, None)
    else:
        holder[key] = value


# ---- following reads -------------------------------------------------------------------------------------------------


class _Spied:
    """Classes whose reads and writes of attributes are reported, while a `Reads` watches."""

    def __init__(self) -> None:
        self.before: dict[type, dict[str, Any]] = {}
        self.reads: Reads | None = None
        self.paused: Callable[[], bool] = bool
        self.leaves: tuple[nn.Module, ...] = ()
        self.stored: dict[tuple[int, str], tuple[Any, Any]] = {}
        self.thread = 0
        self.below: types.FrameType | None = None
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def watching(
        self,
        reads: Reads,
        paused: Callable[[], bool],
        leaves: tuple[nn.Module, ...],
        stored: dict,
        below: types.FrameType,
    ) -> Iterator[None]:
        with self.lock:
            self.reads, self.paused, self.leaves, self.stored = reads, paused, leaves, stored
            self.thread, self.below = threading.get_ident(), below
            self.follow(nn.Module)
            for obj, _ in list(reads.known.values()):
                self.follow(type(obj))
            try:
                yield
            finally:
                self.reads, self.below = None, None
                for cls, own in self.before.items():
                    for name in ("__getattribute__", "__setattr__"):
                        setattr(cls, name, own[name]) if name in own else delattr(cls, name)
                self.before.clear()
                self.leaves, self.stored = (), {}

    def follow(self, cls: type) -> bool:
        """Let a class report; False for one that cannot."""
        if self.reads is None or not cls.__flags__ & (1 << 9):  # no class made by a `class` statement
            return False
        if getattr(cls.__getattribute__, "_is_ours", False) and getattr(cls.__setattr__, "_is_ours", False):
            return True
        if (
            cls is not nn.Module
            and not of_users(cls.__module__)
            and not issubclass(cls, nn.Module)
            and cls.__module__ != "argparse"
        ):
            return False
        self.before[cls] = {n: vars(cls)[n] for n in ("__getattribute__", "__setattr__") if n in vars(cls)}
        cls.__getattribute__ = self._reader(cls.__getattribute__)  # type: ignore[method-assign]
        cls.__setattr__ = self._writer(cls.__setattr__)  # type: ignore[method-assign]
        return True

    def _is_of_interest(self, obj: Any, name: str) -> bool:
        reads = self.reads
        if (
            reads is None
            or id(obj) not in reads.known
            or name.startswith(_OURS)
            or self.thread != threading.get_ident()
        ):
            return False
        return name not in _INNER or not isinstance(obj, nn.Module) or name in ("_modules", "_parameters", "_buffers")

    def _reader(self, plain: Any) -> Any:
        if getattr(plain, "_is_ours", False):
            return plain

        def spied_read(obj: Any, name: str) -> Any:
            if not self._is_of_interest(obj, name) or self.paused():
                return plain(obj, name)
            try:
                value = plain(obj, name)
            except AttributeError:
                dynamic = getattr(type(obj), "__getattr__", None)
                try:
                    value = _ABSENT if dynamic is None else dynamic(obj, name)
                except AttributeError:
                    value = _ABSENT
                if self.reads is not None:
                    self.reads.note(obj, name, value)
                if value is _ABSENT:
                    raise
                return value
            if self.reads is not None and (
                name not in _INNER or sys._getframe(1).f_globals.get("__name__") != "torch.nn.modules.module"
            ):
                self.reads.note(obj, name, value)
            return value

        spied_read._is_ours = True  # type: ignore[attr-defined]
        return spied_read

    def _writer(self, plain: Any) -> Any:
        if getattr(plain, "_is_ours", False):
            return plain

        def spied_write(obj: Any, name: str, value: Any) -> None:
            if self._is_of_interest(obj, name) and not self.paused():
                own = _instance_dict(obj)
                self.stored.setdefault((id(obj), name), (obj, _ABSENT if own is None else own.get(name, _ABSENT)))
            plain(obj, name, value)

        spied_write._is_ours = True  # type: ignore[attr-defined]
        return spied_write

    def running(self, frame: types.FrameType | None) -> None:
        """Note the functions of the user's that run now, from a frame on down to what is watched.

        Asked at every operation of torch. What runs without one is found from the names in those that do; `sys.setprofile`
        would show it, too, but CPython 3.11 crashes now and then when it meets the frames that Dynamo evaluates.
        """
        reads = self.reads
        if reads is None or self.thread != threading.get_ident():
            return
        while frame is not None and frame is not self.below:
            if (
                frame.f_code not in reads.codes
                and of_users(frame.f_globals.get("__name__", ""))
                and frame.f_code.co_name != "<module>"
            ):
                reads.ran(frame)
            frame = frame.f_back


_spied = _Spied()
note_running = _spied.running


# ---- small questions -------------------------------------------------------------------------------------------------

_LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "ultraep_compile", "functorch", "triton", "sympy"}
) - {"__main__"}


@functools.lru_cache(maxsize=4096)
def of_users(module: str | None) -> bool:
    """Is a Python module of this name no part of Python, torch or this package?"""
    return bool(module) and str(module).partition(".")[0] not in _LIBRARIES


def _is_of_users(value: Any) -> bool:
    """Is this an object with state, of a class that is not torch's or Python's?"""
    if isinstance(value, (Tensor, type, types.ModuleType, types.FunctionType, *_PLAIN)):
        return False
    return isinstance(value, (types.SimpleNamespace, argparse.Namespace)) or of_users(type(value).__module__)


def own_class(cls: type) -> type:
    """Of the classes that this package puts before a module's own, none."""
    return next(c for c in cls.__mro__ if not any(mark in vars(c) for mark in _MARKS))


def _is_still(entry: list[Any]) -> bool:
    """Is an object of another class that is ours, before the same one of its own?"""
    if own_class(type(entry[0])) is not own_class(entry[1]):
        return False
    entry[1] = type(entry[0])
    return True


def _instance_dict(obj: Any) -> dict[str, Any] | None:
    try:
        own = object.__getattribute__(obj, "__dict__")
    except (AttributeError, TypeError):
        return None
    return own if isinstance(own, dict) else None


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _attribute_of(known: dict[int, tuple[Any, str]], path: str) -> Callable[[], Tensor]:
    parent, _, name = path.rpartition(".")
    module = next(m for m, p in known.values() if p == parent)
    return lambda: getattr(module, name)


def _holds_numbers(read: Callable[[], Tensor], then: list[Any]) -> bool:
    """Has a tensor the numbers that it had? One on another device is looked into only if it was written to."""
    now = read()
    if now is then[0] and now._version == then[1] and now.device.type != "cpu":
        return True
    kept = then[2]
    if now.shape != kept.shape or now.dtype != kept.dtype or not torch.equal(now.detach(), kept.to(now.device)):
        return False
    then[:2] = [now, now._version]
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, _PLAIN)


def _is_like(now: Any, kept: Any) -> bool:
    try:
        return now is kept or bool(now == kept)
    except Exception:  # tensors in a container, say
        return False


def _attempted(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:
        return _ABSENT


def _shown(value: Any) -> str:
    """Short, and the same in every process."""
    if isinstance(value, nn.Module):
        text = type(value).__name__
    elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        text = value.__qualname__
    elif isinstance(value, _CONTAINERS):
        parts = (
            [f"{_shown(k)}: {_shown(v)}" for k, v in value.items()]
            if isinstance(value, dict)
            else [_shown(v) for v in value]
        )
        text = f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, (set, frozenset)) else parts)})"
    elif isinstance(value, torch.device):
        text = value.type  # each rank has an index of its own
    elif isinstance(value, _PLAIN) or value is _ABSENT:
        text = repr(value)
    else:
        text = f"a {type(value).__qualname__}"
    return text if len(text) <= 80 else f"{text[:60]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def hooks_of(owner: nn.Module) -> list[dict[int, Any]]:
    """All dicts of hooks of a module and of those below it."""
    return [getattr(m, name) for m in owner.modules() for name in HOOKS]
