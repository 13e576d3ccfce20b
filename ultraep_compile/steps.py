"""Which layers really ran balanced in a step: what the compiler left to eager mode never comes to the backend.

A step is a call of a compiled model. When Dynamo first looks at a frame for a model that is compiled by us, the compiled callable
is told to note where its calls begin and end; in between, graphs note the layers that they balance, and lifted layers that their
own forward ran. At the end of a call the sum is compared with `expect_moe_sites`, and layers that `prepare` found and that did not
run balanced are one warning, with Dynamo's own reason. A step costs two calls of Python functions.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from ultraep_compile.errors import SiteCountError, TopologyError
from ultraep_compile.exchange import watchdog
from ultraep_compile.ops import steps
from ultraep_compile.report import StepReport, add_step

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Compiled:
    """One callable that our backend compiles, and what its steps have shown."""

    expected: int | None
    model: weakref.ref[nn.Module] | None
    reasons: dict[str, str] = field(default_factory=dict)
    """Layer that graphs show and that is not balanced -> why."""
    most: int = 0
    """Layers balanced in a step."""
    troubles: Counter[str] = field(default_factory=Counter)
    """What Dynamo has said, up to the last step."""
    said: set[str] = field(default_factory=set)
    group: weakref.ref[dist.ProcessGroup] | None = None
    """Of the option `group`."""

    def enter(self) -> Callable[[], None]:
        step = steps.enter()
        return lambda: self.leave(step)

    def leave(self, step: steps.Step) -> None:
        steps.leave(step)
        known, self.troubles = self.troubles, troubles()
        if sys.exc_info()[0] is not None or torch.compiler.is_exporting() or _in_eager_stance():
            return
        new = [reason for reason, times in self.troubles.items() if times > known[reason]]
        missing = self._missing(step, bool(new))
        count, before, self.most = len(step.balanced), self.most, max(self.most, len(step.balanced))
        reason = _shown(new[0]) if new else ""
        add_step(StepReport(tuple(step.balanced), tuple(missing), reason))
        if new and count < before and (group := self.group and self.group()) is not None and dist.get_world_size(group) > 1:
            _leave_the_others(group, before, count, reason)
        if self.expected is not None and count != self.expected:
            raise SiteCountError(self._miscount(count, missing, reason))
        told = self._told() if missing else {}  # with a warning of their own
        if len(missing) > len(told) or (not missing and new and count < before):  # layers that are alike may share a name
            self._warn(step, missing, max(before, count + len(missing)), reason)

    def _missing(self, step: steps.Step, trouble: bool) -> list[str]:
        """Layers of this model that ran without balancing: known by their own forward, or, where Dynamo gave a frame up, by
        not having come up in any graph.
        """
        model = self.model() if self.model else None
        if model is None:
            return sorted({type(m).__name__ for m in step.own})
        names = {id(m): n for n, m in model.named_modules()} if step.own else {}
        missing = {names[id(m)]: None for m in step.own if id(m) in names}
        if trouble:
            from ultraep_compile.preparation import findings_of

            found = [f.path for f in findings_of(model) if f.rung in ("traced", "lifted")]
            if not found and not step.balanced:
                found = _experts_in(model)
            if len(step.balanced) < len(found):
                missing |= dict.fromkeys(p for p in found if not any(_is_same(p, b) for b in step.balanced))
        return [m or type(model).__name__ for m in missing]

    def _told(self) -> dict[str, str]:
        """Lifted layers that have fallen back to their own forward, and why."""
        from ultraep_compile.ladder.standing import why_unbalanced

        model = self.model() if self.model else None
        modules = model.named_modules() if model is not None else ()
        return {n or type(m).__name__: why for n, m in modules if (why := why_unbalanced(m))}

    def _miscount(self, count: int, missing: list[str], reason: str) -> str:
        told = self._told()
        reasons = "".join(f"\n  {layer}: {why}" for layer, why in self.reasons.items())
        reasons += "".join(f"\n  {why}" for why in told.values())
        reasons += "".join(f"\n  {m}: {reason or _OWN}" for m in missing if m not in self.reasons | told)
        if not missing and reason:
            reasons += f"\n  {reason}"
        return (
            f"expected {self.expected} MoE layers in the compiled graph, rewrote {count} (counted over all graphs that ran in this "
            f"step).{reasons or ' Nothing else looked like one.'}\n"
            "If the model broke into several graphs, call ultraep_compile.prepare(model, example_inputs) first; "
            "`ultraep-compile explain` shows each layer."
        )

    def _warn(self, step: steps.Step, missing: list[str], of: int, reason: str) -> None:
        from ultraep_compile.backend import warn_once

        text = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "") if missing else "the others"
        if text in self.said:
            return
        self.said.add(text)
        model = self.model() if self.model else None
        whose = f" of {type(model).__name__}" if model is not None else ""
        cure = _LIMIT_CURE if "recompile limit" in reason.lower() else _BREAK_CURE
        warn_once(
            f"ultraep: {len(step.balanced)} of {of} MoE layers ran balanced in a step{whose}; {text} did not: {reason or _OWN}. {cure}"
        )


_OWN = "its own forward ran, outside of any graph"
_LIMIT_CURE = (
    "Compile with dynamic=True, mark sizes that change with torch._dynamo.mark_dynamic, or raise torch._dynamo.config.recompile_limit."
)
_BREAK_CURE = "Mend what breaks the graph there, or compile the layer by itself; `ultraep-compile explain` shows each layer."


def _is_same(path: str, balanced: str) -> bool:
    """After a graph break, names in a graph are relative."""
    balanced = balanced.partition("#")[0]
    return path == balanced or path.startswith(f"{balanced}.") or balanced.startswith(f"{path}.") or f".{balanced}." in f".{path}."


def _experts_in(model: nn.Module) -> list[str]:
    """Modules that hold experts by their structure, of a model that was not prepared."""
    from ultraep_compile.ladder.climb import candidates

    return list(dict.fromkeys(c.holder for c in candidates(model)))


def troubles() -> Counter[str]:
    """What Dynamo could not compile so far: reason -> times."""
    found = torch._dynamo.utils.counters
    frames = found["frames"]
    total = Counter(found["graph_break"]) + Counter(found["unimplemented"])
    if not total and (failed := frames["total"] - frames["ok"]):
        total["Dynamo left a frame to eager mode; TORCH_LOGS=dynamo says which"] = failed
    return total


def _in_eager_stance() -> bool:
    """Is this a call that was told to compile nothing (`torch.compiler.set_stance`)?"""
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)
    return getattr(stance, "stance", "default") == "force_eager"


def _shown(reason: str) -> str:
    """The gist of a reason: Dynamo's have paragraphs of hints."""
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("Hint", "For more", "Developer debug context"))][:2]
    return " ".join(kept).rstrip(".")


# ---- where calls begin ------------------------------------------------------------------------------------------------


def follow_steps() -> None:
    """Look at frames that Dynamo begins to compile from now on, and at the one that it is compiling; `torch._dynamo.reset`
    forgets it.
    """
    handler = torch._dynamo.callback_handler  # pyright: ignore[reportPrivateImportUsage]
    if _frame_begins not in handler.start_callbacks:
        handler.register_start_callback(_frame_begins)
    _frame_begins(None)


_known: weakref.WeakKeyDictionary[Any, Compiled] = weakref.WeakKeyDictionary()
"""By what torch.compile made."""


def _leave_the_others(group: dist.ProcessGroup, before: int, count: int, reason: str) -> NoReturn:
    """A rank with all experts needs nobody in eager mode, but the others wait for it: tell them, and raise."""
    error = TopologyError(
        f"rank {dist.get_rank(group)} of the option 'group' balanced {count} MoE layers in this call and {before} before, while other ranks "
        f"may go on to balance {before}: {reason or 'Dynamo left frames to eager mode'}. If that is Dynamo's limit of recompilations, compile "
        "with dynamic=True or pad batches to a few sizes, on all ranks alike; else mend what it says."
    )
    watchdog().tell(error)
    raise error


def compiled_here() -> Compiled | None:
    """What is known of the compiled callable whose call this is, if it notes its steps."""
    found = _compile_wrapper(sys._getframe(1))
    return _known.get(found.f_locals["self"]) if found is not None else None


def _frame_begins(args: Any) -> None:
    """The outermost frame that runs for a compiled callable: tell the callable to note its steps, this one included."""
    try:
        found = _compile_wrapper(sys._getframe(1))
        if found is None:
            return
        context, cleanups, function = (found.f_locals[n] for n in ("self", "cleanups", "fn"))
        options = _our_options(context)
        if context in _known or options is None:
            return
        hooks = context.enter_exit_hooks
        model = getattr(function, "__self__", None)
        reference = weakref.ref(model) if isinstance(model, nn.Module) else None
        made = _known[context] = Compiled(options.expect_moe_sites, reference, troubles=troubles())
        made.group = None if options.group is None else weakref.ref(options.group)
        hooks.append(made.enter)
        cleanups.append(made.enter())
    except (AttributeError, KeyError, TypeError):  # a torch whose callables are made otherwise: graphs are counted one by one
        log.debug("steps of compiled models are not noted", exc_info=True)


def _compile_wrapper(frame: FrameType | None) -> FrameType | None:
    """The frame in which torch.compile's callable runs what it compiles."""
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return frame
        frame = frame.f_back
    return None


def _our_options(context: Any) -> Any:
    """The options of a callable that our backend compiles, else None; mistakes in them are told elsewhere."""
    from torch._dynamo.eval_frame import innermost_backend

    from ultraep_compile.backend import ultraep
    from ultraep_compile.config import Options
    from ultraep_compile.errors import UltraEPError

    backend = innermost_backend(context.callback)
    keywords: dict[str, Any] = {}
    while backend is not ultraep:
        keywords = {**getattr(backend, "kwargs", {}), **getattr(backend, "keywords", {}), **keywords}
        inner = getattr(backend, "compiler_fn", None) or getattr(backend, "func", None)
        if inner is None:
            return None
        backend = inner
    try:
        options = Options.of(keywords.get("options"))
    except UltraEPError:
        return None
    return None if options.disabled else options
