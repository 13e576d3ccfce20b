"""Encoders and stages as modules: each runs its own part of the model's unmodified forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultraep_compile.errors import PartsError
from ultraep_compile.multimodal.absent import must_be_here, nothing_spoilt
from ultraep_compile.multimodal.anatomy import Anatomy, Group, Head
from ultraep_compile.multimodal.calls import Calls, answers
from ultraep_compile.multimodal.division import SAMPLE
from ultraep_compile.multimodal.skeleton import Action, Left, Shape, flatten, holding_only, is_state, loss_of, run


class PartModule(nn.Module):
    """Some of a model's forward. Its parameters are those that it reads, under the names they have in the model."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        object.__setattr__(self, "anatomy", anatomy)  # the model is no child: a part has not all of its parameters
        self.reads: tuple[str, ...] = ()
        """Names of the parameters; set once they are known."""
        self._alone = False

    anatomy: Anatomy

    def _run(self, inputs: Mapping[str, Any], actions: Mapping[Any, Action]) -> tuple[bool, Any]:
        """`run` of the model. Raises PartsError if a value that it hands over is made of what is not here."""
        alone = holding_only(self.anatomy.model, self.reads) if self._alone else contextlib.nullcontext()
        with nothing_spoilt() as spoilt, alone:
            left, output = run(self.anatomy.model, inputs, actions)
            handed_over = output if left else loss_of(output)
            must_be_here(handed_over, "returns")
            spoilt.must_not_show_in(handed_over)
        return left, output

    @contextlib.contextmanager
    def without_other_weights(self) -> Iterator[None]:
        """It runs meanwhile as on a rank that holds what it reads and nothing else."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        start = f"{prefix}." if prefix else ""
        for name in self.reads:
            yield start + name, self.anatomy.model.get_parameter(name)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {name: p.detach() for name, p in self.named_parameters(prefix.rstrip("."))}

    def train(self, mode: bool = True) -> PartModule:
        self.anatomy.model.train(mode)
        return super().train(mode)


Outputs = list[tuple[str, list[Any]]]


class EncoderModule(PartModule):
    """`forward(**item) -> tuple[Tensor, ...]`: features of one item, one tensor for each way in."""

    def __init__(self, anatomy: Anatomy, group: Group) -> None:
        super().__init__(anatomy)
        self.group = group

    def forward(self, **item: Any) -> tuple[Tensor, ...]:
        return self.features(self.outputs(item))

    def features(self, made: Outputs) -> tuple[Tensor, ...]:
        """Those among the outputs of calls, one after the other along dim 0."""
        found = []
        for (path, leaf), dim in zip(self.group.slots, self.group.dims, strict=True):
            rows = [leaves[leaf].movedim(dim, 0) for p, leaves in made if p == path]
            found.append(torch.cat(rows) if len(rows) > 1 else rows[0])
        return tuple(found)

    def outputs(self, item: Mapping[str, Any], made: Outputs | None = None) -> Outputs:
        """(part, leaves of its output) of every call of encoder and projectors.

        Args:
            made: where to put them as they are made, for a caller that expects a failure; no leaves: it was in that call.
        """
        group, anatomy = self.group, self.anatomy
        made = [] if made is None else made
        wanted = {path for path, _ in group.slots}
        runs = max(1, sum(any(item.get(k) is not None for k in s.keys) for s in group.streams))

        def kept(path: str) -> Action:
            def action(own: Any, args: Any, kwargs: Any) -> Any:
                made.append((path, []))
                output = own(*args, **kwargs)
                made[-1][1].extend(flatten(output)[0])
                if group.once and all(sum(p == w for p, _ in made) >= runs for w in wanted):
                    raise Left(None)  # before features meet the language model: an item may be less than a sample
                return output

            return action

        def leave(own: Any, args: Any, kwargs: Any) -> Any:
            raise Left(None)

        lacking = {k: shape.absent(f"the input {k!r}") for k, shape in anatomy.required.items() if k not in item}
        actions: dict[Any, Action] = {anatomy.layers[0]: leave}
        if lacking:  # what other encoders are given, which need not run for this one
            actions |= {anatomy.part(p): _not_here(p, *made_of) for p, made_of in anatomy.returned.items()}
        actions |= {anatomy.part(p): kept(p) for p in group.paths}
        self._run({**lacking, **item}, actions)
        must_be_here(made, "returns")
        if not wanted <= {p for p, _ in made}:
            raise PartsError(
                f"{group.name} did not run on an item with {sorted(item)}; it needs {', '.join(group.keys)}"
            )
        return made


def _not_here(path: str, leaves: list[Any], spec: Any) -> Action:
    """In the place of a part: what it returns, without values."""

    def action(own: Any, args: Any, kwargs: Any) -> Any:
        absent = [x.absent(f"what {path} returns") if isinstance(x, Shape) else x for x in leaves]
        return pytree.tree_unflatten(absent, spec)

    return action


class StageModule(PartModule):
    """`forward(hidden, inputs, features)`: layers `first` to `last` (exclusive), with what stands before or behind them.

    Layers of stages before it hand on what they are given; the last of them hands on what the stage before computed.
    """

    def __init__(self, anatomy: Anatomy, calls: Calls, first: int, last: int) -> None:
        super().__init__(anatomy)
        self.calls, self.first, self.last = calls, first, last

    @property
    def is_last(self) -> bool:
        return self.last == len(self.anatomy.layers)

    def forward(
        self, hidden: tuple[Tensor, ...], inputs: Mapping[str, Any], features: Mapping[str, tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        anatomy = self.anatomy
        by_path = answers(self.calls(inputs), anatomy.groups, features)
        actions: dict[Any, Action] = {anatomy.part(p): a for p, a in by_path.items()}
        scratch = [h.detach().clone() for h in hidden] if self.first > 1 else []
        for i, layer in enumerate(anatomy.layers):
            if i < self.first:
                given = [h.clone() for h in hidden] if i == self.first - 1 else scratch  # the model may write into it
                actions[layer] = self._handed_on(i, given)
            elif i >= self.last:
                actions[layer] = self._behind
        states: dict[str, list[Tensor]] = {}
        if not self.is_last:
            actions[anatomy.layers[self.last - 1]] = self._last_own
        else:
            actions |= {anatomy.part(h.name): _states_of(h, states) for h in anatomy.heads}
        left, output = self._run(inputs, actions)
        if left:
            return output
        if not self.is_last:
            raise PartsError(
                f"stage of layers {self.first} to {self.last - 1}: the forward ended without running its last layer. Layers that "
                "are dropped at random cannot be pipelined; switch layer drop off."
            )
        return (*(x for h in anatomy.heads for x in states[h.name]), loss_of(output))

    def _handed_on(self, index: int, states: list[Tensor]) -> Action:
        leaves, spec = self.anatomy.outputs[index]

        def action(own: Any, args: Any, kwargs: Any) -> Any:
            given = iter(states)
            return pytree.tree_unflatten([next(given) if leaf is None else leaf for leaf in leaves], spec)

        return action

    def _last_own(self, own: Any, args: Any, kwargs: Any) -> Any:
        raise Left(tuple(x for x in pytree.tree_leaves(own(*args, **kwargs)) if is_state(x)))

    def _behind(self, own: Any, args: Any, kwargs: Any) -> Any:
        raise PartsError(
            f"a layer behind number {self.last - 1} runs before it: layers that do not run in order cannot be cut"
        )


@contextlib.contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters get no gradients from what is run meanwhile."""
    others = [p for p in parameters if p.requires_grad]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def _states_of(head: Head, found: dict[str, list[Tensor]]) -> Action:
    """In the place of a generator: note what it would read, return zeros."""

    def action(own: Any, args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        found[head.name] = [leaves[i] for i in head.states]
        return head.silent(own, args, kwargs)

    return action


class GeneratorModule(PartModule):
    """`forward(states, **inputs) -> loss`: a generator's part of the loss of a microbatch.

    A generator that returns its loss is left right behind its call. Otherwise the loss that the model makes of its output is
    told apart by what the loss is when generator and language model return zeros.

    With `sample_of_microbatch=(i, n)` among the inputs they are those of sample i of n, and so is the loss: the n of them add up to that of
    the microbatch. States are always those of the whole microbatch.
    """

    def __init__(self, anatomy: Anatomy, calls: Calls, head: Head) -> None:
        super().__init__(anatomy)
        self.calls, self.head = calls, head
        start = sum(len(h.states) for h in anatomy.heads[: anatomy.heads.index(head)])
        self.mine = slice(start, start + len(head.states))
        self.trains: frozenset[str] = frozenset()
        """Parameters that have gradients from the generator's part of the loss; others that it reads, from the rest alone."""
        self.shares_weights = True
        """Has the rest of the loss gradients to parameters of `trains`? Those must cancel, too."""

    def forward(self, states: tuple[Tensor, ...], **inputs: Any) -> Tensor:
        with _frozen(p for n, p in self.anatomy.model.named_parameters() if n not in self.trains):
            loss, *rest = self.losses(states, **inputs)
        return loss - rest[0] if rest else loss

    def losses(self, states: tuple[Tensor, ...], **inputs: Any) -> tuple[Tensor, ...]:
        """The generator's own loss; or the model's with it, and the model's with zeros in the place of its output."""
        index, count = inputs.pop(SAMPLE, (0, 1))
        mine = states[self.mine] if count == 1 else [s[index : index + 1] for s in states[self.mine]]
        given = iter([s.clone() for s in mine])  # the model may write into it

        def generate(own: Any, args: Any, kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            for i in self.head.states:
                leaves[i] = next(given)
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            output = own(*args, **kwargs)
            if self.head.factor is not None:
                raise Left(loss_of(output) * self.head.factor)
            return output

        left, output = self._around(inputs, generate)
        if left:
            return (output / count,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.shares_weights):
            _, silent = self._around(inputs, self.head.silent)
        return loss_of(output) / count, loss_of(silent) / count

    def _around(self, inputs: Mapping[str, Any], generate: Action) -> tuple[bool, Any]:
        anatomy = self.anatomy
        by_path = answers(self.calls(inputs), anatomy.groups, {})
        actions: dict[Any, Action] = {anatomy.part(p): a for p, a in by_path.items()}
        actions |= {anatomy.part(h.name): _states_of(h, {}) for h in anatomy.heads}
        actions |= {layer: self._silent_layer(i) for i, layer in enumerate(anatomy.layers)}
        actions[anatomy.part(self.head.name)] = generate
        return self._run(inputs, actions)

    def _silent_layer(self, index: int) -> Action:
        leaves, spec = self.anatomy.outputs[index]

        def action(own: Any, args: Any, kwargs: Any) -> Any:
            state = next(x for x in pytree.tree_leaves((args, kwargs)) if is_state(x))
            return pytree.tree_unflatten([torch.zeros_like(state) if leaf is None else leaf for leaf in leaves], spec)

        return action
