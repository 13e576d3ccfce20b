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
import torch.distributed as dist
from torch import fx
from torch.nn.parallel import DistributedDataParallel

from ultraep_compile.config import Options
from ultraep_compile.errors import OptionError, SiteCountError, UltraEPError, nearest
from ultraep_compile.local_inputs import take_parts
from ultraep_compile.ops import watch
from ultraep_compile.ops.steps import ran_balanced
from ultraep_compile.passes.cache_key import CacheKeyPass
from ultraep_compile.passes.lift.called import is_divided
from ultraep_compile.passes.pipeline import ANALYSES, Rewrite, run_passes
from ultraep_compile.passes.refused import refused_inputs
from ultraep_compile.report import GraphReport, add_report, wants_snapshots
from ultraep_compile.shadow import Shadow, copied
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
        if chosen.disabled or (chosen.ranks in (None, 1) and chosen.group is None and not _is_sharded(gm)):
            if chosen.expect_moe_sites is not None and not chosen.disabled:  # nothing to balance, but a count to check
                rewrite = Rewrite(chosen, refused=refused_inputs(gm, example_inputs))
                run_passes(gm, rewrite, ANALYSES)
                _check_count(rewrite)
                return _noted(rewrite, compile_inner(gm, example_inputs, chosen, mode, rewritten=False))
            return compile_inner(gm, example_inputs, chosen, mode, rewritten=False)
        return _balanced(gm, example_inputs, chosen, mode)
    except UltraEPError as error:
        return functools.partial(_raise, error)


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
    virtual = options.group is None and options.ranks not in (None, 1) and not _is_sharded(gm)
    if options.transport != "auto" and virtual:
        raise OptionError(
            f"option 'transport' is {options.transport!r}, which is between processes, but no process group is given: ranks are "
            "virtual. Give the option 'group', or call shard_experts; or leave 'transport' out."
        )


def _raise(error: UltraEPError, *args: Any) -> None:
    raise error


def _is_sharded(gm: fx.GraphModule) -> bool:
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    calls = [n for g in graphs for n in g.nodes if n.op == "call_function"]
    return any("unshard" in str(n.target) or is_divided(n) for n in calls)


def _balanced(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> Compiled:
    original = copied(gm) if options.verify else None
    rewrite = Rewrite(options, refused=refused_inputs(gm, example_inputs), snapshots=[] if wants_snapshots() else None)
    gm = run_passes(gm, rewrite)
    for sentence in untested() if rewrite.prepared else ():
        warn_once(f"ultraep: {sentence}")
    add_report(GraphReport.of(gm, rewrite))
    _check_count(rewrite)
    _say_what_is_missing(rewrite)
    if options.trace is not None:
        _start_trace(rewrite)
    shadow = Shadow.of(original, gm, rewrite) if original is not None and rewrite.prepared else None
    inputs, given_parts = take_parts(gm, example_inputs)
    compiled = given_parts(compile_inner(gm, inputs, options, mode, rewritten=bool(rewrite.prepared)))
    return _noted(rewrite, compiled if shadow is None else shadow.beside(compiled))


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


def _start_trace(rewrite: Rewrite) -> None:
    writes = not rewrite.group or dist.get_rank(dist.distributed_c10d._resolve_process_group(rewrite.group)) == 0  # pyright: ignore
    assert rewrite.options.trace is not None
    recorder = get_recorder(rewrite.options.trace) if writes else None
    for key, site in rewrite.prepared.items():
        watch.start(key, site.name, recorder, rewrite.group)
    if recorder is None:
        return
    for site, made in zip(rewrite.sites, rewrite.prepared.values(), strict=True):
        facts = made.program.signature
        recorder.describe(
            made.name,
            top_k=site.top_k,
            expert_bytes=sum(p.elements * p.dtype.itemsize for p in facts.params),
            row_bytes=facts.rows.elements * facts.rows.dtype.itemsize,
            flops_per_row=made.program.flops_per_row,
        )
    if not rewrite.prepared:
        recorder.flush()


follow_steps()
