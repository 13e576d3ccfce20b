"""The option `watch`: while a model runs, now and then one layer is computed once more by the module's own forward.

At steps 1, 2, 4, ... 1024 and every 1023rd from then on, one layer in turn is looked at: what the step gave it is kept, and when the
graph has run, the rewritten graph's part of that layer and the module's own forward (of a traced layer: the unmodified graph's
part) compute it again, in training with gradients by the same random direction. Both are given the same bits, the same random
state and no dropout, run on copies of buffers and of the module's Python state, and leave no trace in the step: gradients, buffers,
random state and the module are as they were. A difference is judged beside the same computation in fp64.

Over processes all ranks look at the same step and layer, because they count the same calls, and raise together. On an ordinary
step the watch adds one to an integer.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ultraep_compile.errors import UltraEPError, VerificationError
from ultraep_compile.ladder.check import NoDropout
from ultraep_compile.ladder.divided import division_of, stack_experts
from ultraep_compile.ladder.install import Pattern, lifted_layer, lifted_modules, state_of
from ultraep_compile.ops import watch
from ultraep_compile.ops.alike import from_all_ranks
from ultraep_compile.ops.experts import ExpertSite
from ultraep_compile.ops.looked_at import asking
from ultraep_compile.passes.lift.rewrite import where_now
from ultraep_compile.passes.pipeline import Rewrite, source_of
from ultraep_compile.passes.regions import Region, cut

log = logging.getLogger(__name__)
_PERIOD = 1023
"""Odd, so that layers that share one graph come up in turn."""
_SEED = 20
_SHOWN = 64
"""Tokens that are named at most."""


@dataclass(slots=True)
class Clock:
    """Counts the calls of a graph and says when to look."""

    calls: int = 0
    looks: int = 0
    next: int = 1

    def tick(self) -> int | None:
        """Number of the look that is due, if one is."""
        self.calls += 1
        if self.calls < self.next:
            return None
        self.looks += 1
        self.next = 2 * self.calls if self.calls < 1024 else self.calls + _PERIOD
        return self.looks - 1


_clocks: dict[tuple, Clock] = {}
"""Of graphs over process groups: a rank that compiles a graph again counts on, as the others do."""


@dataclass(slots=True)
class Layer:
    """One layer that can be looked at."""

    key: str
    site: ExpertSite
    is_layer: bool
    before: Region
    after: Region
    reads_before: list[int]
    """Arguments of the graph that the regions read."""
    reads_after: list[int]
    weights: list[int]
    """Arguments among them that hold this layer's parameters."""
    own_fails: bool = False
    """The module's own forward does not run as it is (an in-place write that autocast forbids): the graph's part is looked at."""
    broken: bool = False
    """Nor does that."""


@dataclass(slots=True)
class _Found:
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


class Watch:
    """Stands around a compiled graph."""

    def __init__(self, gm: fx.GraphModule, rewrite: Rewrite) -> None:
        """Before the inner backend changes `gm`."""
        self.layers = [layer for key in rewrite.looked_at if (layer := _layer(gm, rewrite, key)) is not None]
        self.group = rewrite.group
        names = tuple(layer.key for layer in self.layers)
        self.clock = _clocks.setdefault((self.group, tuple(n.partition("@")[0] for n in names)), Clock()) if self.group else Clock()
        self.compiled: Callable[..., Any] = gm.forward
        self.lock = threading.Lock()

    def beside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled = compiled
        return self if self.layers else compiled

    def __call__(self, *args: Any) -> Any:
        turn = self.clock.tick()
        if turn is None or _cannot_look():
            return self.compiled(*args)
        layer = self.layers[turn % len(self.layers)]
        if layer.broken:
            return self.compiled(*args)
        kept = [_kept(a) if i in {*layer.reads_before, *layer.reads_after} else None for i, a in enumerate(args)]
        with asking(layer.key) as found:
            result = self.compiled(*args)
        self._look(layer, kept, found.get("tensors"))
        return result

    def _look(self, layer: Layer, args: list[Any], seen: list[Tensor] | None) -> None:
        ready = seen is not None and _has_room(layer, args)
        if not all(from_all_ranks(self.group, ready)):
            return
        assert seen is not None
        try:
            text = _difference(layer, args, seen)
        except UltraEPError:
            raise
        except Exception as fault:  # the user's own code, run where it does not expect it
            layer.broken, text = True, ""
            log.info("the watch cannot run %s by itself and leaves it alone: %s: %s", layer.site.name, type(fault).__name__, fault)
        every = from_all_ranks(self.group, (text, layer.broken))
        layer.broken = any(broken for _, broken in every)  # or the others would wait at the next look
        rank, first = next(((r, t) for r, (t, _) in enumerate(every) if t), (0, ""))
        if first:
            raise VerificationError(f"on rank {rank}, {first}" if len(every) > 1 else first)


def _layer(gm: fx.GraphModule, rewrite: Rewrite, key: str) -> Layer | None:
    at = rewrite.looked_at[key]
    inputs = [where_now(at.owner, n) for n in at.before.inputs]
    after = cut(at.owner, inputs, [where_now(at.owner, n) for n in at.outputs], lambda n: source_of(gm, at.owner, n) is not None)
    if after is None or after.inputs != inputs:
        log.debug("%s is not watched: it reads more than it is given", key)
        return None
    before_reads, after_reads = ([source_of(gm, at.owner, n) for n in r.free] for r in (at.before, after))
    weights = [s for n, s in zip(after.free, after_reads, strict=True) if "_parameters_" in str(n.target)]
    found = Layer(key, rewrite.prepared[key], at.is_layer, at.before, after, before_reads, after_reads, weights)  # pyright: ignore
    return found


def _cannot_look() -> bool:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling() or torch._C._functorch.get_dynamic_layer_stack_depth() > 0  # pyright: ignore


def _kept(value: Any) -> Any:
    """What the step may write to is kept as it was; parameters are read where they are."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad) if value.is_floating_point() else value.detach().clone()


def _has_room(layer: Layer, args: list[Any]) -> bool:
    """Where experts are divided, the module's own forward reads all of them: only where there is memory for that."""
    if not layer.site.sharded or not torch.cuda.is_available():
        return True
    held = sum(_local(args[i]).numel() * args[i].element_size() for i in layer.weights)
    return 4 * held * layer.site.layout.ranks < torch.cuda.mem_get_info()[0]


# ---- both ways --------------------------------------------------------------------------------------------------------


def _difference(layer: Layer, args: list[Any], seen: list[Tensor]) -> str:
    """What is wrong, "" if nothing is. All ranks come here together."""
    training = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    module = _module_of(layer, args) if layer.is_layer else None
    if layer.is_layer and module is None:
        return ""
    ours = _run(layer.after, layer.reads_after, args, seen, training)
    theirs, module = _reference(layer, module, args, seen, training)
    for found in (ours, theirs):
        _sum_over_ranks(found, layer)
    eps = _coarsest([*seen, *ours.outputs, *theirs.outputs, *(a for a in args if isinstance(a, Tensor))])
    if not any(from_all_ranks(layer.site.group, bool(_judged(ours, theirs, eps)))):
        return ""
    exact = _exact(layer, module, args, seen, training)
    judged = _judged(ours, theirs, (16 if eps < 1e-4 else 2) * eps) if exact is None else _judged(ours, theirs, eps, exact)
    if not judged:
        return ""
    whose = "the module's own forward" if module is not None else "the unmodified graph"
    changed = ""
    if module is not None:
        before, now = lifted_modules.get(module) or {}, state_of(module)
        names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
        told = ", ".join(f"{n}: {before.get(n, 'nothing')} -> {now.get(n, 'nothing')}" for n in names[:6])
        changed = f" Changed since prepare: {told}." if names else " No Python state that we follow has changed since prepare."
    return (
        f"the watch found that {layer.site.name} does not compute what {whose} computes with what this step gave it: {judged}.{changed} "
        "Call ultraep_compile.prepare(model, example_inputs) again after such a change; if nothing was changed, please report this with "
        "the output of `ultraep-compile dump`. The option watch=False switches the watch off."
    )


def _reference(
    layer: Layer, module: nn.Module | None, args: list[Any], seen: list[Tensor], training: bool
) -> tuple[_Found, nn.Module | None]:
    """What it should be, and the module whose own forward says so; where that does not run, on any rank, the graph's part does."""
    found = None
    if module is not None and not layer.own_fails:
        try:
            found = _own(layer, module, args, seen, training)
        except UltraEPError:
            raise
        except Exception as fault:  # the author's own code, in a twin
            log.info("the own forward of %s does not run beside a step: %s: %s", layer.site.name, type(fault).__name__, fault)
            layer.own_fails = True
        layer.own_fails = any(from_all_ranks(layer.site.group, layer.own_fails))
    if found is None or layer.own_fails:
        return _own(layer, None, args, seen, training), None
    return found, module


def _exact(layer: Layer, module: nn.Module | None, args: list[Any], seen: list[Tensor], training: bool) -> _Found | None:
    """The same in fp64, None where that does not run: a graph may have other dtypes written into it."""
    exact = None
    if module is not None or not layer.is_layer:
        try:
            exact = _own(layer, module, args, seen, training, torch.float64)
        except UltraEPError:
            raise
        except Exception:
            log.debug("%s does not run in fp64", layer.site.name)
    if not all(from_all_ranks(layer.site.group, exact is not None)):
        return None
    assert exact is not None
    _sum_over_ranks(exact, layer)
    return exact


def _run(region: Region, reads: list[int], args: list[Any], seen: list[Tensor], training: bool, dtype: torch.dtype | None = None) -> _Found:
    """A part of a graph."""
    given, leaves = _leaves(args, seen, training, dtype)
    with _aside(seen, training), contextlib.ExitStack() as stack:
        for context in region.autocasts if dtype is None else []:
            device, kind, enabled, cache = context
            stack.enter_context(torch.autocast(device, kind, enabled, cache))
        if dtype is not None:
            stack.enter_context(torch.autocast(seen[0].device.type, enabled=False))
        places = [*range(len(seen))], [leaves[i] for i in reads]
        outputs = list(region.module(*(given[i] for i in places[0]), *(_fresh(leaf) for leaf in places[1])))
        return _differentiated(outputs, given, leaves, training)


def _own(layer: Layer, module: nn.Module | None, args: list[Any], seen: list[Tensor], training: bool, dtype: torch.dtype | None = None) -> _Found:
    """The module's own forward on a twin of it; of a traced layer, the unmodified graph's part."""
    if module is None:
        return _run(layer.before, layer.reads_before, args, seen, training, dtype)
    given, leaves = _leaves(args, seen, training, dtype)
    lifted = lifted_layer(module)
    assert lifted is not None
    with _aside(seen, training), contextlib.ExitStack() as stack:
        for context in layer.before.autocasts if dtype is None else []:
            device, kind, enabled, cache = context
            stack.enter_context(torch.autocast(device, kind, enabled, cache))
        if dtype is not None:
            stack.enter_context(torch.autocast(seen[0].device.type, enabled=False))
        instead = {id(a): leaves[i] for i, a in enumerate(args) if isinstance(a, Tensor)}
        other = _twin(module, instead, dtype)
        positional, named = call_of(lifted.pattern, given)
        plain = _plain_class(module)
        result = plain.forward(other, *positional, **named)
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        return _differentiated(outputs, given, leaves, training)


def _leaves(args: list[Any], seen: list[Tensor], training: bool, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Any]]:
    """The step's tensors and the graph's arguments as leaves of a graph of their own."""

    def leaf(value: Any, learns: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        new = value.detach()
        if dtype is not None and new.is_floating_point():
            new = new.to(dtype)
        return new.requires_grad_(training and learns and new.is_floating_point())

    once: dict[int, Any] = {}  # one leaf for a parameter that several arguments are: its gradient is the sum
    for a in args:
        if id(a) not in once:
            once[id(a)] = leaf(a, isinstance(a, Tensor) and a.requires_grad)
    return [leaf(t.clone(), True) for t in seen], [once[id(a)] for a in args]


def _fresh(value: Any) -> Any:
    """Buffers are written to; parameters and what learns are not."""
    return value.clone() if isinstance(value, Tensor) and not value.requires_grad and not isinstance(value, DTensor) and value.numel() < 1 << 20 else value


@contextlib.contextmanager
def _aside(seen: Sequence[Tensor], training: bool) -> Iterator[None]:
    devices = sorted({t.device.index or 0 for t in seen if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(training), watch.paused(), NoDropout():
        torch.manual_seed(_SEED)
        yield


def _differentiated(outputs: list[Tensor], given: list[Tensor], leaves: list[Any], training: bool) -> _Found:
    found = _Found([_local(t).detach() for t in outputs])
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs if training else []):
        if output.requires_grad and output.numel():
            direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(index)).to(output.device)
            total = total + (_local(output).double() * direction.double()).sum().cpu()
    if not total.requires_grad:
        return found
    wanted = {str(i): t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad}
    wanted |= {f"-{i + 1}": t for i, t in enumerate(given) if t.requires_grad}
    made = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    found.gradients = {n: None if g is None else _local(g).detach() for n, g in zip(wanted, made, strict=True)}
    return found


def _sum_over_ranks(found: _Found, layer: Layer) -> None:
    """Of experts that every rank holds whole, a rank has its own experts' part of a gradient in one way and its own tokens' in the
    other: projections of both are summed.
    """
    if not layer.site.group or layer.site.sharded:
        return
    mine: dict[str, Tensor] = {}
    for name, gradient in found.gradients.items():
        if gradient is not None and int(name) in layer.weights:
            wide = gradient.double()
            if wide.dim() > 1:
                direction = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
                wide = wide @ direction.to(wide.device)
            mine[name] = wide.cpu()
    every = from_all_ranks(layer.site.group, mine)
    for name in {n: None for rank in every for n in rank}:
        found.gradients[name] = torch.stack([rank[name] for rank in every if name in rank]).sum(0)


# ---- the module -------------------------------------------------------------------------------------------------------


def _module_of(layer: Layer, args: list[Any]) -> nn.Module | None:
    """The lifted module whose parameters this call was given: graphs may be shared by several."""
    wanted = {id(args[i]) for i in layer.weights}
    held = lambda m: sum(id(p) in wanted for p in m.parameters())  # noqa: E731
    best = max(((held(m), m) for m in list(lifted_modules)), key=lambda pair: pair[0], default=(0, None))
    return best[1] if best[0] else None


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return vars(type(module)).get("_ultraep_plain", type(module))


def call_of(pattern: Pattern, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """The call that a pattern would make these tensors of."""
    left = iter(tensors)
    values: dict[str, Any] = {n: next(left) for n, (kind, _) in pattern.kinds.items() if kind == "tensor"}
    values |= {n: next(left).tolist() for n, (kind, _) in pattern.kinds.items() if kind == "sizes"}
    values |= {n: value for n, (kind, value) in pattern.kinds.items() if kind == "value"}
    positional: list[Any] = []
    for name in pattern.names:
        if name not in values:
            break
        positional.append(values.pop(name))
    more = sorted((n for n in values if n.isdigit()), key=int)
    positional += [values.pop(n) for n in more]
    return positional, values


def _twin(module: nn.Module, instead: dict[int, Any], dtype: torch.dtype | None) -> nn.Module:
    """A module with the same Python state, of the class that its author wrote, over other parameters and copies of its buffers.

    Lists, dicts and sets are copied, so that what the forward appends is lost; other objects are shared.
    """
    made: dict[int, nn.Module] = {}

    def tensor(value: Tensor | None, is_buffer: bool) -> Tensor | None:
        if value is None:
            return None
        new = instead.get(id(value))
        if new is None:
            new = value.detach()
            new = new.to(dtype) if dtype is not None and new.is_floating_point() else new
        return new.clone() if is_buffer else new

    def twin(old: nn.Module) -> nn.Module:
        if id(old) in made:
            return made[id(old)]
        kind = _plain_class(old)
        new = made[id(old)] = kind.__new__(kind)
        state = {n: _loose(v) for n, v in vars(old).items() if n != "_compiled_call_impl"}
        state["_parameters"] = {n: tensor(p, False) for n, p in old._parameters.items()}
        state["_buffers"] = {n: tensor(b, True) for n, b in old._buffers.items()}
        state["_modules"] = {n: None if m is None else twin(m) for n, m in old._modules.items()}
        new.__dict__.update(state)
        return new

    new = twin(module)
    division = division_of(module)
    if division is not None:
        for names in division.lists:
            whole = stack_experts(module, [_slot(new, n)[0][_slot(new, n)[1]] for n in names]).unbind()
            for name, value in zip(names, whole, strict=True):
                holder, last = _slot(new, name)
                holder[last] = value
        for name in division.stacks:
            holder, last = _slot(new, name)
            holder[last] = torch.ops.ultraep.unshard(holder[last].to_local(), holder[last].shape[0], division.ranks, division.group)
    return new


def _slot(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent)._parameters, name


def _loose(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


# ---- judgement --------------------------------------------------------------------------------------------------------


def _judged(ours: _Found, theirs: _Found, eps: float, exact: _Found | None = None) -> str:
    """The first difference beyond rounding, "" if there is none. With an exact result, only what is further from it than four times
    the module's own.
    """
    if len(ours.outputs) != len(theirs.outputs):
        return f"{len(ours.outputs)} tensors come out of one and {len(theirs.outputs)} of the other"
    for index, (mine, right) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        name = "" if len(ours.outputs) == 1 else f" of output {index}"
        if mine.shape != right.shape:
            return f"output {index} has shape {list(mine.shape)}, not {list(right.shape)}"
        if not right.is_floating_point():
            if not torch.equal(mine, right):
                return f"output {index} differs"
            continue
        wrong, worst = _rows_off(mine, right, exact.outputs[index] if exact else None, 4 * _allowed(eps))
        if wrong:
            tokens = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            own = f", where eager's own rounding is {_relative(right, exact.outputs[index]):.0e}" if exact else ""
            return f"tokens {tokens}{name} ({len(wrong)} looked at) are off by up to {worst:.1e} (relative{own})"
    norms = [float(g.double().norm()) for g in theirs.gradients.values() if g is not None and g.isfinite().all()]
    floor = 1e-3 * max(norms, default=0.0)
    for name in {**ours.gradients, **theirs.gradients}:
        mine, right = ours.gradients.get(name), theirs.gradients.get(name)
        if mine is None and right is None:
            continue
        mine = torch.zeros_like(right) if mine is None else mine  # type: ignore[arg-type]
        right = torch.zeros_like(mine) if right is None else right
        error = _relative(mine, right, floor)
        allowed = 64 * eps
        if exact is not None and exact.gradients.get(name) is not None:
            true = exact.gradients[name]
            assert true is not None
            error, allowed = _relative(mine, true, floor), 4 * _relative(right, true, floor) + 16 * eps
        if not error <= allowed:
            what = f"the gradient of input {name[1:]}" if name.startswith("-") else "the gradient of a parameter"
            return f"{what} is off by {error:.1e} (relative, allowed {allowed:.1e})"
    return ""


def _allowed(eps: float) -> float:
    return (64 if eps < 1e-4 else 4) * eps


def _rows_off(mine: Tensor, right: Tensor, exact: Tensor | None, allowed: float) -> tuple[list[int], float]:
    """Rows that differ by more than is allowed of their own size or the usual one, up to so many, and the largest difference."""
    width = mine.shape[-1] if mine.dim() > 1 else 1
    if not mine.numel():
        return [], 0.0
    a, b = (t.double().reshape(-1, width) for t in (mine, right))
    same = (a == b) | (a.isnan() & b.isnan())
    d = torch.where(same, 0.0, a - b)
    size = b.nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
    size = size.clamp_min(float(size.square().mean().sqrt().clamp_min(1e-30)))
    off = d.norm(dim=1) / size
    wrong = ~(off <= allowed)
    if exact is not None:
        e = exact.double().reshape(-1, width).to(a.device)
        wrong &= ~((a - e).norm(dim=1) <= 4 * (b - e).norm(dim=1) + allowed / 4 * size)
    places = wrong.nonzero().flatten()
    return places[:_SHOWN].tolist(), float(off[wrong].nan_to_num(float("inf")).max()) if len(places) else 0.0


def _relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    both = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    return float((a - b)[both].norm() / b[both].norm().clamp_min(max(floor, 1e-30)))


def _coarsest(tensors: list[Tensor]) -> float:
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    devices = {t.device.type for t in tensors}
    kinds |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    return max((torch.finfo(k).eps for k in kinds if torch.finfo(k).bits >= 16), default=0.0)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
