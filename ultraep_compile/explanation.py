"""`explain`: what the compiler finds in a model, what it would rewrite, and why not the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ultraep_compile.config import Options
from ultraep_compile.formulas import LayerCost, layer_cost
from ultraep_compile.ops.experts import ExpertSite
from ultraep_compile.passes.lift import Miss, Site
from ultraep_compile.passes.pipeline import Rewrite, run_passes
from ultraep_compile.preparation import as_call, prepare
from ultraep_compile.sharding import stacked_experts


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
    programs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Generated row programs by site: source of forward and backward."""

    def to_json(self) -> dict[str, Any]:
        return {
            "moe_sites": [s.to_json() for s in self.moe_sites],
            "coverage": {"expert_parameters": self.expert_parameters, "rewritten": self.rewritten_parameters},
            "roles": {"encoders": [], "projectors": [], "llm": [], "generators": []},
            "graph_breaks": self.graph_breaks,
        }

    def rewritten(self) -> int:
        return sum(s.status == "rewritten" for s in self.moe_sites)

    def __str__(self) -> str:
        if not self.moe_sites:
            return f"No MoE layer found in {self.graphs} graph(s): the model compiles as with the inner backend alone."
        lines = [f"{self.rewritten()} of {len(self.moe_sites)} MoE layers are rewritten, in {self.graphs} graph(s)."]
        for s in self.moe_sites:
            sizes = f"{s.experts} experts, top-{s.top_k}, {s.gating}" if s.experts else "unknown sizes"
            lines.append(f"\n{s.name}: {s.status} ({sizes})")
            lines += [f"  {s.source}"] if s.source else []
            lines += [f"  {s.reason}"] if s.reason else []
            if s.cost is not None:
                lines += [f"  {name:<15} {value}" for name, value in s.cost.items()]
        lines.append(
            f"\nExpert parameters inside rewritten graphs: {self.rewritten_parameters:,} of {self.expert_parameters:,}."
        )
        lines += [f"Graph break: {reason}" for reason in self.graph_breaks]
        lines.append("T tokens, R ranks, S redundant experts per rank.")
        return "\n".join(lines)


def explain(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], *, snapshots: bool = False) -> Explanation:
    """Compile a model's forward once, with every MoE layer rewritten for one rank, and report.

    Args:
        inputs: keyword arguments (mapping) or positional arguments of one forward.
        snapshots: keep the text of the graph after every pass.
    """
    prepare(model, inputs)
    rewrites: list[Rewrite] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        rewrite = Rewrite(Options(ranks=1, redundant_experts=0), snapshots=[] if snapshots else None)
        rewrites.append(rewrite)
        return run_passes(gm, rewrite).forward

    torch._dynamo.reset()
    breaks_before = dict(torch._dynamo.utils.counters["graph_break"])
    args, kwargs = as_call(inputs)
    compiled = torch.compile(model, backend=backend)
    compiled(*args, **kwargs)
    breaks = torch._dynamo.utils.counters["graph_break"]
    reasons = [_first_lines(r) for r, n in breaks.items() if n > breaks_before.get(r, 0)]
    torch._dynamo.reset()
    return _explanation(model, rewrites, reasons)


def _explanation(model: nn.Module, rewrites: list[Rewrite], breaks: list[str]) -> Explanation:
    sites: list[SiteReport] = []
    programs: dict[str, tuple[str, str]] = {}
    done = 0
    for rewrite in rewrites:
        for site, made in zip(rewrite.sites, rewrite.prepared.values(), strict=True):
            sites.append(_rewritten(site, made))
            done += sum(p.meta["example_value"].numel() for p in site.params)
            programs[site.name] = (made.program.forward_module.code, made.program.backward_module.code)
        sites += [_missed(m) for m in rewrite.misses]
    structural = list(stacked_experts(model))
    total = sum(module._parameters[n].numel() for _, module, _, names in structural for n in names)  # pyright: ignore
    sites += _lost_to_graph_breaks(structural, sites, breaks)
    return Explanation(
        moe_sites=sites,
        expert_parameters=max(total, done),
        rewritten_parameters=done,
        graph_breaks=breaks,
        graphs=len(rewrites),
        snapshots=[r.snapshots for r in rewrites if r.snapshots],
        programs=programs,
    )


def _rewritten(site: Site, made: ExpertSite) -> SiteReport:
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
    proof = "row function proven on permuted, padded and poisoned rows"
    return SiteReport(site.name, "rewritten", site.experts, site.top_k, site.gating, proof, site.source, cost)


def _missed(miss: Miss) -> SiteReport:
    return SiteReport(miss.name, "missed", None, None, None, miss.reason, miss.source)


def _lost_to_graph_breaks(structural: list, sites: list[SiteReport], breaks: list[str]) -> list[SiteReport]:
    """Stacked experts that no captured graph shows, if the capture was broken."""
    if not breaks:
        return []
    known = [s.name for s in sites]
    out = []
    for name, _, experts, _ in structural:
        if not any(name == k or name.startswith(k + ".") or k.startswith(name + ".") for k in known):
            reason = f"its experts are in no captured graph; the first graph break was: {breaks[0]}"
            out.append(SiteReport(name, "missed", experts, None, None, reason))
    return out


def _first_lines(reason: str) -> str:
    return " ".join(line.strip() for line in reason.strip().splitlines()[:2])


def dumps(explanation: Explanation) -> str:
    """The JSON text of an explanation."""
    return json.dumps(explanation.to_json(), indent=2)
