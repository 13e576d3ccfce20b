"""What encoders and projectors would return for given inputs: shapes and integers, without features.

A stage that does not run an encoder still runs the model's code around it (slicing, unpadding, merging), which needs
tensors of the right shape. They depend on the shapes of the inputs, on the integers in them and on which images are empty, so they are kept by these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.anatomy import Anatomy, Group
from ultraep_compile.multimodal.skeleton import Action, Left, Shape, flatten, is_state, run

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartCall:
    path: str
    leaves: tuple[Any, ...]
    """Shapes of states; other values as they are."""
    spec: Any


class Calls:
    """Calls of encoders and projectors in a forward with given inputs, in order."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.shapes_only = True
        self._known: dict[Any, tuple[PartCall, ...]] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[PartCall, ...]:
        key = self._signature(inputs)
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = tuple(self._without_content(inputs) or self._watch(inputs))
        return self._known[key]

    def _without_content(self, inputs: Mapping[str, Any]) -> list[PartCall] | None:
        """The calls by shapes alone, integers as they are; None if the model needs to see the content of a state."""
        if not self.shapes_only:
            return None
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # takes part only where one of its tensors does
        fed = {k for g in self.anatomy.groups for k in g.keys}
        fake = {k: mode.from_tensor(v) if k in fed and is_state(v) else v for k, v in inputs.items()}
        try:
            calls = self._watch(fake)
        except Exception as reason:
            log.info("shapes of %s need the content of its inputs: %s", type(self.anatomy.model).__name__, reason)
            self.shapes_only = False
            return None
        known = not any(isinstance(leaf, FakeTensor) for call in calls for leaf in call.leaves)
        self.shapes_only = known
        return calls if known else None

    def _signature(self, inputs: Mapping[str, Any]) -> Any:
        keys = sorted({k for g in self.anatomy.groups for k in g.keys if inputs.get(k) is not None})
        return tuple((k, *_signed(inputs[k])) for k in keys)

    def _watch(self, inputs: Mapping[str, Any]) -> list[PartCall]:
        calls: list[PartCall] = []
        slots = {slot for g in self.anatomy.groups for slot in g.slots}

        def noted(path: str) -> Action:
            def action(own: Any, args: Any, kwargs: Any) -> Any:
                output = own(*args, **kwargs)
                leaves, spec = flatten(output)
                kept = (Shape.of(x) if is_state(x) or (path, i) in slots else x for i, x in enumerate(leaves))
                calls.append(PartCall(path, tuple(kept), spec))
                return output

            return action

        def leave(own: Any, args: Any, kwargs: Any) -> Any:
            raise Left(None)

        actions: dict[Any, Action] = {self.anatomy.part(p): noted(p) for g in self.anatomy.groups for p in g.paths}
        with torch.no_grad():
            run(self.anatomy.model, inputs, actions | {self.anatomy.layers[0]: leave})
        return calls


def _signed(value: Any) -> tuple[Any, ...]:
    """Shape, and all of the content that shapes may depend on: integers; of states only which images or rows are empty."""
    if not isinstance(value, Tensor):
        return (repr(value),)
    content = value.detach()
    if is_state(content):
        content = (
            content.flatten(2).any(-1) if content.dim() > 2 else content.any(-1) if content.dim() == 2 else content != 0
        )
    return (tuple(value.shape), value.dtype, content.cpu().contiguous().numpy().tobytes())


def answers(
    calls: tuple[PartCall, ...], groups: list[Group], features: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, Action]:
    """Actions that stand for encoders and projectors: their features as given, all other states absent.

    Features of a part that is called several times are handed out in order, as many rows as each call makes.
    """
    left: dict[str, Iterator[PartCall]] = {}
    for call in calls:
        left.setdefault(call.path, iter([c for c in calls if c.path == call.path]))
    place = {slot: (g.name, i, g.dims[i]) for g in groups for i, slot in enumerate(g.slots)}
    used: dict[tuple[str, int], int] = {}

    def answer(path: str) -> Action:
        def action(own: Any, args: Any, kwargs: Any) -> Any:
            call = next(left.get(path, iter(())), None)
            assert call is not None, f"{path} was not called when its shapes were noted"
            leaves = []
            for i, leaf in enumerate(call.leaves):
                given = features.get(place[path, i][0]) if (path, i) in place else None
                if given is None:
                    leaves.append(leaf.absent(f"what {path} returns") if isinstance(leaf, Shape) else leaf)
                    continue
                _, slot, dim = place[path, i]
                start = used.get((path, i), 0)
                used[path, i] = start + leaf.sizes[dim]
                rows = given[slot][start : used[path, i]].movedim(0, dim)
                if tuple(rows.shape) != leaf.sizes:
                    raise PartsError(
                        f"features of {path}: {list(rows.shape)} were made of the items, {list(leaf.sizes)} are read. An encoder that "
                        "makes other features of items than of a microbatch cannot run on items: give an example batch that shows it."
                    )
                leaves.append(rows.clone())  # the model may write into it
            return pytree.tree_unflatten(leaves, call.spec)

        return action

    return {p: answer(p) for g in groups for p in g.paths}
