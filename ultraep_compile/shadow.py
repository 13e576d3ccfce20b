"""The option `verify`: the unmodified graph beside the rewritten one, layer by layer, for the first calls.

Each of these calls runs three times: compiled, as it will; and both graphs node by node, the unmodified and the rewritten, to
compare every layer's output and to check every plan, bodies of activation checkpoints included. In training both are also
differentiated, by the same random direction. The first layer that differs is named, with the tokens that do and the copies that
these went to, and everything measured goes into a file to attach to a report.

Over processes all ranks verify the same calls and all raise what one of them finds. Gradients of experts that every rank holds
whole are compared summed over the ranks: a rank computes its own experts' part of them where the unmodified graph computes its own
tokens'.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from ultraep_compile.errors import VerificationError
from ultraep_compile.exchange import line_named
from ultraep_compile.ops import watch
from ultraep_compile.ops.alike import from_all_ranks
from ultraep_compile.passes.lift.nodes import input_name, upstream
from ultraep_compile.passes.lift.rewrite import where_now
from ultraep_compile.passes.pipeline import Rewrite, bodies_run_by
from ultraep_compile.planner.checks import broken_promises
from ultraep_compile.planner.plan import Plan
from ultraep_compile.shadow_tokens import differing_tokens

log = logging.getLogger(__name__)
REPORT = "ultraep-verify.json"
_ROUNDING = 64
"""Rounding errors of the result's dtype that are no difference."""
_ROUNDING_COARSE = 8
"""The same for the output of a layer in bf16 or fp16, where 64 would be half of it. What a layer is given is the same in both
graphs, to the bit, so that its own rounding is all there is."""


Place = tuple[str, str]
"""A node: the way to its graph from the whole one ("" for that itself), and its name there."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One rewritten layer: where its output, counts and plan are."""

    layer: str
    before: Place
    """Node of the unmodified graph that holds the layer's output."""
    after: Place
    """The same in the rewritten graph."""
    counts: Place
    plan: Place
    physical: Place
    """Where every pair of a token and a choice went."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What one graph did with a call's arguments."""

    results: Sequence[Any]
    seen: dict[Place, Any]
    gradients: list[Tensor | None]
    """By argument."""
    arguments: list[Any]
    """Copies of the arguments, with what the graph wrote to them."""
    draws: bool
    """Did it draw random numbers?"""
    eps: float
    """Of the least precise dtype that came up."""


class Shadow:
    """Both graphs of one compilation, ready to run beside the compiled one."""

    def __init__(self, original: fx.GraphModule, rewritten: fx.GraphModule, watched: list[Watched], rewrite: Rewrite) -> None:
        self.original, self.rewritten, self.watched = original, rewritten, watched
        self.layers = [s.name for s in rewrite.prepared.values()]
        self.group, self.sharded = rewrite.group, all(s.sharded for s in rewrite.prepared.values())
        self.inputs: list[str] = []
        self.expert_inputs: set[int] = set()
        """Arguments that experts' weights are made of."""
        self.options, self.left = rewrite.options, rewrite.options.verify
        self.compiled: Callable[..., Any] = rewritten.forward

    @classmethod
    def of(cls, original: fx.GraphModule, gm: fx.GraphModule, rewrite: Rewrite) -> Shadow:
        """Before the inner backend changes `gm`."""
        watched = []
        ways = {id(body): way for way, body in _bodies(gm)}
        for site, owner, (key, made) in zip(rewrite.sites, rewrite.owners, rewrite.prepared.items(), strict=True):
            plan = next(n for n in owner.graph.nodes if n.target is torch.ops.ultraep.plan.default and n.args[3] == key)
            dealt = next(n for n in owner.graph.nodes if n.target is torch.ops.ultraep.reroute.default and n.args[5] == key)
            nodes = (site.output, where_now(owner, site.output), plan.args[0], plan, dealt)
            watched.append(Watched(made.name, *((ways[id(owner)], n.name) for n in nodes)))
        shadow = cls(original, copied(gm), watched, rewrite)
        places = gm.graph.find_nodes(op="placeholder")
        shadow.inputs = [input_name(n) for n in places]
        for site, owner in zip(rewrite.sites, rewrite.owners, strict=True):
            made_of = {n for p in site.params for n in _inputs_of(gm, owner, p)}
            shadow.expert_inputs |= {i for i, n in enumerate(places) if n in made_of}
        return shadow

    def beside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled = compiled
        return self

    def __call__(self, *args: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.compiled(*args)
        # A rank may have compiled anew, and verifies that: the others go with it, or it would wait for them.
        if not any(from_all_ranks(self.group, self.left > 0)):
            return self.compiled(*args)
        self.left -= 1
        theirs = _run(self.original, args, {w.before for w in self.watched})
        wanted = {p for w in self.watched for p in (w.after, w.counts, w.plan, w.physical)}
        ours = _run(self.rewritten, args, wanted, {w.after: theirs.seen[w.before] for w in self.watched})
        written = [isinstance(a, Tensor) and _changed(a, c) for a, c in zip(args, theirs.arguments, strict=True)]
        got = self.compiled(*args)
        eps = theirs.eps
        outputs = ours.results if theirs.draws and _draws_by_itself(self.options.inner) else got
        self._judge(
            self._layers(ours.seen, theirs.seen, eps),
            self._outputs(outputs, theirs.results, eps),
            self._buffers(args if outputs is got else ours.arguments, theirs.arguments, written, eps),
            self._gradients(ours.gradients, theirs.gradients, eps),
        )
        return got

    def _layers(self, ours: dict[Place, Any], theirs: dict[Place, Any], eps: float) -> list[dict[str, Any]]:
        layers = []
        for each in self.watched:
            slots, shares = ours[each.plan]
            broken = broken_promises(ours[each.counts], Plan(slots, shares), self.options.planner != "none")
            after, before = ours[each.after], theirs[each.before]
            found = {"layer": each.layer, **self._compared(after, before, eps), "plan": broken}
            if max(eps, torch.finfo(before.dtype).eps) > 1e-4:
                found["allowed"] = _ROUNDING_COARSE * max(eps, torch.finfo(before.dtype).eps)
            if found["difference"] > found["allowed"]:
                found["tokens"] = differing_tokens(after, before, found["allowed"], ours[each.physical], slots, ours[each.counts])
            layers.append(found)
        return layers

    def _outputs(self, got: Sequence[Any], expected: Sequence[Any], eps: float) -> list[dict[str, Any]]:
        return [
            {"output": index, **self._compared(mine, right, eps)}
            for index, (mine, right) in enumerate(zip(got, expected, strict=True))
            if isinstance(mine, Tensor) and mine.is_floating_point() and mine.numel()
        ]

    def _buffers(self, got: Sequence[Any], expected: Sequence[Any], written: Sequence[bool], eps: float) -> list[dict[str, Any]]:
        """What the graph writes to its arguments."""
        return [
            {"buffer": name, **self._compared(mine, right, eps)}
            for name, mine, right, changed in zip(self.inputs, got, expected, written, strict=False)
            if changed
        ]

    def _gradients(self, made: list[Tensor | None], right: list[Tensor | None], eps: float) -> list[dict[str, Any]]:
        """Small gradients are judged beside large ones: where all terms cancel, what is left is rounding."""
        summed = self.expert_inputs if self.group and not self.sharded else set()
        pairs = []
        for index, (name, mine, theirs) in enumerate(zip(self.inputs, made, right, strict=False)):
            if mine is not None and theirs is not None:
                mine, theirs = _local(mine), _local(theirs)
                if index in summed:
                    mine, theirs = self._over_ranks(mine), self._over_ranks(theirs)
                pairs.append((name, mine, theirs))
        floor = 1e-3 * max((float(t.double().norm()) for _, _, t in pairs if t.isfinite().all()), default=0.0)
        return [{"gradient": name, **self._compared(mine, theirs, eps, floor)} for name, mine, theirs in pairs]

    def _over_ranks(self, gradient: Tensor) -> Tensor:
        total = gradient.double()
        line_named(self.group).all_reduce(total, "gradients to verify")
        return total

    def _judge(self, *measured: list[dict[str, Any]]) -> None:
        layers, outputs, buffers, gradients = measured
        everything = [*layers, *outputs, *buffers, *gradients]
        wrong = [x for x in everything if x["difference"] > x["allowed"] or x.get("plan")]
        text = self._told(wrong, dict(layers=layers, outputs=outputs, buffers=buffers, gradients=gradients)) if wrong else ""
        every = from_all_ranks(self.group, text)
        rank, first = next(((r, t) for r, t in enumerate(every) if t), (0, ""))
        if first:
            raise VerificationError(f"on rank {rank}, {first}" if len(every) > 1 else first)
        worst = max((x["difference"] for x in everything), default=0.0)
        counts = f"{len(layers)} layers, {len(outputs)} outputs, {len(buffers)} buffers, {len(gradients)} gradients"
        log.info("verified: %s, largest difference %.1e", counts, worst)

    def _told(self, wrong: list[dict[str, Any]], found: dict[str, Any]) -> str:
        written = _write({"options": self._settings(), **found, **_versions()})
        first = wrong[0]
        kind = next(k for k in ("layer", "output", "buffer", "gradient") if k in first)
        what = f"{'the gradient of ' if kind == 'gradient' else kind + ' '}{first[kind]}"
        plan = f"; its plan is illegal: {'; '.join(first['plan'])}" if first.get("plan") else ""
        tokens = f"; {first['tokens']['text']}" if "tokens" in first else ""
        return (
            f"{what} of the rewritten graph differs from the unmodified graph by {first['difference']:.2e} (relative, allowed "
            f"{first['allowed']:.2e}), the first of {len(wrong)} differences{plan}{tokens}; rewritten layers: "
            f"{', '.join(self.layers[:4])}. Please report this with {written} and the output of `ultraep-compile dump`."
        )

    def _compared(self, ours: Tensor, theirs: Tensor, eps: float, floor: float = 1e-30) -> dict[str, float]:
        """Relative L2 difference, and what is allowed: rounding grows with the layers that came before. What is not finite must
        be so in the same places; integers must be equal.
        """
        ours, theirs = _local(ours).detach(), _local(theirs).detach()
        if not theirs.is_floating_point():
            return {"difference": float(not torch.equal(ours, theirs)), "allowed": 0.0}
        allowed = _ROUNDING * max(eps, torch.finfo(theirs.dtype).eps) * max(1, len(self.layers)) ** 0.5
        ours, theirs = ours.double(), theirs.double()
        finite = theirs.isfinite()
        if not torch.equal(finite, ours.isfinite()):
            return {"difference": 1.0, "allowed": min(allowed, 0.5)}
        ours, theirs = ours[finite], theirs[finite]
        difference = float((ours - theirs).norm() / theirs.norm().clamp_min(max(floor, 1e-30)))
        return {"difference": difference, "allowed": allowed}

    def _settings(self) -> dict[str, str]:
        return {f.name: str(getattr(self.options, f.name)) for f in dataclasses.fields(self.options)}


# ---- graphs ---------------------------------------------------------------------------------------------------------


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph that passes may not change, nor in the bodies that it calls: they are copied with it. Tensors are shared."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for name, body in gm.named_children():
        if isinstance(body, fx.GraphModule) and hasattr(new, name):
            setattr(new, name, copied(body))
    return new


def _bodies(gm: fx.GraphModule, way: str = "") -> list[tuple[str, fx.GraphModule]]:
    """A graph and the bodies that it runs as they are, each with the way to it."""
    found = [(way, gm)]
    for node in gm.graph.nodes:
        for body in bodies_run_by(gm, node):
            found += _bodies(body, f"{way}.{node.name}")
    return found


def _inputs_of(gm: fx.GraphModule, owner: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """Inputs of the whole graph that a node of it, or of one of its bodies, is computed from."""
    places = [n for n in upstream(node) if n.op == "placeholder"]
    if owner is gm:
        return set(places)
    found: set[fx.Node] = set()
    for _, parent in _bodies(gm):
        for call in parent.graph.nodes:
            if owner in bodies_run_by(parent, call):
                given = dict(zip(owner.graph.find_nodes(op="placeholder"), _handed(owner, call), strict=True))
                found |= {i for p in places if isinstance(given[p], fx.Node) for i in _inputs_of(gm, parent, given[p])}  # pyright: ignore
    return found


def _handed(body: fx.GraphModule, call: fx.Node) -> Sequence[Any]:
    """What a call of a body hands to its inputs."""
    return call.args[len(call.args) - len(body.graph.find_nodes(op="placeholder")) :]


class _Watching(fx.Interpreter):
    """Runs a graph, and bodies that it calls as a part of it: what a checkpoint computes is the same without one."""

    def __init__(self, gm: fx.GraphModule, wanted: set[Place], instead: Mapping[Place, Tensor], way: str = "") -> None:
        super().__init__(gm)
        self.extra_traceback = False  # an error of ours says where it comes from
        self.wanted, self.instead, self.way, self.seen = wanted, instead, way, {}
        self.eps = 0.0

    def run_node(self, n: fx.Node) -> Any:
        bodies = bodies_run_by(self.module, n)  # pyright: ignore[reportArgumentType]
        if len(bodies) == 1:
            inner = _Watching(bodies[0], self.wanted, self.instead, f"{self.way}.{n.name}")
            given, _ = self.fetch_args_kwargs_from_env(n)
            result = inner.run(*given[len(given) - len(bodies[0].graph.find_nodes(op="placeholder")) :])
            self.seen |= inner.seen
            self.eps = max(self.eps, inner.eps)
        else:
            result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        if (self.way, n.name) in self.wanted:
            copied = lambda t: t.detach().clone() if isinstance(t, Tensor) else t  # noqa: E731
            self.seen[self.way, n.name] = tuple(map(copied, result)) if isinstance(result, (tuple, list)) else copied(result)
        if (self.way, n.name) in self.instead:
            result = _Instead.apply(result, self.instead[self.way, n.name])
        return result


class _Instead(torch.autograd.Function):
    """Another layer's output in the place of one, which gets the gradient: later layers are then given the same bits in both
    graphs, and no rounding of an earlier one sends a token to another expert.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, other: Tensor) -> Tensor:
        return other.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _run(gm: fx.GraphModule, args: tuple[Any, ...], wanted: set[Place], instead: Mapping[Place, Tensor] | None = None) -> _Run:
    """A graph on copies of a call's arguments, differentiated in training; random state and recordings stay as they were.

    Args:
        wanted: nodes whose values are noted.
        instead: values for nodes that readers see, once their own are noted.
    """
    copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    learns = [isinstance(a, Tensor) and a.requires_grad for a in args]
    training = torch.is_grad_enabled() and any(learns)
    leaves = [c.requires_grad_(training and grad) if isinstance(c, Tensor) else c for c, grad in zip(copies, learns, strict=True)]
    given = [c.view_as(c) if grad else c for c, grad in zip(leaves, learns, strict=True)]  # a graph may write to them
    devices = sorted({a.device.index or 0 for a in args if isinstance(a, Tensor) and a.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(training), watch.paused():
        before = _random_state(devices)
        watching = _Watching(gm, wanted, instead or {})
        results = watching.run(*given)
        draws = not all(map(torch.equal, before, _random_state(devices)))
        gradients = _gradients(results, leaves, learns) if training else []
    return _Run(results, watching.seen, gradients, leaves, draws, watching.eps)


def _random_state(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def _draws_by_itself(inner: str) -> bool:
    """Does the inner backend draw other random numbers than eager does?"""
    if inner != "inductor":
        return False
    from torch._inductor import config

    return not config.fallback_random


def _changed(before: Tensor, after: Tensor) -> bool:
    """Bit by bit, so that NaN is no change."""
    return not torch.equal(_bits(before), _bits(after))


def _bits(tensor: Tensor) -> Tensor:
    plain = _local(tensor).detach().contiguous()
    return plain if plain.is_complex() or plain.dim() == 0 else plain.view(torch.uint8)


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that is divided over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradients(results: Any, leaves: list[Any], learns: list[bool]) -> list[Tensor | None]:
    """Of all results together, each weighed by random numbers that are the same for both graphs."""
    total = torch.zeros(())
    for index, result in enumerate(results):
        if isinstance(result, Tensor) and result.requires_grad and result.numel():
            result = _local(result)
            weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(index), device="cpu")
            total = total + (result.float() * weights.to(result.device)).sum().cpu()
    if not total.requires_grad:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(total, [x for x, grad in zip(leaves, learns, strict=True) if grad], allow_unused=True))
    return [next(found) if grad else None for grad in learns]


def _versions() -> dict[str, str]:
    from ultraep_compile import __version__

    return {"ultraep_compile": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _write(report: dict[str, Any]) -> str:
    with contextlib.suppress(OSError):
        Path(REPORT).write_text(json.dumps(report, indent=2) + "\n")
        return REPORT
    return "this message"
