"""Lift the experts of one module: record, find the experts, write the new forward, prove it equal, put it in place."""

from __future__ import annotations

import contextlib
import copyreg
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ultraep_compile.ladder.groups import Siblings
from ultraep_compile.ladder.lifted import caller, reference_caller
from ultraep_compile.ladder.recording import Call, Recording, is_sizes, record
from ultraep_compile.ladder.regions import ALL, Parts, Region, code_of, ends_of, find_parts, region_to, row_count
from ultraep_compile.ladder.replay import Replay
from ultraep_compile.ladder.routing import Missed, Routing, Slots, Sources, Unbalanceable, judge, measure, sources
from ultraep_compile.ladder.rows import RowFunction, row_function
from ultraep_compile.passes.lift.called import LiftedExperts
from ultraep_compile.passes.lift.nodes import op_name
from ultraep_compile.passes.lift.values import Refusal

log = logging.getLogger(__name__)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_SEEDS = (1, 2, 3)


@dataclass(slots=True)
class LayerFacts:
    """What is known of a lifted (or refused) layer."""

    experts: int | None = None
    top_k: int | None = None
    gating: str | None = None
    parameters: tuple[str, ...] = ()
    """Per-expert parameters, as paths inside the module."""
    form: str = ""
    """How the experts were called: `one by one` or `together`."""
    counted: bool = False
    """Python counts the rows of each expert: numbers that a compiler must be told to keep in its graph."""
    source: str = ""


@dataclass(slots=True)
class LiftedLayer:
    """New forwards of one module, by training mode."""

    facts: LayerFacts
    functions: dict[bool, Callable]
    pattern: tuple
    sources: dict[bool, str]


class NoDropout(TorchFunctionMode):
    """Dropout as in eval: random draws in another order are no difference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


# ---- probe batches --------------------------------------------------------------------------------------------------


def main_input(call: Call) -> Tensor:
    """The token states: the first float tensor of at least two dims."""
    for tensor in call.tensors():
        if tensor.is_floating_point() and tensor.dim() >= 2:
            return tensor
    raise Refusal("its forward takes no tensor of token states")


def resized(call: Call, lead: tuple[int, ...], seed: int, *, skewed: bool = False) -> Call:
    """The call with other numbers of tokens: rows drawn from its own, token states random."""
    states = main_input(call)
    old = tuple(states.shape[:-1])
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randint(0, n, (m,), generator=generator) for n, m in zip(old, lead, strict=True)]
    flat = picks[0]
    for size, pick in zip(old[1:], picks[1:], strict=True):
        flat = (flat[:, None] * size + pick).flatten()
    made = []
    for tensor in call.tensors():
        if tensor is states:
            scale = float(states.float().std()) or 1.0
            noise = torch.randn(*lead, states.shape[-1], generator=generator)
            if skewed:
                noise = noise * 0.05 + torch.randn(states.shape[-1], generator=generator)
            new = (noise * scale).to(states.device, states.dtype)
        elif tensor.shape[: len(old)] == old:
            new = tensor.detach()
            for dim, pick in enumerate(picks):
                new = new.index_select(dim, pick.to(tensor.device))
        elif tensor.dim() and tensor.shape[0] == len_of(old):
            new = tensor.detach().index_select(0, flat.to(tensor.device))
        else:
            new = tensor.detach()
        made.append(new.clone())
    sizes = [_shares(len_of(lead), len(s), generator) if sum(s) == len_of(old) else s for s in call.sizes()]
    return call.with_tensors(made).with_sizes(sizes)


def _shares(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Random sizes of `parts` groups."""
    return torch.bincount(torch.randint(0, parts, (total,), generator=generator), minlength=parts).tolist()


def len_of(lead: tuple[int, ...]) -> int:
    total = 1
    for n in lead:
        total *= n
    return total


def probe_leads(call: Call, experts: int) -> list[tuple[int, ...]]:
    """Two sizes to record and two more to check, with enough tokens for every expert to get some."""
    rank = main_input(call).dim() - 1
    if rank == 1:
        return [(13 * experts,), (11 * experts,), (5 * experts,)]
    rest = (1,) * (rank - 2)
    return [(experts, *rest, 13), (2 * experts, *rest, 11), (experts, *rest, 7)]


# ---- lifting --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Analysis:
    parts: Parts
    routing: Routing
    slots: Slots
    rows: RowFunction
    scaled: bool
    weights: Tensor


def lift_layer(owner: nn.Module, name: str, call: Call, group: Siblings | None) -> LiftedLayer:
    """New forwards for a module that contains experts.

    Args:
        call: one real call of the module.
        group: the sibling modules that are its experts, with paths inside the module; None where parameters hold them.
    Raises: Refusal with the reason, Unbalanceable where the loads are equal by construction.
    """
    if "forward" in vars(owner):
        raise Refusal("its forward was replaced on the instance")
    functions, texts, facts = {}, {}, None
    for training in dict.fromkeys((owner.training, not owner.training)):
        with _mode(owner, training):
            function, text, here = _lift(owner, name, call, group)
        functions[training], texts[training] = function, text
        facts = facts or here
    assert facts is not None
    return LiftedLayer(facts, functions, pattern_of(call), texts)


def _lift(owner: nn.Module, name: str, call: Call, group: Siblings | None) -> tuple[Callable, str, LayerFacts]:
    owned = group.parameters() if group else {}
    count = len(group.names) if group else 0
    leads = probe_leads(call, count or _leading(owner))
    problem: Refusal | None = None
    for leaves in (_leaves(owner, owned, group), {}):
        try:
            return _attempt(owner, name, call, owned, count, leads, leaves)
        except Unbalanceable:
            raise
        except Refusal as reason:
            if problem is None or isinstance(reason, Missed):
                problem = reason
            if not leaves:
                break
    assert problem is not None
    raise problem


def _attempt(owner, name, call, owned, count, leads, leaves) -> tuple[Callable, str, LayerFacts]:  # noqa: ANN001
    first, second = (record(owner, resized(call, lead, seed), leaves) for seed, lead in enumerate(leads[:2]))
    if any(" over " in c for c in first.collectives):
        raise Unbalanceable(
            f"it is expert-parallel already: its forward exchanges rows by {first.collectives[0]}. Build it over one rank, or leave "
            "the balance to its own dispatcher"
        )
    parts = find_parts(first, owned, count)
    tokens = len_of(leads[0])
    found = _analyse(first, parts, tokens)
    problem = Missed("no recorded tensor holds the experts' ids or weights for each token")
    for way in sources(first, parts, found.routing, parts.experts, found.weights):
        try:
            return _written(owner, name, call, first, second, found, way, leads)
        except Refusal as reason:
            problem = Missed(str(reason))
    raise problem


def _analyse(recording: Recording, parts: Parts, tokens: int) -> _Analysis:
    """Regions, the cut where the experts' output stands, slots, tokens and factors."""
    present = sorted(parts.present)
    if not present or (ALL not in present and len(present) < 2):
        raise Refusal(f"{len(present)} experts ran on the probe batch, expected several")
    ends = {e: ends_of(recording, parts, e) for e in present}
    problem = Refusal("its experts' computations end in no common tensor")
    for position in range(min(map(len, ends.values()))):
        try:
            return _cut_at(recording, parts, tokens, {e: ends[e][position] for e in present})
        except Unbalanceable:
            raise
        except Refusal as reason:
            if position == 0 or (isinstance(reason, Missed) and not isinstance(problem, Missed)):
                problem = reason
    raise problem


def _cut_at(recording: Recording, parts: Parts, tokens: int, ends: dict[int, Any]) -> _Analysis:
    regions = {e: region_to(recording, parts, e, end) for e, end in ends.items()}
    codes = {e: code_of(recording, parts, r, row_count(recording.raw[r.end])) for e, r in regions.items()}
    if len(set(codes.values())) > 1:
        first, other = list(codes)[0], next(e for e in codes if codes[e] != codes[list(codes)[0]])
        raise Refusal(f"experts {first} and {other} do not compute the same with their weights")
    plain = {e: row_function(recording, parts, r, scaled=False) for e, r in regions.items()}
    slots = _slots(recording, parts, regions, plain)
    try:
        routing = measure(recording, parts, tokens, slots, parts.experts)
    except Unbalanceable:
        raise
    except Refusal as reason:
        raise reason if slots.fixed else Missed(str(reason)) from reason  # uneven numbers of rows: they are routed
    judge(routing)
    before, after, sent = routing.before, routing.after, routing.sent
    weighs_before = bool(((before[sent] - 1).abs() > 1e-4).any())
    weighs_after = bool(((after[sent] - 1).abs() > 1e-4).any())
    rows = next(iter(plain.values()))
    if weighs_before + weighs_after + (rows.weight is not None) > 1:
        raise Refusal("rows are weighted twice, before and after the experts")
    if weighs_before:
        rows = row_function(recording, parts, next(iter(regions.values())), scaled=True)
        return _Analysis(parts, routing, slots, rows, True, before)
    if rows.weight is not None:
        inner = torch.zeros_like(before)
        assert slots.inner is not None
        owner = _owners(routing, slots)
        inner[owner[owner >= 0], slots.expert[owner >= 0]] = slots.inner.double().flatten()[owner >= 0]
        return _Analysis(parts, routing, slots, rows, True, inner)
    return _Analysis(parts, routing, slots, rows, False, after)


def _owners(routing: Routing, slots: Slots) -> Tensor:
    raise Refusal("weights read inside the experts are not followed yet")


def _slots(
    recording: Recording, parts: Parts, regions: dict[int, Region], functions: dict[int, RowFunction]
) -> Slots:
    inputs, outputs, experts, counts = [], [], [], set()
    for expert, region in regions.items():
        x, y = recording.values[functions[expert].rows], recording.values[region.end]
        n = row_count(y)
        if expert == ALL:
            axis = [d for d in range(x.dim() - 1) if x.shape[d] == parts.experts]
            if not axis:
                raise Refusal(f"the experts' input {list(x.shape)} has no dim of {parts.experts} experts")
            shape = [1] * (x.dim() - 1)
            shape[axis[0]] = parts.experts
            number = torch.arange(parts.experts).view(shape).expand(x.shape[:-1]).reshape(-1)
        else:
            number = torch.full((n,), expert)
        counts.add(n)
        inputs.append(x.reshape(n, -1))
        outputs.append(y.reshape(n, -1))
        experts.append(number)
    fixed = ALL in regions or (len(counts) == 1 and len(regions) == parts.experts)
    mixed = _mixes_tokens(recording, recording.raw[next(iter(functions.values())).rows])
    return Slots(torch.cat(inputs), torch.cat(outputs), torch.cat(experts), None, fixed, mixed)


def _mixes_tokens(recording: Recording, rows: Tensor) -> bool:
    """Does one row of the experts' input depend on several tokens, however they were routed?"""
    states = next((recording.raw[n] for n in recording.inputs if recording.raw[n].is_floating_point()), None)
    if states is None or not rows.requires_grad or not states.requires_grad:
        return False
    row = rows.reshape(row_count(rows), -1)[0]
    direction = torch.randn(row.shape, generator=torch.Generator().manual_seed(0)).to(row)
    (grad,) = torch.autograd.grad((row * direction).sum(), states, allow_unused=True, retain_graph=True)
    return grad is not None and int((grad.reshape(row_count(grad), -1) != 0).any(1).sum()) > 1


def _written(owner, name, call, first, second, found: _Analysis, way: Sources, leads) -> tuple[Callable, str, LayerFacts]:  # noqa: ANN001
    form = "together" if ALL in found.parts.present else "one by one"
    source = next((n.meta["source"] for n in first.graph.nodes if found.parts.label[n] and n.meta.get("source")), "")
    gating = gating_of(owner, call, leads[2])
    place = ".".join(p for p in (name, _common_path(found)) if p)
    lifted = LiftedExperts(found.rows.module, found.parts.experts, found.scaled, source, gating, place)
    reference = Replay(first, second, found.parts, found.routing, way, found.rows, found.scaled, reference_caller(lifted))
    check(owner, reference.function(), call, leads)
    params = [_stacked_like(owner, found, role) for role in found.rows.roles]
    consts = [first.raw[c].detach() for c in found.rows.consts]
    weight = first.raw[way.weight] if found.scaled and way.weight is not None else None
    run = caller(name or "model", lifted, first.raw[found.routing.table].flatten(0, -2), weight, params, consts)
    replay = Replay(first, second, found.parts, found.routing, way, found.rows, found.scaled, run)
    function = replay.function()
    holders = tuple(n for role in found.rows.roles for n in found.parts.holders[role])
    return function, replay.source, LayerFacts(found.parts.experts, way.choices, None, holders, form, way.ids_form == "sizes", source)


def _common_path(found: _Analysis) -> str:
    """The innermost module that holds all experts."""
    paths = [n.split(".")[:-1] for role in found.rows.roles for n in found.parts.holders[role]]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def gating_of(owner: nn.Module, call: Call, lead: tuple[int, ...]) -> str:
    """The form of the gating, by the ops before the experts. Evidence for the report, never a condition."""
    names = []
    for node in record(owner, resized(call, lead, 0), {}).graph.nodes:
        if node.op.startswith("call"):
            names.append(op_name(node))
    chosen = [i for i, n in enumerate(names) if n in ("topk", "argmax", "max", "sort", "argsort")]
    if not chosen:
        return "unknown"
    if "cumsum" in names and ("one_hot" in names or any(n.startswith("scatter") for n in names)):
        return "capacity"
    if "topk" not in names:
        return "argmax"
    before, after = names[: chosen[0]], names[chosen[0] :]
    for squash in ("sigmoid", "softmax"):
        if squash in before:
            return f"{squash}-topk"
    return next((f"topk-{s}" for s in ("softmax", "sigmoid") if s in after), "topk")


def _stacked_like(owner: nn.Module, found: _Analysis, role: str) -> Tensor:
    parameter = owner.get_parameter(found.parts.holders[role][0])
    shape = (found.parts.experts, *found.rows.layouts[role])
    return torch.empty(shape, dtype=parameter.dtype, device="meta")


# ---- the proof ------------------------------------------------------------------------------------------------------


def recheck(owner: nn.Module, layer: LiftedLayer, call: Call) -> None:
    """The check of `lift_layer` for another module of the same make."""
    assert layer.facts.experts is not None
    for training, function in layer.functions.items():
        with _mode(owner, training):
            check(owner, function, call, probe_leads(call, layer.facts.experts), seeds=_SEEDS[:1])


def check(
    owner: nn.Module, function: Callable, call: Call, leads: list[tuple[int, ...]], seeds: tuple[int, ...] = _SEEDS
) -> None:
    """Outputs and gradients of the new forward against the module's own, on batches of several sizes and routings.

    Raises: Refusal that says what differs.
    """
    owner_call = lambda *a, **k: type(owner).forward(owner, *a, **k)  # noqa: E731
    for seed in seeds:
        for lead, skewed in ((leads[seed % len(leads)], False), (leads[-1], True)):
            batch = resized(call, lead, 100 + seed, skewed=skewed)
            old = _step(owner, owner_call, batch, seed)
            try:
                new = _step(owner, lambda *a, **k: function(owner, *Call(a, k).inputs()), batch, seed)
            except Exception as error:
                raise Refusal(f"the replayed forward fails on another batch: {type(error).__name__} {error}") from error
            _compare(old, new)


def _step(owner: nn.Module, run: Callable, batch: Call, seed: int) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in batch.tensors()]
    fresh = batch.with_tensors([t.clone() if t.is_floating_point() else t for t in leaves])
    kept = [(b, b.detach().clone()) for b in owner.buffers()]
    devices = sorted({p.device.index or 0 for p in owner.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), NoDropout(), torch.enable_grad():
        torch.manual_seed(seed)
        result = run(*fresh.args, **fresh.kwargs)
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        results |= {f"buffer {i}": b.detach().clone() for i, (b, _) in enumerate(kept)}
        total = sum((_weighted(t, i) for i, t in enumerate(outputs) if t.requires_grad), start=torch.zeros(()))
        named = [(n, p) for n, p in owner.named_parameters() if p.requires_grad]
        wanted = [*(t for t in leaves if t.requires_grad), *(p for _, p in named)]
        names = [*(f"input {i}" for i, t in enumerate(leaves) if t.requires_grad), *(n for n, _ in named)]
        grads = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    return results | {
        f"gradient of {n}": torch.zeros_like(w) if g is None else g for n, w, g in zip(names, wanted, grads, strict=True)
    }


def _weighted(tensor: Tensor, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    direction = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (tensor.float() * direction).sum().cpu()


def _compare(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    if old.keys() != new.keys():
        raise Refusal("the replayed forward returns other tensors than the module's own")
    scale = max((float(t.double().norm()) for n, t in old.items() if n.startswith("gradient")), default=0.0)
    for name, was in old.items():
        now = new[name]
        if was.shape != now.shape or was.dtype != now.dtype:
            raise Refusal(f"{name} of the replayed forward is {now.dtype} {list(now.shape)}, not {was.dtype} {list(was.shape)}")
        if not was.is_floating_point():
            if not torch.equal(was, now):
                raise Refusal(f"{name} of the replayed forward differs")
            continue
        error = float((was.double() - now.double()).norm())
        size = float(was.double().norm())
        floor = 1e-7 * scale if name.startswith("gradient") else 0.0
        if not error <= _TOLERANCE.get(was.dtype, 1e-4) * size + floor + 1e-12:
            raise Refusal(f"{name} of the replayed forward differs by {error / max(size, 1e-30):.1e} (relative)")


# ---- helpers --------------------------------------------------------------------------------------------------------


def _leading(owner: nn.Module) -> int:
    sizes = [p.shape[0] for p in owner.parameters() if p.dim() >= 3]
    return max(set(sizes), key=sizes.count) if sizes else 8


def _leaves(owner: nn.Module, owned: dict[str, Any], group: Siblings | None) -> dict[nn.Module, str]:
    """Outermost modules inside that hold no expert: routers, shared experts, norms."""
    inside = set(owned)
    found: dict[nn.Module, str] = {}
    for path, module in owner.named_modules():
        if not path or any(path.startswith(f"{other}.") for other in found.values()):
            continue
        own = {f"{path}.{n}" for n, _ in module.named_parameters()}
        if not own:
            continue  # activations, dropout: cheap to look into, and experts have them
        holds = bool(own & inside) if inside else any(p.dim() >= 3 or _is_flat(module) for p in module.parameters())
        container = type(module) in (nn.ModuleList, nn.ModuleDict)
        if not holds and not container and not any(m in found for m in module.modules()):
            found[module] = path
    return found


def _is_flat(module: nn.Module) -> bool:
    return any(
        not type(m).__module__.startswith("torch.nn.") and len([p for p in m.parameters(recurse=False) if p.dim() >= 2]) >= 2
        for m in module.modules()
    )


@contextlib.contextmanager
def _mode(owner: nn.Module, training: bool) -> Iterator[None]:
    before = {m: m.training for m in owner.modules()}
    owner.train(training)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def pattern_of(call: Call) -> tuple:
    """What must be equal for another call to take the same way: its structure and everything that is no tensor."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor", value.dim()
        return ("sizes", len(value)) if is_sizes(value) else ("value", value)

    return tuple(map(part, call.args)), tuple((k, part(v)) for k, v in call.kwargs.items())


# ---- in place -------------------------------------------------------------------------------------------------------

_LAYER = "_ultraep_lifted_layer"


def install(owner: nn.Module, layer: LiftedLayer) -> None:
    """Give a module a class of its own whose forward, under a compiler, is the lifted one. Nothing else changes."""
    base = type(owner)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _fits(layer.pattern, args, kwargs):
            given = (*args, *kwargs.values())
            tensors = [a for a in given if isinstance(a, Tensor)]
            tensors += [torch.tensor(a, device=tensors[0].device) for a in given if is_sizes(a)]
            return layer.functions[self.training](self, *tensors)
        return base.forward(self, *args, **kwargs)

    _swap_class(owner, {"forward": forward, _LAYER: layer})


def keep_counts(owner: nn.Module) -> None:
    """Let a compiler keep numbers that Python reads from tensors inside this module (`tolist`) in its graph."""
    base = type(owner)
    if hasattr(base, _COUNTS):
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
                return base.forward(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    _swap_class(owner, {"forward": forward, _COUNTS: True})


_COUNTS = "_ultraep_keeps_counts"


def _swap_class(owner: nn.Module, members: dict[str, Any]) -> None:
    """Another class for one module; pickles and copies of it are of the unmodified class."""
    base = type(owner)
    plain = next(c for c in base.__mro__ if "_ultraep_plain" not in vars(c))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return copyreg.__newobj__, (plain,), self.__getstate__()

    members = {**members, "__reduce_ex__": reduce, "__module__": base.__module__, "_ultraep_plain": plain}
    owner.__class__ = type(base.__name__, (base,), members)


def lifted_layer(module: nn.Module) -> LiftedLayer | None:
    return getattr(type(module), _LAYER, None)


def _fits(pattern: tuple, args: tuple, kwargs: dict[str, Any]) -> bool:
    positional, named = pattern
    if len(args) != len(positional) or len(kwargs) != len(named):
        return False
    for value, (kind, wanted) in zip(args, positional, strict=True):
        if not _same(value, kind, wanted):
            return False
    return all(key in kwargs and _same(kwargs[key], kind, wanted) for key, (kind, wanted) in named)


def _same(value: Any, kind: str, wanted: Any) -> bool:
    if isinstance(value, Tensor):
        return kind == "tensor" and value.dim() == wanted
    if kind == "sizes":
        return is_sizes(value) and len(value) == wanted
    return kind == "value" and value == wanted
