"""A compiled graph whose first call waits until all ranks of its group have stated that they run the same.

`ops/agreement.py` compares; here is what is compared of a graph, and what follows from it: which ranks record a trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._guards import CompileContext
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ultraep_compile.config import Options
from ultraep_compile.errors import TopologyError, UltraEPError
from ultraep_compile.ops import watch
from ultraep_compile.ops.agreement import BALANCED, RUNS, SWITCHED_OFF, Facts, Statement, common
from ultraep_compile.ops.alike import digest
from ultraep_compile.ops.experts import ExpertSite, site_of
from ultraep_compile.ops.groups import resolve
from ultraep_compile.ops.transport import choose_transport
from ultraep_compile.passes.cache_key import source_digest
from ultraep_compile.passes.lift import Site
from ultraep_compile.passes.lift.called import is_divided
from ultraep_compile.passes.lift.nodes import is_unshard, module_path, upstream
from ultraep_compile.passes.pipeline import Rewrite, bodies_run_by, detect_moe_pass, run_passes
from ultraep_compile.steps import compiled_here
from ultraep_compile.telemetry.recorder import Recorder, get_recorder
from ultraep_compile.worth import least_pairs

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
MAY_DIFFER = ("ranks", "group", "expect_moe_sites", "trace")
"""Options that ranks may have each their own of."""


def group_of(gm: fx.GraphModule) -> str:
    """Name of the group over which a graph's experts are divided; "" where none are."""
    for graph in (m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.nodes:
            if node.op == "call_function" and is_unshard(node):
                return str(node.args[3])
            if node.op == "call_function" and is_divided(node):
                return site_of(str(node.args[7])).group
    return ""


def agreeing(gm: fx.GraphModule, rewrite: Rewrite) -> Callable[[Compiled], Compiled]:
    """What wraps the compiled form of a graph that the passes have rewritten, with the agreement before its first call on a
    group; to be asked for before a compiler changes the graph.
    """
    if not rewrite.prepared:
        if rewrite.group:
            reasons = "; ".join(f"{m.name}: {m.reason}" for m in rewrite.misses[:2])
            common(resolve(rewrite.group)).note(
                f"has compiled a graph in which no MoE layer is balanced{f' ({reasons})' * bool(reasons)}"
            )
        return lambda compiled: compiled
    tracing = _Tracing(gm, rewrite)
    if not rewrite.group:
        if not _path(rewrite.options):
            return lambda compiled: compiled
        tracing.start([{"trace": _path(rewrite.options)}], 0)
        return tracing.around
    said = Statement(
        {RUNS: BALANCED, **_versions(), **_settings(rewrite.options)},
        tuple(
            (m.name, _facts(s, m, rewrite.options))
            for s, m in zip(rewrite.sites, rewrite.prepared.values(), strict=True)
        ),
        widest=max(m.layout.experts for m in rewrite.prepared.values()),
        wants={"trace": _path(rewrite.options)},
    )
    _note_the_limit(rewrite.group)
    return functools.partial(_agreeing, _routers(gm, rewrite), tracing, rewrite, said)


def _agreeing(
    routers: list[tuple[str, int]], tracing: _Tracing, rewrite: Rewrite, said: Statement, compiled: Compiled
) -> Compiled:
    names = [name for name, _ in said.layers]
    what = names[0] + f" and {len(names) - 1} more layers" * (len(names) > 1)
    around, options = tracing.around(compiled), rewrite.options
    last: Callable[[], dist.ProcessGroup | None] = lambda: None  # noqa: E731

    def run(*args: Any) -> Any:
        nonlocal last
        group = resolve(rewrite.group)
        if group is not last():
            _refuse_other_size(group, rewrite, what)
            choose_transport(rewrite.group, options.transport, options.deadline_s)
            shared = common(group)
            if not said.known_as() <= shared.known:
                digests = {name: f"{int(digest(args[i])):x}" for name, i in routers if _is_whole(args[i])}
                shared.state(dataclasses.replace(said, routers=digests), what, options.deadline_s)
            tracing.start(shared.wants(said), shared.rank)
            last = weakref.ref(group)
        return around(*args)

    return run


def agreeing_switched_off(compiled: Compiled, gm: fx.GraphModule, options: Options) -> Compiled:
    """`compiled`, of an unmodified graph, with a look at whether the other ranks are switched off as well.

    It does not wait for long: a rank that is switched off needs nobody. What the others say later it hears at its next call.
    """
    name = options.group.group_name if options.group is not None else group_of(gm)
    if not name or not (group_of(gm) or _has_layers(gm, options)):
        return compiled
    said, settled = Statement({RUNS: SWITCHED_OFF}), (lambda: None)

    def run(*args: Any) -> Any:
        nonlocal settled
        group = resolve(name)
        if group is not settled() and common(group).state_if_heard(said, "switched off"):
            settled = weakref.ref(group)
        return compiled(*args)

    return run


def failing(error: UltraEPError, options: Any, gm: fx.GraphModule) -> Compiled:
    """What raises `error` when it is called, and tells the other ranks, so that none waits for this one."""
    name = ""
    with contextlib.suppress(Exception):  # whatever is wrong with the options is what `error` says
        given = options.group if isinstance(options, Options) else dict(options or {}).get("group")
        name = group_of(gm) if given is None else given.group_name

    def run(*args: Any) -> None:
        if name and dist.is_initialized():
            with contextlib.suppress(
                UltraEPError, RuntimeError
            ):  # of a group that is gone, say: the first error counts
                common(resolve(name)).state_if_heard(Statement({}, failed=str(error)), "compiling")
        raise error

    return run


@functools.cache
def _versions() -> Facts:
    import ultraep_compile

    return {"torch": torch.__version__, "ultraep_compile": f"{ultraep_compile.__version__} ({source_digest()[:8]})"}


def _settings(options: Options) -> Facts:
    named = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in MAY_DIFFER}
    return {f"option {name}": str(value) for name, value in named.items()}


def _path(options: Options) -> str:
    return "" if options.trace is None else str(options.trace)


def _facts(site: Site, made: ExpertSite, options: Options) -> Facts:
    signature = made.program.signature
    parts = [f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}" for p in signature.params]
    return {
        "experts": str(made.layout.experts),
        "experts of a token": str(site.top_k),
        "tokens": f"{str(signature.rows.dtype).removeprefix('torch.')}{list(signature.rows.shape)}",
        "weights of an expert": ", ".join(parts),
        "experts held by a rank": "its own" if made.sharded else "all",
        "gradients of experts": "of the sum of losses" if made.summed else "of the mean of losses",
        "routed pairs to plan from": str(least_pairs(made, site.top_k, options.balance_from, torch.is_grad_enabled())),
        # what reads its own rank where a model divides experts by itself differs between ranks, and should
        **({} if site.divided else site.python_state),
    }


def _routers(gm: fx.GraphModule, rewrite: Rewrite) -> list[tuple[str, int]]:
    """(name, position among the inputs) of what makes the router's choice out of a layer's tokens.

    A model that divides its experts by its own means may as well have a router of its own on each rank.
    """
    places = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    found: dict[int, str] = {}
    for site, owner, made in zip(rewrite.sites, rewrite.owners, rewrite.prepared.values(), strict=True):
        if site.divided:
            continue
        before = set(upstream(site.hidden))
        makers = {m for n in (site.ids, site.weight, site.scores) if n is not None for m in upstream(n)} - before
        for node in owner.graph.find_nodes(op="placeholder"):  # in an order that all ranks have alike
            if node in makers and (outer := _outer(gm, owner, node)) in places:
                found.setdefault(places[outer], f"router's weights of layer {made.name} (input {len(found)})")
    return sorted(((name, index) for index, name in found.items()), key=lambda pair: pair[1])


def _outer(gm: fx.GraphModule, owner: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node of `gm` that a body is given as its input `node`."""
    if owner is gm:
        return node
    for call in gm.graph.nodes:
        for body in bodies_run_by(gm, call) if call.op == "call_function" else ():
            inner = _outer(body, owner, node)
            if inner is not None and inner.op == "placeholder":
                inputs = body.graph.find_nodes(op="placeholder")
                given = call.args[len(call.args) - len(inputs) :][inputs.index(inner)]
                return given if isinstance(given, fx.Node) else None
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and not isinstance(value, DTensor)


def _has_layers(gm: fx.GraphModule, options: Options) -> bool:
    """Would other ranks balance this graph? Whatever goes wrong in looking is no matter of one that is switched off."""
    looked = Rewrite(options)
    try:
        run_passes(gm, looked, [detect_moe_pass])
    except Exception:
        log.debug("a graph could not be looked at", exc_info=True)
    return bool(looked.sites)


def _refuse_other_size(group: dist.ProcessGroup, rewrite: Rewrite, what: str) -> None:
    if (size := dist.get_world_size(group)) != rewrite.ranks:
        raise TopologyError(
            f"{what}: the graph was compiled for {rewrite.ranks} ranks, and the process group {rewrite.group!r} has {size} now. Call "
            "torch._dynamo.reset() and compile with the new group; a sharded model must be built, sharded and loaded anew (a "
            "distributed checkpoint loads on any number of ranks)."
        )


def _note_the_limit(group: str) -> None:
    """The last compilation of a function that Dynamo allows is the last thing that is heard of it: then it runs in eager mode."""
    made = getattr(CompileContext.current_compile_id(), "frame_compile_id", None) or 0
    limit = getattr(torch._dynamo.config, "recompile_limit", None) or 8
    if made + 1 >= limit:
        common(resolve(group)).note(
            f"has compiled its model {made + 1} times, and in eager mode it exchanges nothing: Dynamo changes to that after "
            f"recompile_limit={limit} recompilations (compile with dynamic=True, or pad batches to a few sizes)"
        )


class _Tracing:
    """The names under which a graph's layers are recorded, and who records."""

    def __init__(self, gm: fx.GraphModule, rewrite: Rewrite) -> None:
        places = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._rewrite = rewrite
        self._recorder: Recorder | None = None
        here = compiled_here()
        self._model, self._places = here.model if here else None, WeakIdKeyDictionary()
        self._layers: dict[str, tuple[str, int | None]] = {}  # by site key: name, and which input tells layers apart
        for site, owner, (key, made) in zip(rewrite.sites, rewrite.owners, rewrite.prepared.items(), strict=True):
            inputs = (_outer(gm, owner, n) for p in site.params for n in upstream(p) if n.op == "placeholder")
            name = made.name if module_path(site.ids) else ""
            self._layers[key] = name, next((places[n] for n in inputs if n in places), None)

    def start(self, wants: Sequence[Facts], rank: int) -> None:
        """Record what the ranks of a group have agreed on: if any of them wanted a trace then, all take part, and the first of
        those writes. A rank that wishes for one later writes what it knows: what the others take part in, if they do.
        """
        writers = [r for r, each in enumerate(wants) if each.get("trace")]
        mine = _path(self._rewrite.options)
        alone = bool(mine) and not writers
        self._recorder = get_recorder(mine) if mine and (rank not in writers[1:]) else None
        for key, (name, _) in self._layers.items():
            if writers or alone:
                watch.start(key, name or self._rewrite.prepared[key].name, self._recorder, "" if alone else self._rewrite.group)
            else:
                watch.stop(key)

    def around(self, compiled: Compiled) -> Compiled:
        """`compiled`, under the names of the layers whose weights it is given."""

        def run(*args: Any) -> Any:
            if (recorder := self._recorder) is None:
                return compiled(*args)
            with watch.named({key: self._name(recorder, key, args) for key in self._layers}):
                return compiled(*args)

        return run

    def _name(self, recorder: Recorder, key: str, args: tuple[Any, ...]) -> str:
        name, place = self._layers[key]
        weight = None if place is None else args[place]
        name = name or self._place_of(weight) or self._rewrite.prepared[key].name
        if isinstance(weight, (nn.Parameter, DTensor)):
            name = recorder.own_name(name, weight)
        if not recorder.is_described(name):
            recorder.describe(name, **self._described(key))
        return name

    def _place_of(self, weight: Any) -> str:
        """The module in the compiled model that holds a weight, where Dynamo did not say; its class, if it is the model."""
        model = self._model() if self._model else None
        if model is None or not isinstance(weight, Tensor):
            return ""
        if weight not in self._places:
            named = next((n for n, p in model.named_parameters() if p is weight), "")
            self._places[weight] = named.rpartition(".")[0] or type(model).__name__
        return self._places[weight]

    def _described(self, key: str) -> dict[str, int]:
        made = self._rewrite.prepared[key]
        site = next(s for s, k in zip(self._rewrite.sites, self._rewrite.prepared, strict=True) if k == key)
        facts = made.program.signature
        return {
            "top_k": site.top_k,
            "expert_bytes": sum(p.elements * p.dtype.itemsize for p in facts.params),
            "row_bytes": facts.rows.elements * facts.rows.dtype.itemsize,
            "flops_per_row": made.program.flops_per_row,
        }
