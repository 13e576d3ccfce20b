"""Which modules of a model may hold experts: by structure alone, as a proposal that data flow must confirm.

Experts are many of a kind: sibling modules with equal parameters, or parameters that one module owns itself and that have
more dims, or more rows, than one layer needs. Nothing here looks at names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

FEWEST = 2


@dataclass(frozen=True, slots=True)
class Siblings:
    """Children of one module that are alike in all their parameters; or parameters of one list."""

    container: str
    names: tuple[str, ...]
    """Of the children, in order: the place is the expert's number."""
    roles: tuple[str, ...]
    """Parameter names inside a child; "" where the children are parameters."""
    beside: tuple[Siblings, ...] = ()
    """Other lists, of as many: what stands at one place of each makes up one expert."""

    def parameters(self) -> dict[str, tuple[str, int]]:
        """Parameter of the model -> (role, expert)."""
        prefix = f"{self.container}." if self.container else ""
        own = {prefix + ".".join(filter(None, (n, role))): (role, e) for e, n in enumerate(self.names) for role in self.roles}
        for other in self.beside:
            own |= {name: (f"{other.container}/{role}", e) for name, (role, e) in other.parameters().items()}
        return own


def siblings(model: nn.Module) -> Iterator[Siblings]:
    """All groups of like children, outermost first."""
    for path, module in model.named_modules():
        kinds: dict[tuple, list[str]] = {}
        if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            for name, p in module.named_parameters(recurse=False):
                if p.dim() >= 2:
                    kinds.setdefault((nn.Parameter, (("", tuple(p.shape), p.dtype),)), []).append(name)
        for name, child in module.named_children():
            kind = tuple((n, tuple(p.shape), p.dtype) for n, p in child.named_parameters())
            if kind and max(len(shape) for _, shape, _ in kind) >= 2:
                kinds.setdefault((type(child), kind), []).append(name)
        for (_, kind), names in kinds.items():
            if len(names) >= FEWEST:
                yield Siblings(path, tuple(names), tuple(n for n, _, _ in kind))


def unlike_siblings(model: nn.Module) -> Iterator[Siblings]:
    """Children of one list that are of one class, with parameters of other sizes: experts, perhaps, that cannot be exchanged."""
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or len(children) < FEWEST:
            continue
        kinds = {(type(c), tuple((n, tuple(p.shape)) for n, p in c.named_parameters())) for c in children.values()}
        names = {tuple(n for n, _ in shapes) for _, shapes in kinds}
        if len(kinds) > 1 and len({t for t, _ in kinds}) == len(names) == 1 and () not in names:
            yield Siblings(path, tuple(children), next(iter(names)))


def with_lists_beside(owner: nn.Module, group: Siblings) -> Siblings | None:
    """A group and all others of as many inside the owner that are neither in it nor around it, if there are any."""
    around = lambda a, b: f"{a}.".startswith(f"{b}.") or not b  # noqa: E731
    others: list[Siblings] = []
    for other in siblings(owner):
        apart = not any(around(other.container, g.container) or around(g.container, other.container) for g in (group, *others))
        if len(other.names) == len(group.names) and apart:
            others.append(other)
    return dataclasses.replace(group, beside=tuple(others)) if others else None


def raw_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules, not layers of torch, that own matrices themselves: stacked or flat experts may be among them."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        shapes = [p.shape for p in module.parameters(recurse=False) if p.dim() >= 2]
        stacked = any(len(s) >= 3 and s[0] >= FEWEST for s in shapes)
        if stacked or sum(len(s) == 2 for s in shapes) >= 2:
            yield path, module


def like_layers(model: nn.Module, path: str) -> tuple:
    """Equal for modules that are copies of each other in everything but their weights."""
    module = model.get_submodule(path)
    shapes = tuple((n, tuple(t.shape), t.dtype) for n, t in itertools.chain(module.named_parameters(), module.named_buffers()))
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool, tuple)) and not k.startswith("_")}
    plain = {k: v for k, v in plain.items() if "idx" not in k and "index" not in k and "layer" not in k}
    return (type(module), shapes, repr(sorted(plain.items())))
