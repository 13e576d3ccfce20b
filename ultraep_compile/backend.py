"""The torch.compile backend: `torch.compile(model, backend="ultraep", options={...})`.

Dynamo hands over a graph; the passes rewrite its MoE layers; the inner backend compiles the result. A mistake of the user
found here is raised by the compiled function itself, so that it arrives as our error and not wrapped in Dynamo's.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.parallel import DistributedDataParallel

from ultraep_compile.agreeing import agreeing, agreeing_switched_off, failing, group_of
from ultraep_compile.config import Options
from ultraep_compile.errors import OptionError, SiteCountError, UltraEPError, nearest
from ultraep_compile.local_inputs import take_parts
from ultraep_compile.ops.steps import ran_balanced
from ultraep_compile.passes.cache_key import CacheKeyPass
from ultraep_compile.passes.pipeline import ANALYSES, Rewrite, run_passes
from ultraep_compile.passes.refused import refused_inputs
from ultraep_compile.report import GraphReport, add_report, wants_snapshots
from ultraep_compile.shadow import Shadow, copied
from ultraep_compile.spot_check import Watch
from ultraep_compile.steps import compiled_here, follow_steps
from ultraep_compile.telemetry.recorder import get_recorder
from ultraep_compile.versions import untested

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def ultraep(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Compiled:
    """Balance every MoE layer of a Dynamo graph, then compile it with the inner backend.

    Args:
        options: see `Options`.
        mode: torch.compile's mode, handed to Inductor.
    """
    follow_steps()
    try:
        if unknown:
            raise OptionError(
                f"the ultraep backend takes options= and mode=, not {', '.join(map(repr, unknown))}. Put it into options."
            )
        chosen = Options.of(options)
        _check_mode(mode, chosen.inner)
        _check_transport(chosen, gm)
        if chosen.disabled or (chosen.ranks in (None, 1) and chosen.group is None and not group_of(gm)):
            if chosen.expect_moe_sites is not None and not chosen.disabled:  # nothing to balance, but a count to check
                rewrite = Rewrite(chosen, refused=refused_inputs(gm, example_inputs))
                run_passes(gm, rewrite, ANALYSES)
                _check_count(rewrite)
                return _noted(rewrite, compile_inner(gm, example_inputs, chosen, mode, rewritten=False))
            compiled = compile_inner(gm, example_inputs, chosen, mode, rewritten=False)
            return agreeing_switched_off(compiled, gm, chosen) if chosen.disabled else compiled
        return _balanced(gm, example_inputs, chosen, mode)
    except UltraEPError as error:
        return failing(error, options, gm)


def _check_mode(mode: object, inner: str) -> None:
    """Refuse a mode that Inductor does not have; say once that other compilers have none.

    Raises: OptionError.
    """
    if mode is None:
        return
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise OptionError(f"mode= is {mode!r}. {nearest(str(mode), known)}")
    if inner != "inductor" and mode != "default":
        warn_once(f"ultraep: mode={mode!r} is one of Inductor's, and the inner backend is {inner!r}: it is ignored. Leave it out.")


def _check_transport(options: Options, gm: fx.GraphModule) -> None:
    """Refuse a transport between processes where the ranks are slices of one process's tokens.

    Raises: OptionError.
    """
    virtual = options.group is None and options.ranks not in (None, 1) and not group_of(gm)
    if options.transport != "auto" and virtual:
        raise OptionError(
            f"option 'transport' is {options.transport!r}, which is between processes, but no process group is given: ranks are "
            "virtual. Give the option 'group', or call shard_experts; or leave 'transport' out."
        )


def _balanced(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> Compiled:
    original = copied(gm) if options.verify else None
    rewrite = Rewrite(options, refused=refused_inputs(gm, example_inputs), snapshots=[] if wants_snapshots() else None)
    gm = run_passes(gm, rewrite)
    for sentence in untested() if rewrite.prepared else ():
        warn_once(f"ultraep: {sentence}")
    add_report(GraphReport.of(gm, rewrite))
    _check_count(rewrite)
    _say_what_is_missing(rewrite)
    if options.trace is not None and not rewrite.prepared:
        get_recorder(options.trace).flush()  # nothing is recorded, and the file is there all the same
    in_agreement = agreeing(gm, rewrite)
    shadow = Shadow.of(original, gm, rewrite) if original is not None and rewrite.prepared else None
    watching = Watch(gm, rewrite) if rewrite.looked_at else None
    inputs, given_parts = take_parts(gm, example_inputs)
    compiled = given_parts(compile_inner(gm, inputs, options, mode, rewritten=bool(rewrite.prepared)))
    if watching is not None and shadow is None:
        compiled = watching.beside(compiled)
    return _noted(rewrite, in_agreement(compiled if shadow is None else shadow.beside(compiled)))


def _noted(rewrite: Rewrite, compiled: Compiled) -> Compiled:
    """A compiled graph that notes which layers it balances."""
    layers = tuple(site.name for site in rewrite.prepared.values())
    if not layers:
        return compiled

    def noting(*args: Any) -> Any:
        ran_balanced(layers)
        return compiled(*args)

    return noting


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None, *, rewritten: bool
) -> Compiled:
    """The inner backend on a graph; on one that was not rewritten, exactly what it would do without us."""
    if options.inner == "eager":
        return gm.forward
    if options.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = dict(list_mode_options(mode)) if mode else {}
    if rewritten:
        patches["joint_custom_pre_pass"] = CacheKeyPass(options.digest())
    return compile_fx(gm, list(example_inputs), config_patches=patches or None)  # pyright: ignore[reportReturnType]


def _check_count(rewrite: Rewrite) -> None:
    expected, found = rewrite.options.expect_moe_sites, len(rewrite.prepared)
    whole = compiled_here()
    if whole is not None:  # counted at the end of the step, over all of its graphs
        whole.reasons |= {m.name: m.reason for m in rewrite.misses}
        if _ddp_splits_graphs():
            whole.reasons["DistributedDataParallel"] = _DDP_SPLITS
        return
    if expected is None or expected == found:
        return
    reasons = "".join(f"\n  {m.name}: {m.reason}" for m in rewrite.misses)
    if _ddp_splits_graphs():
        reasons += f"\n{_DDP_SPLITS}"
    raise SiteCountError(
        f"expected {expected} MoE layers in the compiled graph, rewrote {found}.{reasons or ' Nothing else looked like one.'}\n"
        "If the model broke into several graphs, call ultraep_compile.prepare(model, example_inputs) first; "
        "`ultraep-compile explain` shows each layer."
    )


_DDP_SPLITS = (
    "DistributedDataParallel cuts the graph at its buckets before this backend sees it, and a MoE layer cut in two runs "
    "unbalanced. Set torch._dynamo.config.optimize_ddp = False before the first step."
)


def _ddp_splits_graphs() -> bool:
    """Is this a compilation inside a DistributedDataParallel forward whose graph Dynamo splits into buckets?"""
    splits = torch._dynamo.config.optimize_ddp in (True, "ddp_optimizer")
    return splits and DistributedDataParallel._get_active_ddp_module() is not None


def _say_what_is_missing(rewrite: Rewrite) -> None:
    for miss in rewrite.misses:
        log.info("%s runs unbalanced: %s", miss.name, miss.reason)
    if _ddp_splits_graphs() and (rewrite.misses or not rewrite.prepared):
        warn_once(f"ultraep: {_DDP_SPLITS}")
    if rewrite.misses:
        names = ", ".join(m.name for m in rewrite.misses[:3]) + (", ..." if len(rewrite.misses) > 3 else "")
        warn_once(
            f"ultraep: {len(rewrite.misses)} MoE layer(s) run unbalanced ({names}): {rewrite.misses[0].reason}. "
            "Add `ultraep_compile.prepare(model, example_inputs)` before compiling, or see `ultraep-compile explain`."
        )
    elif not rewrite.prepared:
        log.info("no MoE layer in this graph; it is compiled as %s alone would", rewrite.options.inner)


@functools.lru_cache(maxsize=1024)
def warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


follow_steps()
