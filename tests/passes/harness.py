"""Oracles for lifting: run a site's lifted function beside the nodes it stands for, and a whole model beside
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

from tests import zoo
from ultraep_compile.passes.lift import Miss, Site, find_moe_sites, replace_site


def relative_error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@dataclass
class Capture:
    """Graphs of one model, what was found in them, and the tensors that flowed."""

    graphs: list[fx.GraphModule] = field(default_factory=list)
    found: list[list[Site | Miss]] = field(default_factory=list)
    values: list[dict[fx.Node, Tensor]] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [f for each in self.found for f in each if isinstance(f, Site)]

    @property
    def misses(self) -> list[Miss]:
        return [f for each in self.found for f in each if isinstance(f, Miss)]

    def values_of(self, site: Site) -> dict[fx.Node, Tensor]:
        return next(v for v in self.values if site.hidden in v)


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted, self.seen = wanted, {}

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result.detach().clone()
        return result


def capture(model: nn.Module, inputs: dict[str, Tensor], dynamic: bool = False, record: bool = True) -> Capture:
    """Compile a model once, look for sites in every graph, and run it to record what flows through them."""
    torch._dynamo.reset()
    got = Capture()

    def backend(gm: fx.GraphModule, example_inputs):
        found = find_moe_sites(gm)
        got.graphs.append(gm)
        got.found.append(found)
        wanted = {n for f in found if isinstance(f, Site) for n in sources(f)}

        def run(*args):
            if not record or not wanted:
                return gm.forward(*args)
            recorder = _Recorder(gm, wanted)
            result = recorder.run(*args)
            got.values.append(recorder.seen)
            return result

        return run

    model(**inputs)  # transformers installs hooks on the first call
    torch.compile(model, backend=backend, dynamic=dynamic or None)(**inputs)
    return got


def sources(site: Site) -> list[fx.Node]:
    return [n for n in (site.hidden, site.ids, site.weight, *site.params, *site.consts) if n is not None]


def region_as_module(site: Site) -> fx.GraphModule:
    """The original nodes of a site as a function of its sources."""
    graph, new = fx.Graph(), {}
    for n in sources(site):
        new[n] = graph.placeholder(n.name)
    needed, todo = set(), [site.output, *site.region]
    while todo:
        n = todo.pop()
        if n not in needed and n not in new:
            needed.add(n)
            todo += n.all_input_nodes
    for n in site.output.graph.nodes:
        if n in needed:
            new[n] = graph.node_copy(n, lambda a: new[a])
    graph.output(new[site.output])
    return fx.GraphModule(nn.Module(), graph)


@dataclass
class SiteErrors:
    output: float
    gradients: float
    poisoned: bool
    """One NaN row made another row NaN, or did not reach its own."""


def run_site(site: Site, values: dict[fx.Node, Tensor], padding: int = 5, seed: int = 1) -> SiteErrors:
    """Lifted function on permuted rows with padding in between, then combine, against the original nodes."""
    torch.manual_seed(seed)
    ids = values[site.ids]
    tokens, top_k = ids.numel() // site.top_k, site.top_k
    pairs, experts = tokens * top_k, site.experts
    leaves_of = [n for n in sources(site) if n is not site.ids]

    def leaves() -> dict[fx.Node, Tensor]:
        return {n: values[n].clone().requires_grad_(values[n].is_floating_point()) for n in leaves_of}

    a, b = leaves(), leaves()
    out_a = region_as_module(site)(*[ids.clone() if n is site.ids else a[n] for n in sources(site)])
    direction = torch.randn_like(out_a)

    order = torch.randperm(pairs + padding)  # what stands where: a pair, or from `pairs` on a padded row
    real = order < pairs
    pair = order.clamp(max=pairs - 1)
    hidden = b[site.hidden]
    rows = torch.where(real[:, None], hidden[pair // top_k], torch.randn(len(order), hidden.shape[1]).to(hidden.dtype))
    row_id = torch.where(real, ids.reshape(-1)[pair], experts)
    extra = []
    if site.uses_weight:
        weight = b[site.weight].reshape(-1, 1)[pair]
        extra = [torch.where(real[:, None], weight, torch.zeros((), dtype=weight.dtype))]
    shared = [b[n] for n in (*site.params, *site.consts)]
    y = site.row_function(rows, row_id, *extra, *shared)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    weight = None if site.weight is None else b[site.weight]
    out_b = site.combine(y[back[:pairs]], weight, tokens, top_k)
    assert out_a.shape == out_b.shape and out_a.dtype == out_b.dtype

    names = [n for n in leaves_of if a[n].requires_grad]
    grads = [
        torch.autograd.grad(out, [leaf[n] for n in names], direction, allow_unused=True)
        for out, leaf in ((out_a, a), (out_b, b))
    ]
    worst = max(
        relative_error(new, old) if new is not None else float(old.norm() > 0)
        for old, new in zip(*grads, strict=True)
        if old is not None and old.norm() > 0
    )
    with torch.no_grad():
        at = int(real.nonzero()[0])
        bad = rows.clone()
        bad[at] = float("nan")
        hit = site.row_function(bad, row_id, *extra, *shared).isnan().any(1)
        poisoned = not bool(hit[at]) or bool(hit[[j for j in range(len(order)) if j != at]].any())
    return SiteErrors(relative_error(out_b, out_a), worst, poisoned)


# ---- whole models ---------------------------------------------------------------------------------------------------

_sites: dict[int, Site] = {}


def _reference_rows(hidden, ids, weight, params, consts, key):
    """Rows in the order of their experts through the lifted function, back in pair order."""
    site = _sites[key]
    flat = ids.reshape(-1)
    expert_id, order = torch.sort(flat, stable=True)
    extra = [weight.reshape(-1, 1)[order]] if site.uses_weight else []
    y = site.row_function(hidden[order // site.top_k], expert_id, *extra, *params, *consts)
    return torch.empty_like(y).index_copy(0, order, y)


@torch.library.custom_op("ultraep_test::rows", mutates_args=())
def rows_op(
    hidden: Tensor, ids: Tensor, weight: Tensor | None, params: list[Tensor], consts: list[Tensor], key: int
) -> Tensor:
    with torch.no_grad():
        return _reference_rows(hidden, ids, weight, params, consts, key).clone()


@rows_op.register_fake
def _(hidden, ids, weight, params, consts, key):
    return hidden.new_empty(ids.numel(), _sites[key].width, dtype=_sites[key].dtype)


@torch.library.custom_op("ultraep_test::rows_backward", mutates_args=())
def rows_backward_op(
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    consts: list[Tensor],
    key: int,
) -> list[Tensor]:
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for each in (keys.AutogradCPU, keys.AutogradOther, keys.ADInplaceOrView):
        excluded = excluded.remove(each)  # a custom op runs below autograd; here it is wanted
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        given = [hidden, *([] if weight is None else [weight]), *params, *consts]
        leaves = [t.detach().clone().requires_grad_() for t in given]
        rest = leaves[1:] if weight is None else leaves[2:]
        y = _reference_rows(
            leaves[0],
            ids,
            None if weight is None else leaves[1],
            rest[: len(params)],
            rest[len(params) :],
            key,
        )
        grads = torch.autograd.grad(y, leaves, grad, allow_unused=True) if y.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(grads, leaves, strict=True)]


@rows_backward_op.register_fake
def _(grad, hidden, ids, weight, params, consts, key):
    return [torch.empty_like(t) for t in (hidden, *([] if weight is None else [weight]), *params, *consts)]


def _setup(ctx, inputs, output):
    hidden, ids, weight, params, consts, ctx.key = inputs
    ctx.params, ctx.weighted = len(params), weight is not None
    ctx.save_for_backward(hidden, ids, *([] if weight is None else [weight]), *params, *consts)


def _backward(ctx, grad):
    hidden, ids, *rest = ctx.saved_tensors
    weight = rest.pop(0) if ctx.weighted else None
    params, consts = rest[: ctx.params], rest[ctx.params :]
    grads = list(rows_backward_op(grad.contiguous(), hidden, ids, weight, params, consts, ctx.key))
    d_hidden = grads.pop(0)
    d_weight = grads.pop(0) if ctx.weighted else None
    return d_hidden, None, d_weight, grads[: ctx.params], grads[ctx.params :], None


rows_op.register_autograd(_backward, setup_context=_setup)


def insert_reference_op(gm: fx.GraphModule, site: Site) -> list[fx.Node]:
    """Replace a site by one opaque op that runs the lifted function on sorted rows."""
    key = len(_sites)
    _sites[key] = site
    weight = site.weight if site.uses_weight else None

    def make_rows(graph: fx.Graph, site: Site) -> fx.Node:
        args = (site.hidden, site.ids, weight, list(site.params), list(site.consts), key)
        return graph.call_function(torch.ops.ultraep_test.rows.default, args)

    return replace_site(gm, site, make_rows)


@dataclass
class Comparison:
    loss: float
    gradient: float
    worst: str
    graphs: tuple[int, int]
    sites: int
    misses: list[str]
    stayed: int


def compare_models(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    dynamic: bool = False,
    inner: Callable = aot_eager,
    context: Callable | None = None,
) -> Comparison:
    """The model compiled with its sites replaced by the reference op, against the same without."""
    import contextlib

    context = context or contextlib.nullcontext
    found: list[Site | Miss] = []
    stayed: list[fx.Node] = []
    with context():
        model(**batches[0])

    def run(rewrite: bool):
        torch._dynamo.reset()
        graphs = 0

        def backend(gm, example_inputs):
            nonlocal graphs
            if rewrite:
                here = find_moe_sites(gm)
                found.extend(here)
                for site in here:
                    if isinstance(site, Site):
                        stayed.extend(insert_reference_op(gm, site))
                gm.graph.lint()
                gm.recompile()
            made = inner(gm, example_inputs)  # may restart Dynamo's analysis, to specialise a float
            graphs += 1
            return made

        compiled = torch.compile(model, backend=backend, dynamic=dynamic or None)
        results = []
        for batch in batches:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(7)
            with context():
                loss = zoo.loss_of(compiled(**batch))
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((loss.detach(), grads))
        return results, graphs

    plain, plain_graphs = run(False)
    ours, our_graphs = run(True)
    loss = max(abs(float(a[0] - b[0])) for a, b in zip(plain, ours, strict=True))
    errors = [
        (relative_error(b[1][k], g), k)
        for a, b in zip(plain, ours, strict=True)
        for k, g in a[1].items()
        if g.norm() > 1e-7
    ]
    gradient, worst = max(errors, default=(0.0, ""))
    sites = sum(isinstance(f, Site) for f in found)
    misses = [f.reason for f in found if isinstance(f, Miss)]
    return Comparison(loss, gradient, worst, (plain_graphs, our_graphs), sites, misses, len(stayed))


def inner_eager(gm: fx.GraphModule, example_inputs):
    return gm.forward
