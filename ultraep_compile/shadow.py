"""The option `verify`: the unmodified graph beside the rewritten one, layer by layer, for the first calls.

Each of these calls runs three times: compiled, as it will; and both graphs node by node, the unmodified and the rewritten, to
compare every layer's output and to check every plan. In training both are also differentiated, by the same random direction. The
first layer that differs is named, with the tokens that do and the copies that these went to, and everything measured goes into a
file to attach to a report.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ultraep_compile.errors import VerificationError
from ultraep_compile.ops import watch
from ultraep_compile.passes.lift.nodes import input_name
from ultraep_compile.passes.lift.rewrite import where_now
from ultraep_compile.passes.pipeline import Rewrite
from ultraep_compile.planner.checks import broken_promises
from ultraep_compile.planner.plan import Plan
from ultraep_compile.shadow_tokens import differing_tokens

log = logging.getLogger(__name__)
REPORT = "ultraep-verify.json"
_ROUNDING = 64
"""Rounding errors of the result's dtype that are no difference."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One rewritten layer: where its output, counts and plan are."""

    layer: str
    before: str
    """Node of the unmodified graph that holds the layer's output."""
    after: str
    """The same in the rewritten graph."""
    counts: str
    plan: str
    physical: str
    """Where every pair of a token and a choice went."""


class Shadow:
    """Both graphs of one compilation, ready to run beside the compiled one."""

    def __init__(
        self, original: fx.GraphModule, rewritten: fx.GraphModule, watched: list[Watched], rewrite: Rewrite
    ) -> None:
        self.original, self.rewritten, self.watched = original, rewritten, watched
        self.layers = [s.name for s in rewrite.prepared.values()]
        self.inputs: list[str] = []
        self.options, self.left = rewrite.options, rewrite.options.verify
        self.compiled: Callable[..., Any] = rewritten.forward

    @classmethod
    def of(cls, original: fx.GraphModule, gm: fx.GraphModule, rewrite: Rewrite) -> Shadow:
        """Before the inner backend changes `gm`. Layers inside activation checkpoints are compared by the outputs alone."""
        watched = []
        for site, owner, (key, made) in zip(rewrite.sites, rewrite.owners, rewrite.prepared.items(), strict=True):
            if owner is not gm:
                continue
            plan = next(n for n in gm.graph.nodes if n.target is torch.ops.ultraep.plan.default and n.args[3] == key)
            dealt = next(n for n in gm.graph.nodes if n.target is torch.ops.ultraep.reroute.default and n.args[5] == key)
            after = where_now(gm, site.output)
            watched.append(Watched(made.name, site.output.name, after.name, plan.args[0].name, plan.name, dealt.name))
        shadow = cls(original, fx.GraphModule(gm, copy.deepcopy(gm.graph)), watched, rewrite)
        shadow.inputs = [input_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
        return shadow

    def beside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled = compiled
        return self

    def __call__(self, *args: Any) -> Any:
        if self.left <= 0:
            return self.compiled(*args)
        self.left -= 1
        expected, theirs, right = _run(self.original, args, {w.before for w in self.watched})
        wanted = {n for w in self.watched for n in (w.after, w.counts, w.plan, w.physical)}
        _, ours, made = _run(self.rewritten, args, wanted)
        got = self.compiled(*args)
        self._judge(self._layers(ours, theirs), self._outputs(got, expected), self._gradients(made, right))
        return got

    def _layers(self, ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
        layers = []
        for each in self.watched:
            slots, shares = ours[each.plan]
            broken = broken_promises(ours[each.counts], Plan(slots, shares), self.options.planner != "none")
            after, before = ours[each.after], theirs[each.before]
            found = {"layer": each.layer, **self._compared(after, before), "plan": broken}
            if found["difference"] > found["allowed"]:
                found["tokens"] = differing_tokens(after, before, found["allowed"], ours[each.physical], slots, ours[each.counts])
            layers.append(found)
        return layers

    def _outputs(self, got: Sequence[Any], expected: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {"output": index, **self._compared(mine, right)}
            for index, (mine, right) in enumerate(zip(got, expected, strict=True))
            if isinstance(mine, Tensor) and mine.is_floating_point() and mine.numel()
        ]

    def _gradients(self, made: list[Tensor | None], right: list[Tensor | None]) -> list[dict[str, Any]]:
        """Small gradients are judged beside large ones: where all terms cancel, what is left is rounding."""
        floor = 1e-3 * max((float(g.double().norm()) for g in right if g is not None and g.isfinite().all()), default=0.0)
        return [
            {"gradient": name, **self._compared(mine, theirs, floor)}
            for name, mine, theirs in zip(self.inputs, made, right, strict=False)
            if mine is not None and theirs is not None
        ]

    def _judge(self, *measured: list[dict[str, Any]]) -> None:
        layers, outputs, gradients = measured
        everything = [*layers, *outputs, *gradients]
        wrong = [x for x in everything if x["difference"] > x["allowed"] or x.get("plan")]
        if not wrong:
            worst = max((x["difference"] for x in everything), default=0.0)
            counts = f"{len(layers)} layers, {len(outputs)} outputs, {len(gradients)} gradients"
            log.info("verified: %s, largest difference %.1e", counts, worst)
            return
        found = {"layers": layers, "outputs": outputs, "gradients": gradients}
        written = _write({"options": self._settings(), **found, **_versions()})
        first = wrong[0]
        kind = next(k for k in ("layer", "output", "gradient") if k in first)
        what = f"{'the gradient of ' if kind == 'gradient' else kind + ' '}{first[kind]}"
        plan = f"; its plan is illegal: {'; '.join(first['plan'])}" if first.get("plan") else ""
        tokens = f"; {first['tokens']['text']}" if "tokens" in first else ""
        raise VerificationError(
            f"{what} of the rewritten graph differs from the unmodified graph by {first['difference']:.2e} (relative, allowed "
            f"{first['allowed']:.2e}), the first of {len(wrong)} differences{plan}{tokens}; rewritten layers: "
            f"{', '.join(self.layers[:4])}. Please report this with {written} and the output of `ultraep-compile dump`."
        )

    def _compared(self, ours: Tensor, theirs: Tensor, floor: float = 1e-30) -> dict[str, float]:
        """Relative L2 difference, and what is allowed: rounding grows with the layers that came before. What is not finite must
        be so in the same places.
        """
        allowed = _ROUNDING * torch.finfo(theirs.dtype).eps * max(1, len(self.layers)) ** 0.5
        ours, theirs = ours.detach().double(), theirs.double()
        finite = theirs.isfinite()
        if not torch.equal(finite, ours.isfinite()):
            return {"difference": 1.0, "allowed": allowed}
        ours, theirs = ours[finite], theirs[finite]
        difference = float((ours - theirs).norm() / theirs.norm().clamp_min(max(floor, 1e-30)))
        return {"difference": difference, "allowed": allowed}

    def _settings(self) -> dict[str, str]:
        return {f.name: str(getattr(self.options, f.name)) for f in dataclasses.fields(self.options)}


class _Watching(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(gm)
        self.wanted, self.seen = wanted, {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            copied = lambda t: t.detach().clone() if isinstance(t, Tensor) else t  # noqa: E731
            self.seen[n.name] = tuple(map(copied, result)) if isinstance(result, (tuple, list)) else copied(result)
        return result


def _run(gm: fx.GraphModule, args: tuple[Any, ...], wanted: set[str]) -> tuple[Any, dict[str, Any], list[Tensor | None]]:
    """Results, wanted values and, in training, gradients by the arguments, of a graph on copies of these; random state and
    recordings stay as they were.
    """
    copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    learns = [isinstance(a, Tensor) and a.requires_grad for a in args]
    training = torch.is_grad_enabled() and any(learns)
    leaves = [c.requires_grad_(training and grad) if isinstance(c, Tensor) else c for c, grad in zip(copies, learns, strict=True)]
    given = [c.view_as(c) if grad else c for c, grad in zip(leaves, learns, strict=True)]  # a graph may write to them
    devices = sorted({a.device.index or 0 for a in args if isinstance(a, Tensor) and a.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(training), watch.paused():
        watching = _Watching(gm, wanted)
        watching.extra_traceback = False  # an error of ours says where it comes from
        results = watching.run(*given)
        gradients = _gradients(results, leaves, learns) if training else []
    return results, watching.seen, gradients


def _gradients(results: Any, leaves: list[Any], learns: list[bool]) -> list[Tensor | None]:
    """Of all results together, each weighed by random numbers that are the same for both graphs."""
    total = torch.zeros(())
    for index, result in enumerate(results):
        if isinstance(result, Tensor) and result.requires_grad and result.numel():
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
