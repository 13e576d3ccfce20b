"""What one forward of a model shows of its modules: calls to repeat, children that feed one another, rows sent to other ranks."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.ladder.groups import Siblings
from ultraep_compile.ladder.recording import Call
from ultraep_compile.ladder.together import ALONE, Ranks, is_dispatch, is_gathering, noticed


@dataclass(slots=True)
class Calls:
    """What a forward of the model shows of the modules in question."""

    wanted: set[str]
    first: dict[str, Call] = field(default_factory=dict)
    chained: set[str] = field(default_factory=set)
    """Containers whose children feed one another: layers, not experts."""
    rows: dict[str, int] = field(default_factory=dict)
    """Child of a group -> how many numbers it was given."""
    exchanging: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    """Modules that send rows to other ranks, in their forward or in hooks on it, and the group."""

    gathering: dict[str, tuple[str, dist.ProcessGroup]] = field(default_factory=dict)
    """Modules that bring all rows to all ranks: the collective and the group."""

    def uneven(self, group: Siblings) -> bool:
        """Were the siblings given unequally much?"""
        prefix = f"{group.container}." if group.container else ""
        return len({self.rows.get(prefix + name, 0) for name in group.names}) > 1

    def exchanging_inside(self, group: Siblings) -> bool:
        """Do the siblings themselves send rows elsewhere? Then they are layers, not experts."""
        return any(_is_in(path, group) for path in self.exchanging)

    def gathers_at(self, path: str, group: Siblings | None) -> tuple[str, dist.ProcessGroup] | None:
        """The first collective by which this module, or one inside of it but none of the siblings, gathers rows."""
        around = [(p, g) for p, g in self.gathering.items() if not _is_in(p, group)]
        inside = [g for p, g in around if p == path or p.startswith(f"{path}.") or not path]
        return inside[0] if inside else None

    def ranks_of(self, path: str) -> Ranks:
        """The processes that run this module together."""
        inside = [g for p, g in self.exchanging.items() if p == path or p.startswith(f"{path}.") or not path]
        return Ranks(inside[0]) if inside else ALONE


def _is_in(path: str, group: Siblings | None) -> bool:
    """Is a module one of the siblings, or inside of one?"""
    prefix = f"{group.container}." if group and group.container else ""
    return group is not None and any(f"{path}.".startswith(f"{prefix}{name}.") for name in group.names)


@contextlib.contextmanager
def watch_exchanges(modules: dict[str, nn.Module], calls: Calls) -> Iterator[None]:
    """Note which module sends rows to other ranks: the innermost one that is running, its hooks included."""
    running: list[tuple[str, Call]] = []

    def enter(path: str) -> Callable:
        return lambda module, args, kwargs: running.append((path, Call(args, dict(kwargs))))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    def note(name: str, group: dist.ProcessGroup, args: tuple) -> None:
        if is_dispatch(name) and running:
            calls.exchanging.setdefault(running[-1][0], group)
            for path, call in running:
                calls.first.setdefault(path, call)
        elif is_gathering(name) and running:
            calls.gathering.setdefault(running[-1][0], (name, group))

    handles = []
    for path, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with noticed(note):
            yield
    finally:
        for handle in handles:
            handle.remove()


def watch_chain(modules: dict[str, nn.Module], group: Siblings, calls: Calls) -> list[Any]:
    """Hooks that note whether a sibling is given what another one made, perhaps by way of other children of their container; and
    how much each is given.
    """
    made: list[weakref.ref] = []
    container = modules[group.container]
    prefix = f"{group.container}." if group.container else ""
    children = dict(container.named_children())
    members = {children[name]: prefix + name for name in group.names if name in children}  # none in a list of parameters

    def tensors(tree: Any) -> list[Tensor]:
        return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]

    def is_fed(*given: Any) -> bool:
        return any(ref() is t for ref in made for t in tensors(given))

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        path = members[module]
        calls.rows[path] = calls.rows.get(path, 0) + sum(t.numel() for t in tensors((args, kwargs)))
        if is_fed(args, kwargs):
            calls.chained.add(group.container)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if module in members or is_fed(args, kwargs):
            alive = [ref for ref in made if ref() is not None]
            made[:] = [*alive, *(weakref.ref(t) for t in tensors(out) if t.is_floating_point())]

    handles = [child.register_forward_pre_hook(before, with_kwargs=True) for child in members]
    return handles + [child.register_forward_hook(after, with_kwargs=True) for child in container.children()]
