"""The option `verify`: the unmodified graph beside the rewritten one, layer by layer, for the first calls.

Each of these calls runs three times: compiled, as it will; and both graphs node by node, the unmodified and the rewritten, to
compare every layer's output and to check every plan. The first layer that differs is named, and everything measured goes into
a file to attach to a report.
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
from ultraep_compile.passes.lift.rewrite import where_now
from ultraep_compile.passes.pipeline import Rewrite
from ultraep_compile.planner.checks import broken_promises
from ultraep_compile.planner.plan import Plan

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


class Shadow:
    """Both graphs of one compilation, ready to run beside the compiled one."""

    def __init__(
        self, original: fx.GraphModule, rewritten: fx.GraphModule, watched: list[Watched], rewrite: Rewrite
    ) -> None:
        self.original, self.rewritten, self.watched = original, rewritten, watched
        self.layers = [s.name for s in rewrite.prepared.values()]
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
            after = where_now(gm, site.output)
            watched.append(Watched(made.name, site.output.name, after.name, plan.args[0].name, plan.name))
        return cls(original, fx.GraphModule(gm, copy.deepcopy(gm.graph)), watched, rewrite)

    def beside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled = compiled
        return self

    def __call__(self, *args: Any) -> Any:
        if self.left <= 0:
            return self.compiled(*args)
        self.left -= 1
        expected, theirs = _run(self.original, args, {w.before for w in self.watched})
        _, ours = _run(self.rewritten, args, {n for w in self.watched for n in (w.after, w.counts, w.plan)})
        got = self.compiled(*args)
        self._judge(got, expected, ours, theirs)
        return got

    def _judge(self, got: Sequence[Any], expected: Sequence[Any], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        layers = []
        for each in self.watched:
            slots, shares = ours[each.plan]
            broken = broken_promises(ours[each.counts], Plan(slots, shares), self.options.planner != "none")
            difference, allowed = self._difference(ours[each.after], theirs[each.before])
            layers.append({"layer": each.layer, "difference": difference, "allowed": allowed, "plan": broken})
        outputs = []
        for index, (mine, right) in enumerate(zip(got, expected, strict=True)):
            if isinstance(mine, Tensor) and mine.is_floating_point() and mine.numel():
                difference, allowed = self._difference(mine, right)
                outputs.append({"output": index, "difference": difference, "allowed": allowed})
        wrong = [x for x in (*layers, *outputs) if not x["difference"] <= x["allowed"] or x.get("plan")]
        if not wrong:
            worst = max((x["difference"] for x in (*layers, *outputs)), default=0.0)
            log.info("verified: %d layers, %d outputs, largest difference %.1e", len(layers), len(outputs), worst)
            return
        written = _write({"options": self._settings(), "layers": layers, "outputs": outputs, **_versions()})
        first = wrong[0]
        what = f"layer {first['layer']}" if "layer" in first else f"output {first['output']}"
        plan = f"; its plan is illegal: {'; '.join(first['plan'])}" if first.get("plan") else ""
        raise VerificationError(
            f"{what} of the rewritten graph differs from the unmodified graph by {first['difference']:.2e} (relative, allowed "
            f"{first['allowed']:.2e}), the first of {len(wrong)} differences{plan}; rewritten layers: {', '.join(self.layers[:4])}. "
            f"Please report this with {written} and the output of `ultraep-compile dump`."
        )

    def _difference(self, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
        """(relative L2, allowed): rounding grows with the layers that came before."""
        difference = (ours.detach().double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
        allowed = _ROUNDING * torch.finfo(theirs.dtype).eps * max(1, len(self.layers)) ** 0.5
        return float(difference), allowed

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


def _run(gm: fx.GraphModule, args: tuple[Any, ...], wanted: set[str]) -> tuple[Any, dict[str, Any]]:
    """Results and wanted values of a graph on copies of the arguments; random state and recordings stay as they were."""
    copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    devices = sorted({a.device.index or 0 for a in args if isinstance(a, Tensor) and a.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), watch.paused():
        watching = _Watching(gm, wanted)
        return watching.run(*copies), watching.seen


def _versions() -> dict[str, str]:
    from ultraep_compile import __version__

    return {"ultraep_compile": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _write(report: dict[str, Any]) -> str:
    with contextlib.suppress(OSError):
        Path(REPORT).write_text(json.dumps(report, indent=2) + "\n")
        return REPORT
    return "this message"
