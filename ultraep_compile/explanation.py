"""`explain`: what the compiler finds in a model, what it would rewrite, and why not the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ultraep_compile.codegen.row_function import RowProgram
from ultraep_compile.config import Options, check_site_count
from ultraep_compile.cost_model import Layer, Rates, copy_tokens
from ultraep_compile.errors import SiteCountError, need_model
from ultraep_compile.formulas import LayerCost, layer_cost
from ultraep_compile.ladder.climb import Finding
from ultraep_compile.multimodal.describe import describe
from ultraep_compile.multimodal.roles import no_roles, watch_roles
from ultraep_compile.ops.experts import ExpertSite
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.passes.lift import Miss, Site
from ultraep_compile.passes.lift.nodes import upstream
from ultraep_compile.passes.pipeline import Rewrite, run_passes
from ultraep_compile.passes.refused import refused_inputs
from ultraep_compile.preparation import as_call, prepare_call
from ultraep_compile.steps import troubles
from ultraep_compile.worth import tokens_to_break_even


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One MoE layer, found or missed."""

    name: str
    status: str
    """`rewritten`, `unbalanceable` or `missed`."""
    experts: int | None
    top_k: int | None
    gating: str | None
    reason: str
    """Why it is not rewritten, or what proved it."""
    source: str = ""
    cost: LayerCost | None = None
    rung: str = "traced"
    """`traced` (the graph shows the experts as they are), `lifted` (from a recorded forward), `unbalanceable`, `missed`."""
    matched: str = ""
    """What was recognised."""
    copy_tokens: int | None = None
    """Rows that a rank computes while one copy travels, at H100 rates: N of `planner="quota:N"`."""
    pays: str = ""
    """From how many tokens on balancing pays, by the cost model: what `balance_from="auto"` goes by."""

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cost"}
        out["formulas"] = {} if self.cost is None else {name: str(value) for name, value in self.cost.items()}
        return out


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found; `str()` is the text report, `to_json()` the machine's."""

    moe_sites: list[SiteReport]
    expert_parameters: int
    """Parameters (numbers) that belong to experts, by structure."""
    rewritten_parameters: int
    """Those of them that a rewritten graph reads."""
    graph_breaks: list[str]
    graphs: int
    snapshots: list[list[tuple[str, str]]] = field(default_factory=list)
    """Per graph: (pass, text), first the graph before any pass."""
    programs: dict[str, RowProgram] = field(default_factory=dict)
    """Generated row programs by site, over all experts."""
    roles: dict[str, list[str]] = field(default_factory=no_roles)
    """Multimodal parts of the model, by structure: `encoders`, `projectors`, `llm`, `generators`."""
    parts: list[str] = field(default_factory=list)
    """The same in words: what feeds each encoder, where its features enter, which generators training does not call."""

    def to_json(self) -> dict[str, Any]:
        return {
            "moe_sites": [s.to_json() for s in self.moe_sites],
            "coverage": {"expert_parameters": self.expert_parameters, "rewritten": self.rewritten_parameters},
            "roles": self.roles,
            "graph_breaks": self.graph_breaks,
        }

    def rewritten(self) -> int:
        return sum(s.status == "rewritten" for s in self.moe_sites)

    def __str__(self) -> str:
        if not self.moe_sites:
            none = f"No MoE layer found in {self.graphs} graph(s): the model compiles as with the inner backend alone."
            return "\n".join([none, *self.parts])
        lines = [f"{self.rewritten()} of {len(self.moe_sites)} MoE layers are rewritten, in {self.graphs} graph(s)."]
        for s in self.moe_sites:
            sizes = f"{s.experts} experts, top-{s.top_k}, {s.gating}" if s.experts else "unknown sizes"
            lines.append(f"\n{s.name}: {s.status} ({sizes})")
            lines += [f"  {s.source}"] if s.source else []
            lines += [f"  {s.rung}: {s.matched}"] if s.matched else []
            lines += [f"  {s.reason}"] if s.reason else []
            lines += [f"  {s.pays}"] if s.pays else []
            if s.cost is not None:
                lines += [f"  {name:<15} {value}" for name, value in s.cost.items()]
            if s.copy_tokens is not None:
                pays = f"{s.copy_tokens}/({s.top_k}*(imbalance - 1))"
                lines.append(f"  {'copy_tokens':<15} {s.copy_tokens}: a copy pays from {pays} tokens a rank on (H100 rates, training)")
        lines.append(
            f"\nExpert parameters inside rewritten graphs: {self.rewritten_parameters:,} of {self.expert_parameters:,}."
        )
        lines += self.parts
        lines += [f"Graph break: {reason}" for reason in self.graph_breaks]
        lines.append("T tokens, R ranks, S redundant experts per rank.")
        return "\n".join(lines)


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    snapshots: bool = False,
    expect_moe_sites: int | None = None,
) -> Explanation:
    """Compile a model's forward once, with every MoE layer rewritten, and report.

    For one rank; layers that are divided over processes for those, and then every one of them must call this.

    Args:
        inputs: keyword arguments (mapping) or positional arguments of one forward.
        snapshots: keep the text of the graph after every pass.
        expect_moe_sites: raise SiteCountError unless so many layers are rewritten; for continuous integration.
    """
    need_model(model, "explain")
    check_site_count(expect_moe_sites)
    args, kwargs = as_call(inputs)
    findings = prepare_call(model, *args, **kwargs)
    rewrites: list[Rewrite] = []
    runs: list[Rewrite] = []
    places: dict[str, str] = {}
    owned: dict[int, set[str]] = {}
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        refused = refused_inputs(gm, example_inputs)
        rewrite = Rewrite(Options(redundant_experts=0), refused=refused, snapshots=[] if snapshots else None)
        rewrites.append(rewrite)
        places.update(_place_of_break(gm))
        given = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
        run = run_passes(gm, rewrite).forward
        for site in rewrite.sites:
            inputs = {given[n] for p in site.params for n in upstream(p) if isinstance(given.get(n), torch.Tensor)}
            owned[id(site)] = {names[id(t)] for t in inputs if id(t) in names}

        def counted(*arguments: Any) -> Any:
            runs.append(rewrite)  # layers may share one graph: it runs once for each of them
            return run(*arguments)

        return counted

    torch._dynamo.reset()
    breaks_before = troubles()
    compiled = torch.compile(model, backend=backend)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not any(f.inference for f in findings)):
        compiled(*args, **kwargs)
    reasons = [_first_lines(r) for r, n in troubles().items() if n > breaks_before[r]]
    reasons = [f"{r} At {places[r]}" if r in places else r for r in reasons]
    torch._dynamo.reset()
    roles = watch_roles(model, [f.path for f in findings if f.path], *args, **kwargs)
    found = _explanation(model, findings, rewrites, runs, owned, reasons, roles.names())
    found = dataclasses.replace(found, parts=describe(model, roles, kwargs))
    if expect_moe_sites is not None and found.rewritten() != expect_moe_sites:
        raise SiteCountError(
            f"expected {expect_moe_sites} MoE layers, {found.rewritten()} are rewritten.\n{found}\nMend the model by the reasons "
            "above or correct the number."
        )
    return found


def _explanation(
    model: nn.Module,
    findings: list[Finding],
    rewrites: list[Rewrite],
    runs: list[Rewrite],
    owned: dict[int, set[str]],
    breaks: list[str],
    roles: dict[str, list[str]],
) -> Explanation:
    sites: list[SiteReport] = []
    programs: dict[str, RowProgram] = {}
    sizes = {n: p.numel() for n, p in model.named_parameters(remove_duplicate=False)}  # tied layers are layers, too
    held = lambda f: sum(sizes[n] for n in f.parameters) if f.rung == "lifted" else 0  # noqa: E731
    open_findings = [f for f in findings if f.rung in ("traced", "lifted")]
    done, beside = 0, 0
    covered: set[str] = set()
    for rewrite in runs:
        for site, made in zip(rewrite.sites, rewrite.prepared.values(), strict=True):
            numbers = sum(p.meta["example_value"].numel() for p in site.params)
            finding = _finding_of(site.name, open_findings)
            name = _full_name(site.name, finding)
            own = owned.pop(id(site), set())  # what the first run of a graph was given
            if finding is None and own:  # a graph break left nothing of the modules' names
                finding = next((f for f in findings if own <= set(f.parameters)), None)
                name = finding.path if finding else name
                numbers = sum(sizes[n] for n in own - covered)
            covered |= own
            if finding is None:  # a layer that shares the graph of another
                alike = [f for f in open_findings if f.rung == "lifted" and f.experts == site.experts and held(f) >= numbers]
                finding, name = (alike[0], alike[0].path) if alike else (None, name)
            if finding in open_findings:
                open_findings.remove(finding)
                numbers = max(numbers, held(finding))  # a parameter may have parts that no expert uses
            elif finding is None:
                beside += numbers
            sites.append(_rewritten(name, site, made, finding))
            done += numbers
            programs[sites[-1].name] = made.program
    for rewrite in rewrites:
        sites += [_missed(m) for m in rewrite.misses]
    said = {s.name for s in sites}
    for finding in findings:
        if finding.rung in ("unbalanceable", "missed") and finding.path not in said:
            sites.append(_not_rewritten(finding, finding.rung, finding.reason))
    broken = f"the first graph break was: {breaks[0]}" if breaks else "the forward did not come there"
    for finding in open_findings:
        if not any(s.status == "missed" and _related(s.name, finding.path) for s in sites):
            sites.append(_not_rewritten(finding, "missed", f"its experts are in no captured graph; {broken}"))
    total = sum(sizes[n] for n in {n for f in findings for n in f.parameters})
    return Explanation(
        moe_sites=sites,
        expert_parameters=max(total + beside, done),
        rewritten_parameters=done,
        graph_breaks=breaks,
        graphs=len(rewrites),
        snapshots=[r.snapshots for r in rewrites if r.snapshots],
        programs=programs,
        roles=roles,
    )


def _finding_of(name: str, findings: list[Finding]) -> Finding | None:
    """What `prepare` found where a graph has a site. After a graph break, names in a graph are relative."""
    near = [f for f in findings if _related(name, f.path)]
    return near[0] if near else next((f for f in findings if f".{name}." in f".{f.path}."), None)


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") or not b


def _full_name(name: str, finding: Finding | None) -> str:
    if finding is None or not finding.path or _related(name, finding.path):
        return name
    at = f".{finding.path}.".find(f".{name}.")
    return finding.path[: at + len(name)]


def _rewritten(name: str, site: Site, made: ExpertSite, finding: Finding | None) -> SiteReport:
    program, facts = made.program, made.program.signature
    row_bytes = facts.rows.elements * facts.rows.dtype.itemsize
    cost = layer_cost(
        experts=site.experts,
        top_k=site.top_k,
        flops_per_row=program.flops_per_row,
        row_bytes=row_bytes,
        out_bytes=program.out_bytes_per_row,
        kept_bytes=program.kept_bytes_per_row,
        expert_bytes=sum(p.elements * p.dtype.itemsize for p in facts.params),
    )
    layer = Layer(site.top_k, row_bytes, program.flops_per_row, int(cost.replica_bytes), int(cost.replica_bytes))
    rung = finding.rung if finding else "traced"
    proof = "row function proven on permuted, padded and poisoned rows"
    matched = finding.reason if finding and rung == "lifted" else f"goes by expert ids {site.ids.name} to {site.anchors[0].name}"
    gating = finding.gating if finding and site.gating in ("unknown", "given") else site.gating
    return SiteReport(
        name, "rewritten", site.experts, site.top_k, gating, proof, site.source, cost, rung, matched,
        copy_tokens(layer, Rates()) if program.flops_per_row else None,
        _pays(made, site.top_k),
    )  # fmt: skip


def _pays(made: ExpertSite, top_k: int) -> str:
    """The threshold for the layer's own ranks, or for as many as divide the experts, up to 8, with the default number of slots."""
    ranks = made.layout.ranks if made.group else max(r for r in range(1, 9) if made.layout.experts % r == 0)
    layout = ExpertLayout(made.layout.experts, ranks, min(2, made.layout.experts - made.layout.experts // ranks))
    found = [tokens_to_break_even(dataclasses.replace(made, layout=layout), top_k, training) for training in (False, True)]
    if ranks == 1:
        return ""
    serving, training = ("never" if n is None else f"from {n:,} tokens on" for n in found)
    return f"on {ranks} GPUs balancing pays {serving} in serving, {training} in training (balance_from='auto' goes by that)"


def _missed(miss: Miss) -> SiteReport:
    return SiteReport(miss.name, "missed", None, None, None, miss.reason, miss.source, rung="missed")


def _not_rewritten(finding: Finding, status: str, reason: str) -> SiteReport:
    return SiteReport(
        finding.path, status, finding.experts, finding.top_k, None, reason, finding.source, rung=finding.rung
    )


def _place_of_break(gm: fx.GraphModule) -> dict[str, str]:
    """Why a graph ended where it does, and the line of the model's source; nothing for one that is whole."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break or not why.user_stack:
        return {}
    at = why.user_stack[-1]
    return {_first_lines(str(why.reason)): f"{at.filename}:{at.lineno}, in {at.name}: {at.line}"}


def _first_lines(reason: str) -> str:
    return " ".join(line.strip() for line in reason.strip().splitlines()[:2])


def dumps(explanation: Explanation) -> str:
    """The JSON text of an explanation."""
    return json.dumps(explanation.to_json(), indent=2)
