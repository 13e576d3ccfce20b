"""What users change in a model between steps: which parameters are trained, its modes, its structure."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import nn
from torch.distributed.tensor import DTensor

from ultraep_compile.errors import PipelineError
from ultraep_compile.executor.agreement import digest_of, listed

Ties = tuple[tuple[str, str], ...]
"""(name of a parameter, its first name), for every name."""


def ties_of(names: Mapping[str, nn.Parameter]) -> Ties:
    """Which names stand for one parameter."""
    first: dict[int, str] = {}
    return tuple((name, first.setdefault(id(p), name)) for name, p in names.items())


class Structure:
    """The modules and parameters of a model as they were, to notice a change at the cost of a walk over them."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        # weak: what fully_shard has replaced must not stay in memory
        self._seen = [[None if x is None else weakref.ref(x) for x in _held(m)] for m in self.modules]

    def changed(self) -> bool:
        """Is any parameter or module another object, gone, or new?"""
        for module, seen in zip(self.modules, self._seen, strict=True):
            now = _held(module)
            if len(now) != len(seen) or any(x is not (ref and ref()) for x, ref in zip(now, seen, strict=True)):
                return True
        return False


def _held(module: nn.Module) -> list[nn.Parameter | nn.Module | None]:
    return [*module._parameters.values(), *module._modules.values()]


def check_names(before: Ties, now: Ties) -> None:
    """Refuse a model whose parameters have other names or ties than when it was divided.

    Raises: PipelineError: names what is new, gone, or tied otherwise.
    """
    if before == now:
        return
    old, new = dict(before), dict(now)
    added, gone = [n for n in new if n not in old], [n for n in old if n not in new]
    tied = [n for n in new if n in old and new[n] != old[n]]
    what = [
        f"{listed(names)} {verb}"
        for names, verb in ((added, "came"), (gone, "went"), (tied, "were tied or untied"))
        if names and not (verb.startswith("were") and (added or gone))
    ]
    raise PipelineError(
        f"The model's parameters are not those that pipeline() divided: {'; '.join(what) or 'their order changed'}. Adapters, ties and"
        " new layers must be there before: load a state of the whole model, change it, and call pipeline() anew."
    )


def sharded_stay(bound: Mapping[str, nn.Parameter], names: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters by name as they are now; what FSDP holds divided is not taken for what it has gathered for a while."""
    return {
        name: old if isinstance(old := bound.get(name), DTensor) and not isinstance(p, DTensor) else p
        for name, p in names.items()
    }


def modes(modules: Iterable[nn.Module]) -> int:
    """A digest of which modules train and which evaluate."""
    return digest_of("".join("01"[m.training] for m in modules))
