"""Which of its lifted forwards a module may use now, and new ones for states of Python that it was not recorded in.

Under Dynamo the forward of a lifted module asks `choice` while it is traced. What was chosen holds for as long as all that its
recording read is as it was, so `look` gives Dynamo a guard that compares. When it fails, Dynamo traces again, and the choice is
another: an earlier state is recognised; for a new one the module is recorded, lifted and proven anew, eagerly and once; where
that cannot be done its own forward runs, with one warning that says what has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.guards import install_guard
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ultraep_compile.errors import ShardingError, UltraEPError
from ultraep_compile.exchange import line_of
from ultraep_compile.ladder.divided import division_of
from ultraep_compile.ladder.guards import HOOKS, Reads, hooks_of

if TYPE_CHECKING:
    from ultraep_compile.ladder.install import Lift, LiftedLayer

log = logging.getLogger(__name__)
STANDING = "_ultraep_standing"
EAGER = "eager"
"""For `choice`: the module's own forward, uncompiled. Dynamo does not look whether all modules that share a graph have hooks."""
RAISE = "raise"
_STATES = 8
"""Of one module that have a forward: beyond these, other states run the module's own."""
_ATTEMPTS = 16
"""To lift one module anew, in its life."""


Forms = dict[str, tuple[tuple[int, ...], torch.device, torch.dtype]]
"""Parameter -> shape, device, dtype. Recorded constants are of these; Dynamo's own guards see parameters that a graph reads."""


def forms_of(owner: nn.Module) -> Forms:
    return {n: (tuple(p.shape), p.device, p.dtype) for n, p in owner.named_parameters(remove_duplicate=False)}


@dataclasses.dataclass(slots=True, weakref_slot=True)
class State:
    """A state of Python that a module was seen in."""

    reads: Reads
    kinds: tuple[torch.dtype, ...]
    """Of the tensors that its forward was given."""
    forms: Forms
    """Of its parameters."""
    forward: str
    """Name in `LiftedLayer.forwards`; "" where the module's own runs."""
    reason: str = ""
    """Why it does."""

    def fits(self, kinds: tuple[torch.dtype, ...], forms: Forms, cast: bool) -> bool:
        """Is this for such inputs and parameters? Autocast gives both the dtype that it likes."""
        if not cast:
            return self.kinds == kinds and self.forms == forms
        return self.forms.keys() == forms.keys() and all(f[:2] == forms[n][:2] for n, f in self.forms.items())


@dataclasses.dataclass(slots=True)
class Standing:
    """What is known of one module: the states that it was in, the latest first."""

    name: str
    layer: LiftedLayer
    states: list[State]
    attempts: int = 0
    error: tuple[UltraEPError, _Guard] | None = None
    """What lifting it anew has ended in, to be raised by its call; and the guard of that graph."""
    warned: set[str] = dataclasses.field(default_factory=set)
    told: str = ""
    """The latest of them."""

    def add(self, lift: Lift, reads: Reads, kinds: tuple[torch.dtype, ...], forms: Forms) -> State:
        forwards = self.layer.forwards
        found = next(
            (n for n, f in vars(forwards).items() if isinstance(f, Forward) and f.function is lift.function), None
        )
        if found is None:
            found = f"forward_{len(vars(forwards))}"
            facts = lift.facts
            setattr(forwards, found, Forward(lift.function, facts.lead, facts.most, facts.parameters, facts.ranks, bool(facts.inference)))
        self.states.insert(0, State(reads, kinds, forms, found))
        return self.states[0]

    def warn(self, text: str) -> None:
        """Once for each text."""
        self.told = text
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"ultraep: {text}", stacklevel=2)


class Forward:
    """A lifted forward: `function(module, *tensors)`, and the batches that it is good for."""

    def __init__(
        self,
        function: Callable,
        lead: tuple[int, ...] | None,
        most: int | None,
        parameters: tuple[str, ...],
        ranks: int,
        inference: bool = False,
    ) -> None:
        self.function, self.lead, self.most, self.parameters, self.ranks = function, lead, most, parameters, ranks
        self.inference = inference


def standing_of(module: nn.Module) -> Standing | None:
    return getattr(type(module), STANDING, None)


def why_unbalanced(module: nn.Module) -> str:
    """What was warned of a lifted module that runs its own forward in the state that it is in, "" for any other."""
    standing = standing_of(module)
    if standing is None:
        return ""
    state = next((s for s in standing.states if s.reads.hold()), None)
    lifted = state is not None and state.forward and not hooked_module(module, standing.layer.facts.parameters)
    return "" if lifted else standing.told


# ---- while Dynamo traces ---------------------------------------------------------------------------------------------

_now = threading.local()


def look(ctx: Any) -> None:
    """Note which module is being traced, and have Dynamo ask `_Guard` before it uses what comes of it. A comptime function."""
    _now.guard, _now.owner = None, None
    try:
        variable = ctx.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker()
        variable = variable.realize() if hasattr(variable, "realize") else variable
        guard = _Guard(variable.value)

        def create(builder: Any, noted: Any) -> None:
            guard.install(builder.get_guard_manager(noted))

        install_guard(variable.source.make_guard(create))
        guard.pending = _pending(ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator())
        _now.guard, _now.owner = guard, variable.value
    except (AttributeError, TypeError) as reason:  # another Dynamo: better unbalanced than with nobody to look
        log.warning("lifted layers run as they are: this torch does not let us add a guard (%s)", reason)


def _pending(tracer: Any) -> set[tuple[int, str]]:
    """Attributes that the traced code has set so far: Dynamo sets them after the graph, the objects have the old ones."""
    mutations = tracer.output.side_effects.store_attr_mutations
    return {(id(getattr(v, "value", None)), str(name)) for v, names in mutations.items() for name in names}


@torch.compiler.assume_constant_result
def choice(kinds: tuple[torch.dtype, ...]) -> str:
    """Name of the forward for the module that `look` saw, "" for its own."""
    guard = _now.guard
    return "" if guard is None else guard.choose(kinds)


def choice_for(owner: nn.Module, kinds: tuple[torch.dtype, ...]) -> str:
    """The same where no Dynamo traces: an export, which is of the state that it finds."""
    return _Guard(owner).choose(kinds)


class _Guard:
    """Would the choice be the same?"""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = weakref.ref(owner)
        self.state: State | None = None
        self.others: list[State] = []
        """Where no state is chosen: those that would be."""
        self.pending: set[tuple[int, str]] = set()
        self.once = False
        """An error is raised once: the next call asks again."""
        self.hooks: list[dict[int, Any]] = hooks_of(owner)
        self.numbers = list(map(len, self.hooks))

    def install(self, manager: Any) -> None:
        parts = ["ultraep: what the recorded forward read in Python is as it was"]
        try:
            manager.add_lambda_guard(self.holds, parts, None)
        except TypeError:  # before torch 2.12
            manager.add_lambda_guard(self.holds, parts)

    def holds(self, module: Any) -> bool:
        if self.once or self.owner() is not module or list(map(len, self.hooks)) != self.numbers:
            return False
        if self.state is not None:
            return self.state.reads.hold()
        return not any(s.reads.hold() for s in self.others)

    def choose(self, kinds: tuple[torch.dtype, ...]) -> str:
        owner = self.owner()
        standing = standing_of(owner) if owner is not None else None
        if owner is None or standing is None:
            return ""
        cast = any(torch.is_autocast_enabled(d) for d in {p.device.type for p in owner.parameters()} | {"cpu"})
        forms = forms_of(owner)
        fitting = [s for s in standing.states if s.fits(kinds, forms, cast)]
        self.state = next((s for s in fitting if s.reads.hold()), None)
        if self.state is None and not cast and (hooked := hooked_module(owner, standing.layer.facts.parameters)):
            standing.warn(
                f"{standing.name} runs unbalanced: {hooked} has hooks, which experts that are called together do not run"
            )
            return EAGER
        if self.state is None and not cast:
            try:
                self.state = lift_anew(owner, standing, kinds)
            except UltraEPError as error:  # for the user, and not for Dynamo to wrap
                standing.error = (error, self)
                return RAISE
        self.others = fitting
        if self.state is None or not self.state.forward:
            # Frames of the module's own forward are shared by its experts, and Dynamo takes them for alike in hooks. And what exchanges
            # rows with other ranks has sizes that Dynamo fails on, where each rank has its own.
            return EAGER if any(self.hooks[len(HOOKS) :]) or standing.layer.ranks.size > 1 else ""
        if any(written in self.state.reads.seen for written in self.pending):
            standing.warn(
                f"{standing.name} runs unbalanced: attributes that its forward reads are set while the model runs"
            )
            return ""
        forward: Forward = getattr(standing.layer.forwards, self.state.forward)
        if forward.ranks == 1 and (hooked := hooked_module(owner, forward.parameters)):
            standing.warn(
                f"{standing.name} runs unbalanced: {hooked} has hooks, which experts that are called together do not run"
            )
            return EAGER
        return self.state.forward


@torch.compiler.disable
def raise_error(module: nn.Module) -> None:
    standing = standing_of(module)
    assert standing is not None and standing.error is not None
    error, guard = standing.error
    guard.once = True
    raise error


# ---- new states ------------------------------------------------------------------------------------------------------


def lift_anew(owner: nn.Module, standing: Standing, kinds: tuple[torch.dtype, ...]) -> State | None:
    """Record, lift and prove a module in the state that it is in; None where that was tried too often already."""
    from ultraep_compile.ladder.layer import lift_again

    forms = forms_of(owner)
    what = _changes(standing, kinds, forms)
    if _get_current_dispatch_mode() is not None:  # an export: parameters have no values
        return None
    full = sum(bool(s.forward) for s in standing.states) >= _STATES and not _make_room(owner, standing)
    if standing.attempts >= _ATTEMPTS or full:
        standing.warn(
            f"{standing.name} runs unbalanced in states other than the {len(standing.states)} that it was lifted in: {what}. "
            "What changes in every step is better kept in a buffer"
        )
        return None
    _agree(owner, standing, what)
    standing.attempts += 1
    log.info("%s is lifted anew: %s", standing.name, what)
    try:
        with _as_outside_of_a_compiler():
            lift, reads, reason = lift_again(owner, standing.name, standing.layer, kinds)
    except UltraEPError:
        raise
    except Exception as fault:  # the outermost door: what we do not understand runs as it is
        log.warning("%s cannot be lifted anew", standing.name, exc_info=fault)
        lift, reads, reason = None, Reads(owner), f"internal error {type(fault).__name__}: {fault}"
    if lift is not None:
        return standing.add(lift, reads, kinds, forms)
    standing.warn(
        f"{standing.name} runs unbalanced: {what} since it was prepared, and it cannot be lifted so ({reason})"
    )
    standing.states.append(State(reads, kinds, forms, "", reason))
    return standing.states[-1]


def _agree(owner: nn.Module, standing: Standing, what: str) -> None:
    """Where ranks run a module together, they lift it anew together: all have come here, and for the same reason.

    Raises: ShardingError where the reasons differ, PeerTimeoutError where some have not come.
    """
    division, group = division_of(owner), standing.layer.ranks.group
    if division is not None:
        group = dist.distributed_c10d._resolve_process_group(division.group)  # pyright: ignore
    if group is None:
        return
    said = line_of(group).gather_objects(what, f"a new state of {standing.name}")
    if len(set(said)) > 1:
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said[:8]))
        raise ShardingError(
            f"{standing.name}: its ranks run it together, and Python's state has changed differently on them ({told}). Make the same "
            "change on all ranks, before the same step."
        )


def _changes(standing: Standing, kinds: tuple[torch.dtype, ...], forms: Forms) -> str:
    """What tells the module's state from the one nearest to it, in words."""
    told = [
        [*s.reads.changes(), *_reformed(s.forms, forms)] or [f"inputs were {_dtypes(s.kinds)} and are {_dtypes(kinds)}"]
        for s in standing.states
    ]
    nearest = min(told, key=len, default=["nothing is known of its state"])
    return "; ".join(nearest[:3]) + (f" and {len(nearest) - 3} more" if len(nearest) > 3 else "")


def _reformed(before: Forms, now: Forms) -> Iterator[str]:
    """Example: `experts.0.weight was float32[4, 4] on cpu and is float64[4, 4] on cpu`. An index of a device is each rank's own."""

    def told(forms: Forms, name: str) -> str:
        if name not in forms:
            return "no parameter"
        shape, device, dtype = forms[name]
        return f"{_dtypes((dtype,))}{list(shape)} on {device.type}"

    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            yield f"{name} was {told(before, name)} and is {told(now, name)}"


def _dtypes(kinds: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(k).removeprefix("torch.") for k in kinds)


def _make_room(owner: nn.Module, standing: Standing) -> bool:
    """Forget states of modules that are no longer inside."""
    before = len(standing.states)
    standing.states[:] = [s for s in standing.states if s.reads.holds_modules_of(owner)]
    return len(standing.states) < before


@contextlib.contextmanager
def _as_outside_of_a_compiler() -> Iterator[None]:
    """Gradients, no autocast, no inference mode, and nobody is told that something compiles."""
    flag = torch.compiler._is_compiling_flag  # pyright: ignore
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        torch.compiler._is_compiling_flag = False  # pyright: ignore
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = flag  # pyright: ignore


def hooked_module(owner: nn.Module, parameters: Iterable[str]) -> str:
    """A module between the layer and its experts' parameters that has hooks, "" if there is none. Layers that are divided over
    ranks may exchange rows in theirs.
    """
    paths = {".".join(parts[:n]) for p in parameters for parts in [p.split(".")] for n in range(1, len(parts))}
    inside = dict(owner.named_modules())
    for path in sorted(paths & inside.keys()):
        if any(getattr(inside[path], hooks) for hooks in HOOKS):
            return path
    return ""
