"""MoE layers in the forms found in the wild that no compiler sees through, written by hand; and what only looks like one.

Every module takes {"x": [2, 16, 32]} and returns a tensor, or a tuple that starts with one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, EXPERTS, TOP_K, FFN = 32, 4, 2, 24


class Swiglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def sequential(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, FFN), nn.GELU(), nn.Linear(FFN, WIDTH), nn.Dropout(dropout))


class Router(nn.Module):
    def __init__(self, choices: int = EXPERTS) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, choices, bias=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.proj(h).softmax(-1).topk(TOP_K, -1)
        return w / w.sum(-1, keepdim=True), ids


class Layer(nn.Module):
    """Tokens flattened, a residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList(Swiglu() for _ in range(EXPERTS))

    def mix(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.reshape(-1, WIDTH)).view_as(x)


class LoopOverHit(Layer):
    """Only experts that were hit, as the data says."""

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        mask = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for expert in mask.sum((-1, -2)).nonzero():
            choice, token = torch.where(mask[expert[0]])
            y = self.experts[int(expert[0])](h[token]) * w[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LoopWithGaps(Layer):
    """All experts in turn, the router written out in the same forward, logits returned beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(sequential() for _ in range(EXPERTS))
        del self.router

    def forward(self, x):
        h = x.view(-1, WIDTH)
        logits = self.gate(h)
        w, ids = torch.topk(logits, TOP_K, dim=-1)
        w = w.softmax(-1, dtype=torch.float).to(h.dtype)
        out = torch.zeros(h.shape[0], WIDTH, dtype=h.dtype)
        mask = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            choice, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            out.index_add_(0, token, self.experts[e](h[None, token].reshape(-1, WIDTH)) * w[token, choice, None])
        return out.reshape(x.shape), logits


class LoopByMask(Layer):
    """Boolean masks, results added in place."""

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            if mine.any():
                out[mine] += expert(h[mine]) * (w * (ids == e)).sum(-1)[mine].unsqueeze(-1)
        return out


class LoopSorted(Layer):
    """Rows sorted by expert and cut by counts that Python reads, as inference code does."""

    def mix(self, h):
        w, ids = self.router(h)
        counts = torch.bincount(ids.view(-1), minlength=EXPERTS).tolist()
        order = ids.view(-1).argsort()
        rows, outs, start = h[order // TOP_K], [], 0
        for e, n in enumerate(counts):
            if n:
                outs.append(self.experts[e](rows[start : start + n]))
            start += n
        back = torch.empty(h.shape[0] * TOP_K, WIDTH, dtype=h.dtype)
        back[order] = torch.cat(outs)
        return (back.view(-1, TOP_K, WIDTH) * w.unsqueeze(-1)).sum(1)


class LoopStacked(Layer):
    """Stacked weights, transposed and interleaved, with biases, read one expert at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * FFN) * 0.2)
        self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e in ids.unique().tolist():
            token, choice = (ids == e).nonzero(as_tuple=True)
            a = h[token] @ self.gate_up[e] + self.gate_up_bias[e]
            a = (a[..., ::2].clamp(max=2.0).sigmoid() * a[..., 1::2]) @ self.down[e].t()
            out.index_add_(0, token, a * w[token, choice, None])
        return out


class FlatWeights(Layer):
    """Weights of all experts in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS * FFN, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS * FFN, WIDTH) * 0.2)
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        up, down = (p.chunk(EXPERTS) for p in (self.up, self.down))
        for e in range(EXPERTS):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, F.relu(h[token] @ up[e].T) @ down[e] * w[token, choice, None])
        return out


class SwitchCapacity(Layer):
    """Top-1, experts in a dict, tokens beyond an expert's capacity go to none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleDict({f"expert_{e}": sequential() for e in range(EXPERTS)})

    def mix(self, h):
        w, ids = self.router(h).softmax(-1).max(-1)
        hot = F.one_hot(ids, EXPERTS)
        hot = hot * (hot.cumsum(0) <= 6)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts.values()):
            token = hot[:, e].nonzero().squeeze(-1)
            out[token] = expert(h[token])
        return out * w[:, None]


class CapacityEinsum(nn.Module):
    """Dispatch and combine tensors [batch, tokens, experts, capacity]; second choices dropped at random when training."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
        self.b1 = nn.Parameter(torch.randn(EXPERTS, 1, FFN) * 0.2)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)

    def capacity(self, length: int) -> int:
        return max(4, length * 3 // (2 * EXPERTS))

    def combine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.gate(x).softmax(-1)
        capacity = self.capacity(x.shape[1])
        first = F.one_hot(gates.argmax(-1), EXPERTS).to(x.dtype)
        second = F.one_hot((gates * (1 - first)).argmax(-1), EXPERTS).to(x.dtype)
        if self.training:
            keep = torch.rand_like(gates[..., :1]) < 2 * (gates * second).sum(-1, keepdim=True)
            second = second * keep
        places = [first.cumsum(1) * first, (second.cumsum(1) + first.sum(1, keepdim=True)) * second]
        parts = []
        for mask, place in zip((first, second), places, strict=True):
            mask = mask * (place <= capacity)
            slot = F.one_hot((place.sum(-1).long() - 1).clamp(0, capacity - 1), capacity).to(x.dtype)
            parts.append((gates * mask)[..., None] * slot[..., None, :])
        return parts[0] + parts[1], (first.mean(1) * gates.mean(1)).mean()

    def forward(self, x):
        combine, loss = self.combine(x)
        rows = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(x.dtype))
        shape = rows.shape
        a = F.relu(torch.einsum("end,edh->enh", rows.reshape(EXPERTS, -1, WIDTH), self.w1) + self.b1)
        y = torch.einsum("enh,ehd->end", a, self.w2).reshape(shape)
        return torch.einsum("ebcd,bnec->bnd", y, combine), loss


class DenseScaled(Layer):
    """Every expert computes every token, scaled by a score that is zero for those not chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)
        self.shared = Swiglu()
        del self.experts

    def mix(self, h):
        logits = self.router(h)
        best, ids = logits.topk(1, -1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, best).sigmoid()
        rows = h.repeat(EXPERTS, 1) * scores.t().reshape(-1, 1)
        gate, up = torch.bmm(rows.view(EXPERTS, -1, WIDTH), self.up).chunk(2, dim=-1)
        y = torch.bmm(up * F.silu(gate), self.down)
        out = self.shared(h)
        out.add_(y.sum(0))
        return out


class DenseGated(Layer):
    """Every expert computes every token; all but the chosen ones are weighted with zero."""

    def mix(self, h):
        w, ids = self.router(h)
        gates = torch.zeros(h.shape[0], EXPERTS, dtype=w.dtype).scatter(1, ids, w)
        y = torch.stack([expert(h) for expert in self.experts], dim=1)
        return torch.einsum("te,ted->td", gates, y)


class WideRouter(LoopOverHit):
    """Choices beyond the experts are skips."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(EXPERTS + 3)

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class IdentityBeyond(LoopStacked):
    """Choices beyond the experts give the token itself; one parameter has parts for them that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(EXPERTS + 2)
        self.up = nn.Parameter(torch.randn(EXPERTS + 2, FFN, WIDTH) * 0.2)
        del self.gate_up, self.gate_up_bias

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e in ids.unique().tolist():
            token, choice = (ids == e).nonzero(as_tuple=True)
            y = h[token] if e >= EXPERTS else F.linear(F.silu(F.linear(h[token], self.up[e])), self.down[e])
            out.index_add_(0, token, y * w[token, choice, None])
        return out


class IdentityInTurn(IdentityBeyond):
    """The same in a loop over all choices, whether chosen or not."""

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e in range(EXPERTS + 2):
            token, choice = torch.where(ids == e)
            y = h[token] if e >= EXPERTS else F.linear(F.silu(F.linear(h[token], self.up[e])), self.down[e])
            out.index_add_(0, token, y * w[token, choice, None])
        return out


class Twice(LoopOverHit):
    """A token may choose one expert twice, with two weights."""

    def mix(self, h):
        logits = self.router.proj(h)
        w, ids = torch.stack([logits.softmax(-1).max(-1).values, logits.sigmoid().mean(-1)], 1), logits.argmax(-1)
        ids = torch.stack([ids, (logits * torch.tensor([1.0, 1.0, 3.0, 1.0])).argmax(-1)], 1)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class ByTable(LoopOverHit):
    """No router: a table says where a token goes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(0, EXPERTS, (64,)))
        del self.router

    def mix(self, h):
        ids = self.table[(h[:, 0].detach().abs() * 16).long().clamp(max=63)]
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            if mine.any():
                out[mine] = expert(h[mine])
        return out


class PickySecond(LoopOverHit):
    """A router of two layers; the second choice counts only where it is close to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, EXPERTS))

    def mix(self, h):
        w, ids = self.router(h).softmax(-1).topk(TOP_K, -1)
        w = w * (w > 0.5 * w[:, :1])
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class Group(LoopOverHit):
    def forward(self, x):
        return self.mix(x)


class TwoLevels(Layer):
    """A router over groups, and in each group a router over its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(Group() for _ in range(2))

    def mix(self, h):
        w, group = self.router(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for g, inner in enumerate(self.experts):
            mine = group == g
            if mine.any():
                out[mine] = inner(h[mine])
        return out * w[:, None]


class GroupedEinsum(nn.Module):
    """Experts in groups, weights [groups, experts of a group, in, out]: one choice on each level, all of it in einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, EXPERTS // 2)
        self.weight = nn.Parameter(torch.randn(2, EXPERTS // 2, WIDTH, WIDTH) * 0.2)

    def forward(self, x):
        a, b = (F.one_hot(p(x).argmax(-1), p.out_features).to(x.dtype) for p in (self.outer, self.inner))
        rows = torch.einsum("btd,bto,bti->oibtd", x, a, b)
        return torch.einsum("oibtd,oide->bte", rows, self.weight)


class GroupedDense(Layer):
    """The best two experts of the best two groups; every expert computes every token, with weights that are mostly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(3, EXPERTS, WIDTH, FFN) * 0.2)
        self.bias = nn.Parameter(torch.randn(3, EXPERTS, FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(3, EXPERTS, FFN, WIDTH) * 0.2)
        del self.router, self.experts

    def gates(self, logits: Tensor) -> Tensor:
        w, ids = logits.softmax(-1).topk(2, -1)
        return torch.zeros_like(logits).scatter(-1, ids, w / w.sum(-1, keepdim=True))

    def mix(self, h):
        a = F.gelu(torch.einsum("td,gedf->tgef", h, self.up) + self.bias)
        y = torch.einsum("tgef,gefd->tged", a, self.down)
        return torch.einsum("tged,tg,te->td", y, self.gates(self.outer(h)), self.gates(self.inner(h)))


class DenseEinsum(Layer):
    """Every expert computes every token; weights, products and the sum over experts in one einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        gates = torch.zeros(h.shape[0], EXPERTS, dtype=w.dtype).scatter(1, ids, w)
        a = F.silu(torch.matmul(h, self.up))
        return torch.einsum("te,etf,efd->td", gates, a, self.down)


class GroupedBySizes(nn.Module):
    """Experts as products cut by sizes that Python has read, as in mixtures of attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = ProductsBySize(WIDTH, FFN), ProductsBySize(FFN, WIDTH)

    def forward(self, x):
        h = x.reshape(-1, WIDTH)
        w, ids = self.gate(h).topk(TOP_K, -1)
        w = w.softmax(-1)
        sizes = torch.zeros(h.shape[0], EXPERTS).scatter(1, ids, 1).long().sum(0).tolist()
        order = ids.flatten().sort(0).indices
        token = order.div(TOP_K, rounding_mode="trunc")
        y = self.down(F.gelu(self.up(h[token], sizes)), sizes) * w.flatten()[order][:, None]
        return x + torch.zeros_like(h).index_add(0, token, y).view_as(x)


class ProductsBySize(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, outer, inner) * 0.2)

    def forward(self, rows: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(rows.split(sizes, dim=0))])


class LowRank(nn.Module):
    """A frozen layer with trained factors beside it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer).requires_grad_(False)
        self.a, self.b = nn.Linear(inner, 4, bias=False), nn.Linear(4, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


class LowRankExperts(LoopOverHit):
    """Experts with low-rank factors: everything that belongs to an expert goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(LowRank(WIDTH, FFN), nn.ReLU(), LowRank(FFN, WIDTH)) for _ in range(EXPERTS)
        )


class Weighing(nn.Module):
    """Takes the routing weight and uses it in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) * w)


class WeightInside(LoopOverHit):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Weighing() for _ in range(EXPERTS))

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token], w[token, choice, None]))
        return out


class DropoutExperts(LoopOverHit):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(sequential(dropout=0.25) for _ in range(EXPERTS))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Exchange.apply(grad)


class Exchanging(nn.Module):
    """Expert-parallel by its own means: dispatch and results go through all-to-all. Needs a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(sequential() for _ in range(EXPERTS))

    def forward(self, x):
        h = x.reshape(-1, WIDTH)
        w, ids = self.gate(h).softmax(-1).max(-1)
        capacity = h.shape[0] // 2
        hot = F.one_hot(ids, EXPERTS)
        place = (hot.cumsum(0) * hot).sum(-1) - 1
        hot = hot * (place < capacity)[:, None]
        combine = (w[:, None] * hot)[..., None] * F.one_hot(place.clamp(max=capacity - 1), capacity)[:, None].to(h.dtype)
        rows = _Exchange.apply(torch.einsum("sec,sm->ecm", combine.bool().to(h.dtype), h))
        parts = [expert(part) for expert, part in zip(self.experts, rows.chunk(EXPERTS), strict=True)]
        self.aux_loss = (hot.to(h.dtype).mean(0) * w.mean()).sum()
        return torch.einsum("sec,ecm->sm", combine, _Exchange.apply(torch.cat(parts))).view_as(x)


LIFTED: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        LoopOverHit, LoopWithGaps, LoopByMask, LoopSorted, LoopStacked, FlatWeights, SwitchCapacity, CapacityEinsum,
        DenseScaled, DenseGated, WideRouter, IdentityBeyond, IdentityInTurn, Twice, ByTable, PickySecond, TwoLevels, GroupedEinsum,
        GroupedDense, DenseEinsum, GroupedBySizes, LowRankExperts,
        WeightInside, DropoutExperts, Exchanging,
    )
}  # fmt: skip
SITES = {"TwoLevels": 2, "GroupedBySizes": 2}
COUNTS = {"GroupedDense": 12}
"""Experts, where they are not `EXPERTS`."""


# ---- nothing to balance ---------------------------------------------------------------------------------------------


class SoftSlots(nn.Module):
    """Every slot of every expert is a mixture of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(EXPERTS, 4, WIDTH))
        self.experts = nn.ModuleList(sequential() for _ in range(EXPERTS))

    def forward(self, x):
        logits = torch.einsum("bnd,esd->bnes", x, self.slots)
        rows = torch.einsum("bnd,bnes->besd", x, logits.softmax(1))
        y = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], 1)
        return torch.einsum("besd,bnes->bnd", y, logits.flatten(2).softmax(-1).view_as(logits))


class SoftMixture(Layer):
    """All experts for all tokens."""

    def mix(self, h):
        gates = self.router.proj(h).softmax(-1)
        return sum(gates[:, e, None] * expert(h) for e, expert in enumerate(self.experts))


class ExpertChoice(Layer):
    """Experts choose tokens: each the same number."""

    def mix(self, h):
        scores = self.router.proj(h).softmax(-1)
        w, token = scores.t().topk(h.shape[0] // 2, -1)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            out = out.index_add(0, token[e], expert(h[token[e]]) * w[e, :, None])
        return out


UNBALANCEABLE: dict[str, type[nn.Module]] = {k.__name__: k for k in (SoftSlots, SoftMixture, ExpertChoice)}


# ---- what only looks like experts -----------------------------------------------------------------------------------


class Ensemble(Layer):
    """The mean of like modules."""

    def mix(self, h):
        return torch.stack([expert(h) for expert in self.experts]).mean(0)


class HeadsApart(Layer):
    """Like modules whose results stand side by side."""

    def mix(self, h):
        return torch.cat([expert(h)[:, : WIDTH // EXPERTS] for expert in self.experts], -1)


class BlockDiagonal(nn.Module):
    """A stacked parameter, one matrix for each part of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, WIDTH // 4, WIDTH // 4))

    def forward(self, x):
        parts = x.reshape(-1, 4, WIDTH // 4).transpose(0, 1)
        return torch.bmm(parts, self.weight).transpose(0, 1).reshape(x.shape)


class ResidualCodes(nn.Module):
    """Several codebooks, each for what the one before left."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.ParameterList(nn.Parameter(torch.randn(8, WIDTH)) for _ in range(3))
        self.project = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        rest, total = x, torch.zeros_like(x)
        for codes, project in zip(self.codes, self.project, strict=True):
            nearest = torch.cdist(project(rest).flatten(0, 1), codes).argmin(-1)
            code = codes[nearest].view_as(x)
            rest, total = rest - code, total + code
        return total


NEGATIVES: dict[str, type[nn.Module]] = {k.__name__: k for k in (Ensemble, HeadsApart, BlockDiagonal, ResidualCodes)}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module in train mode with inputs."""
    torch.manual_seed(seed)
    kind = (LIFTED | UNBALANCEABLE | NEGATIVES)[name]
    return kind().train(), {"x": torch.randn(2, 16, WIDTH)}
