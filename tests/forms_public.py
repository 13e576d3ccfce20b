"""MoE layers in further forms that public training code has, written anew: loops of other orders, other ways to sort, pad and sum.

Like those of `forms`, every module takes {"x": [2, 16, 32]} and returns a tensor, or a tuple that starts with one.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.forms import EXPERTS, FFN, TOP_K, WIDTH, Layer, Router, Swiglu, sequential


class ChoiceByChoice(Layer):
    """A loop over the choices, and in it one over the experts: every expert is called once for each choice."""

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for k in range(TOP_K):
            for e, expert in enumerate(self.experts):
                mine = ids[:, k] == e
                if mine.any():
                    out[mine] += w[mine, k, None] * expert(h[mine])
        return out


class TokenByToken(Layer):
    """A loop over the tokens, as in readings for learners."""

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for t in range(h.shape[0]):
            for k in range(TOP_K):
                out[t] += w[t, k] * self.experts[ids[t, k].item()](h[t : t + 1])[0]
        return out


class TokensStacked(Layer):
    """A loop over the tokens whose rows are stacked at last."""

    def mix(self, h):
        w, ids = self.router(h)
        rows = []
        for token, weights, chosen in zip(h, w, ids, strict=True):
            rows.append(sum(p * self.experts[int(e)](token[None]).squeeze(0) for p, e in zip(weights, chosen, strict=True)))
        return torch.stack(rows)


class PairsByMask(Layer):
    """Every token repeated for each choice; an expert fills in its rows, and the choices are summed."""

    def mix(self, h):
        w, ids = self.router(h)
        flat, rows = ids.view(-1), h.repeat_interleave(TOP_K, dim=0)
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rows[flat == e])
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(1)


class ScatterReduced(PairsByMask):
    """Another way without gradients in eval: sorted pairs, ends of groups on the host, rows added where they came from."""

    def mix(self, h):
        return super().mix(h) if self.training else self.infer(h)

    @torch.no_grad()
    def infer(self, h):
        w, ids = self.router(h)
        flat, cache = ids.view(-1), torch.zeros_like(h)
        order = flat.argsort()
        ends = flat.bincount(minlength=EXPERTS).cpu().numpy().cumsum(0)
        token = order // TOP_K
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            rows = token[start:end]
            y = self.experts[e](h[rows]) * w.view(-1, 1)[order[start:end]]
            cache.scatter_reduce_(0, rows.view(-1, 1).repeat(1, WIDTH), y, reduce="sum")
        return cache


class SplitBySizes(Layer):
    """Sorted rows split at sizes that Python reads, all outputs in one list."""

    def mix(self, h):
        w, ids = self.router(h)
        order = ids.flatten().argsort(stable=True)
        sizes = ids.flatten().bincount(minlength=EXPERTS).tolist()
        parts = torch.split(h.repeat_interleave(TOP_K, 0)[order], sizes)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y[order.argsort()].reshape(-1, TOP_K, WIDTH)
        return torch.einsum("tkd,tk->td", y, w)


class MaskedSoftmax(nn.Module):
    """Logits of all but the best are minus infinity before the softmax; noise while training; tokens stay in batches."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.noise = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(sequential() for _ in range(EXPERTS))

    def forward(self, x):
        logits = self.gate(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        best, ids = logits.topk(TOP_K, dim=-1)
        probs = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(-1)
        out, flat, gates = torch.zeros_like(x), x.view(-1, WIDTH), probs.view(-1, EXPERTS)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            rows = mask.view(-1)
            if rows.any():
                out[mask] += expert(flat[rows]) * gates[rows, e].unsqueeze(1)
        return out


class Dispatcher(Layer):
    """Non-zero gates sorted by expert, rows split and put together again, weighted in the end; a measure of the load beside."""

    def forward(self, x):
        h = x.reshape(-1, WIDTH)
        w, ids = self.router(h)
        gates = h.new_zeros(h.shape[0], EXPERTS).scatter(1, ids, w)
        pairs, order = gates.nonzero().sort(0)
        token = gates.nonzero()[order[:, 1], 0]
        sizes = (gates > 0).sum(0).tolist()
        chosen = gates[token].gather(1, pairs[:, 1:])
        parts = h[token].split(sizes)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)]) * chosen
        importance, load = gates.sum(0), (gates > 0).sum(0).float()
        loss = importance.var() / (importance.mean() ** 2) + load.var() / (load.mean() ** 2)
        return torch.zeros_like(h).index_add(0, token, y).view_as(x), loss


class CapacityBuffer(Layer):
    """Rows put into a buffer [experts x capacity], places beyond it dropped; products of stacked weights; rows taken back."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        capacity = h.shape[0] * TOP_K // EXPERTS
        hot = F.one_hot(ids.t().flatten(), EXPERTS)
        place = ((hot.cumsum(0) - 1) * hot).sum(1)
        keep = place < capacity
        at = ids.t().flatten() * capacity + place.clamp(max=capacity - 1)
        rows = h.repeat(TOP_K, 1) * keep[:, None]
        buffer = h.new_zeros(EXPERTS * capacity, WIDTH).index_add(0, at, rows)
        y = F.gelu(buffer.view(EXPERTS, capacity, WIDTH) @ self.up) @ self.down
        y = y.view(-1, WIDTH)[at] * (w.t().flatten() * keep)[:, None]
        return y.view(TOP_K, -1, WIDTH).sum(0)


class PaddedToLongest(Layer):
    """Groups padded to the longest, one batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        sizes = flat.bincount(minlength=EXPERTS)
        longest = int(sizes.max())
        place = torch.arange(flat.numel()) - (sizes.cumsum(0) - sizes)[flat[order]]
        padded = h.new_zeros(EXPERTS, longest, WIDTH)
        padded[flat[order], place] = h[order // TOP_K]
        y = torch.bmm(F.relu(torch.bmm(padded, self.up)), self.down)[flat[order], place]
        return torch.zeros_like(h).index_add(0, order // TOP_K, y * w.flatten()[order, None])


class DenseSummed(Layer):
    """Every expert computes every token, one after the other; gates of those not chosen are zero."""

    def mix(self, h):
        w, ids = self.router(h)
        gates = h.new_zeros(h.shape[0], EXPERTS).scatter(1, ids, w)
        out = 0
        for e, expert in enumerate(self.experts):
            out = out + gates[:, e : e + 1] * expert(h)
        return out


class StraightThrough(Layer):
    """A hard sample with the gradient of a soft one; every expert computes every token."""

    def mix(self, h):
        gates = F.gumbel_softmax(self.router.proj(h), hard=True, dim=-1)
        y = torch.stack([expert(h) for expert in self.experts], dim=-1)
        return (y @ gates.unsqueeze(-1)).squeeze(-1)


class Thresholded(Layer):
    """As many experts as it takes to come to half of the probability, and one more."""

    def mix(self, h):
        probs = self.router.proj(h).softmax(-1)
        best, ids = probs.sort(-1, descending=True)
        keep = (best.cumsum(-1) - best) < 0.5
        gates = torch.zeros_like(probs).scatter(-1, ids, best * keep)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token = gates[:, e].nonzero().squeeze(-1)
            out = out.index_add(0, token, expert(h[token]) * gates[token, e, None])
        return out


class PerSample(nn.Module):
    """One expert for each sample, by the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Swiglu() for _ in range(EXPERTS))

    def forward(self, x):
        w, ids = self.gate(x.mean(1)).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            if mine.any():
                out[mine] = expert(x[mine]) * w[mine, None, None]
        return x + out


class LowRankBeside(Layer):
    """A frozen layer, and beside it the best of several low-rank changes for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(WIDTH, 4, bias=False) for _ in range(EXPERTS))
        self.up = nn.ModuleList(nn.Linear(4, WIDTH, bias=False) for _ in range(EXPERTS))
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        out = self.base(h)
        for e in range(EXPERTS):
            token, choice = torch.where(ids == e)
            out = out.index_add(0, token, self.up[e](self.down[e](h[token])) * w[token, choice, None])
        return out


class RetrievedRows(Layer):
    """Very many experts of one neuron each, whose weights are rows of two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2 * 8, bias=False)
        self.down, self.up = nn.Embedding(64, WIDTH), nn.Embedding(64, WIDTH)
        del self.experts

    def mix(self, h):
        (a, b), (i, j) = (torch.stack(parts) for parts in zip(*(s.topk(TOP_K, -1) for s in self.router(h).chunk(2, -1)), strict=True))
        scores, ids = (a[:, :, None] + b[:, None]).flatten(1), (i[:, :, None] * 8 + j[:, None]).flatten(1)
        scores, best = scores.topk(TOP_K, -1)
        ids = ids.gather(1, best)
        inner = F.gelu(torch.einsum("td,tkd->tk", h, self.down(ids))) * scores.softmax(-1)
        return torch.einsum("tk,tkd->td", inner, self.up(ids))


class RowsByParameter(Layer):
    """The same with parameters instead of embeddings, another parameter beside, a sum instead of an einsum, one table of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 64, bias=False)
        self.rows_in, self.rows_out = (nn.Parameter(torch.randn(64, WIDTH)) for _ in range(2))
        self.before = nn.Parameter(torch.eye(WIDTH))
        del self.experts

    def mix(self, h):
        scores, ids = self.router(h).sigmoid().topk(TOP_K, -1)
        h = h @ self.before
        inner = F.relu((self.rows_in[ids] * h.unsqueeze(1)).sum(-1) / math.sqrt(WIDTH)) * scores
        return (inner.unsqueeze(1) @ self.rows_out.index_select(0, ids.flatten()).unflatten(0, ids.shape)).squeeze(1)


class NullExperts(Layer):
    """Among the choices: experts, the token itself, nothing, and a learned constant."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(EXPERTS + 2)
        self.experts = nn.ModuleList([*(Swiglu() for _ in range(EXPERTS)), nn.Identity(), nn.Identity()])

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class LossFreeBias(Layer):
    """A bias moved by the load in every forward of training; sigmoid scores."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("load", torch.zeros(EXPERTS))

    def mix(self, h):
        scores = self.router.proj(h).sigmoid()
        ids = (scores + self.bias).topk(TOP_K, -1).indices
        w = scores.gather(1, ids)
        w = w / w.sum(-1, keepdim=True)
        if self.training:
            with torch.no_grad():
                load = ids.flatten().bincount(minlength=EXPERTS).float()
                self.load += load
                self.bias += 0.01 * (load.mean() - load).sign()
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class GivenRouting(nn.Module):
    """Logits come as an argument, from a router that the layer above holds."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Swiglu() for _ in range(EXPERTS))

        def forward(self, x: Tensor, logits: Tensor) -> Tensor:
            w, ids = logits.topk(TOP_K, -1)
            w, out = w.softmax(-1), torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                b, t, k = torch.where(ids == e)
                out[b, t] += expert(x[b, t]) * w[b, t, k, None]
            return out

    def __init__(self) -> None:
        super().__init__()
        self.router, self.inner = nn.Linear(WIDTH, EXPERTS), self.Inner()

    def forward(self, x):
        return self.inner(x, self.router(x))


class UniqueLoop(Layer):
    """Groups of one expert after the other, found by their changes."""

    def mix(self, h):
        w, ids = self.router(h)
        flat, order = ids.flatten().sort()
        hit, sizes = flat.unique_consecutive(return_counts=True)
        parts = []
        for e, rows in zip(hit.tolist(), order.split(sizes.tolist()), strict=True):
            parts.append(self.experts[e](h[rows // TOP_K]) * w.flatten()[rows, None])
        return torch.zeros_like(h).index_add(0, order // TOP_K, torch.cat(parts))


class SearchSorted(Layer):
    """Where each group begins, by a search in the sorted ids."""

    def mix(self, h):
        w, ids = self.router(h)
        flat, order = ids.flatten().sort(stable=True)
        bounds = torch.searchsorted(flat, torch.arange(EXPERTS + 1))
        out = h.new_zeros(flat.numel(), WIDTH)
        for e in range(EXPERTS):
            rows = order[bounds[e] : bounds[e + 1]]
            out[rows] = self.experts[e](h[rows // TOP_K])
        return (out.view(-1, TOP_K, WIDTH) * w[..., None]).sum(1)


class HashRouted(nn.Module):
    """By a hash of the token's number in the vocabulary, given beside its state."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Swiglu() for _ in range(EXPERTS))

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            ids, h = (tokens * 31 % 17 % EXPERTS).view(-1), x.view(-1, WIDTH)
            out = torch.zeros_like(h)
            for e, expert in enumerate(self.experts):
                at = (ids == e).nonzero().squeeze(1)
                out[at] = expert(h[at])
            return out.view_as(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return x + self.inner(x, (x[..., 0].detach() * 1000).long().abs())


class HeadsRouted(nn.Module):
    """Attention whose heads are chosen for each token; heads of all tokens are computed, those not chosen count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 4)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 4, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        w, ids = self.gate(x).softmax(-1).topk(TOP_K, -1)
        gates = torch.zeros_like(self.gate(x)).scatter(-1, ids, w)
        return self.out((y * gates[..., None]).flatten(2))


class ManyGates(nn.Module):
    """One mixture of all experts for every task, as recommenders have."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(sequential() for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, EXPERTS) for _ in range(2))
        self.towers = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))

    def forward(self, x):
        y = torch.stack([expert(x) for expert in self.experts], -2)
        mixed = [(gate(x).softmax(-1)[..., None] * y).sum(-2) for gate in self.gates]
        return torch.cat([tower(m) for tower, m in zip(self.towers, mixed, strict=True)], -1)


class SharedAndOwn(nn.Module):
    """Experts of each task and shared ones, each task's mixture over both, in levels: as recommenders have them, too."""

    def __init__(self, own: int = 2, shared: int = 2) -> None:
        super().__init__()
        tasks, levels, many = range(2), range(2), nn.ModuleList
        gate = lambda n: nn.Linear(WIDTH, n, bias=False)  # noqa: E731
        self.own = many(many(many(sequential() for _ in range(own)) for _ in tasks) for _ in levels)
        self.shared = many(many(sequential() for _ in range(shared)) for _ in levels)
        self.own_gates = many(many(gate(own + shared) for _ in tasks) for _ in levels)
        self.shared_gates = many(gate(len(tasks) * own + shared) for _ in levels)
        self.towers = many(nn.Linear(WIDTH, 1) for _ in tasks)

    def forward(self, x):
        *tasks, common = [x.flatten(0, 1)] * (len(self.towers) + 1)
        mix = lambda gate, h, ys: (gate(h).softmax(1).unsqueeze(1) @ torch.stack(ys, 1)).squeeze(1)  # noqa: E731
        levels: Any = zip(self.own, self.shared, self.own_gates, self.shared_gates, strict=True)  # lists of lists of modules
        for own, shared, gates, gate in levels:
            ys = [[expert(h) for expert in experts] for experts, h in zip(own, tasks, strict=True)]
            both = [expert(common) for expert in shared]
            tasks = [mix(g, h, y + both) for g, h, y in zip(gates, tasks, ys, strict=True)]
            common = mix(gate, common, [*itertools.chain(*ys), *both])
        return torch.cat([tower(h) for tower, h in zip(self.towers, tasks, strict=True)], -1)


class TwoMemories(nn.Module):
    """Two tables of values, summed by the scores that chose their rows: no product of a row with the token."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(WIDTH, 64, bias=False)
        self.first, self.second = nn.Embedding(64, WIDTH), nn.Embedding(64, WIDTH)

    def forward(self, x):
        scores, ids = self.keys(x).topk(TOP_K, -1)
        rows = self.first(ids) + F.silu(self.second(ids))
        return x + (rows * scores.softmax(-1)[..., None]).sum(-2)


class TwoCodebooks(nn.Module):
    """The nearest code of one table by the token, how near it is, and the code of the same number in another table."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.decoded = nn.Embedding(16, WIDTH), nn.Embedding(16, WIDTH)

    def forward(self, x):
        nearest = torch.cdist(x.flatten(0, 1), self.codes.weight).argmin(-1).view(x.shape[:-1])
        code = self.codes(nearest)
        return x + (code - x).detach() + self.decoded(nearest), -(code * x).sum(-1).mean()


class GivenTables(nn.Module):
    """Two tables of embeddings of one size: of tokens and of places; the token's is multiplied with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, WIDTH), nn.Embedding(16, WIDTH)

    def forward(self, x):
        at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:-1])
        return x * (self.tokens(at) * x).sum(-1, keepdim=True) + self.places(at)


class FixedBranches(nn.Module):
    """Like branches of a layer, summed by learned numbers and passed through gates of every channel: nothing chosen by token."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(sequential() for _ in range(3))
        self.mix = nn.Parameter(torch.randn(2))
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        a, b, c = (branch(x) for branch in self.branches)
        return x + self.mix[0] * a + self.mix[1] * b + self.gate(x).sigmoid() * c


class TwoStreams(nn.Module):
    """Experts that read a token's state and its condition."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.down(F.silu(self.up(x + self.shift(c))))

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList(self.Expert() for _ in range(EXPERTS))

    def forward(self, x):
        h = x.reshape(-1, WIDTH)
        c = h.roll(1, -1).tanh()
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token], c[token]) * w[token, choice, None])
        return out.view_as(x)


class DifferentSizes(Layer):
    """Experts of different widths inside."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8 * (e + 1)), nn.GELU(), nn.Linear(8 * (e + 1), WIDTH)) for e in range(EXPERTS)
        )

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class Convolutions(nn.Module):
    """Images, one convolution for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(EXPERTS))

    def forward(self, x):
        w, ids = self.gate(x.mean(1)).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            if mine.any():
                out[mine] = expert(x[mine].transpose(1, 2)).transpose(1, 2) * w[mine, None, None]
        return x + out


class BatchNormed(Layer):
    """Experts with batch norm: what a row becomes depends on the rows that came along."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, FFN), nn.BatchNorm1d(FFN), nn.ReLU(), nn.Linear(FFN, WIDTH)) for _ in range(EXPERTS)
        )

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            if len(token) > 1:
                out.index_add_(0, token, expert(h[token]) * w[token, choice, None])
        return out


class SkippingPadding(Layer):
    """Tokens of padding are taken out before routing, and stay as they are."""

    def mix(self, h):
        out = torch.zeros_like(h)
        real = (h[:, 0] > -1.0).nonzero().squeeze(1)
        rows = h[real]
        w, ids = self.router(rows)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y.index_add_(0, token, expert(rows[token]) * w[token, choice, None])
        return out.index_copy(0, real, y)


class NormsInside(Layer):
    """Experts with norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), Swiglu(), nn.LayerNorm(WIDTH)) for _ in range(EXPERTS))

    def mix(self, h):
        w, ids = self.router(h)
        out = h.new_zeros(h.shape)
        for e, expert in enumerate(self.experts):
            hit = torch.nonzero(ids.eq(e), as_tuple=False)
            if hit.numel():
                out = out.index_put((hit[:, 0],), expert(h.index_select(0, hit[:, 0])) * w[hit[:, 0], hit[:, 1]].unsqueeze(-1), accumulate=True)
        return out / math.sqrt(TOP_K)


class WhereMask(Layer):
    """Every expert computes every token; a mask says whose result stays."""

    def mix(self, h):
        w, ids = self.router.proj(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            out = torch.where((ids == e)[:, None], expert(h), out)
        return out * w[:, None]


class GatheredStack(Layer):
    """Every expert computes every token; the chosen results are gathered."""

    def mix(self, h):
        w, ids = self.router(h)
        y = torch.stack([expert(h) for expert in self.experts], 1)
        picked = y.gather(1, ids[..., None].expand(-1, -1, WIDTH))
        return (picked * w[..., None]).sum(1)


class ExpertChoiceGathered(Layer):
    """Experts choose tokens; one product of stacked weights, rows scattered back."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, WIDTH) * 0.2)
        del self.experts

    def mix(self, h):
        scores = self.router.proj(h).softmax(-1)
        w, token = scores.topk(h.shape[0] // 2, 0)
        y = torch.bmm(F.relu(torch.bmm(h[token.t()], self.up)), self.down) * w.t()[..., None]
        return torch.zeros_like(h).index_add(0, token.t().flatten(), y.flatten(0, 1))


class FlatIndex(Layer):
    """Rows gathered by the token of each sorted pair, products of stacked weights group by group, weights before the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.ParameterList(nn.Parameter(torch.randn(FFN, WIDTH) * 0.2) for _ in range(EXPERTS))
        self.w2 = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, FFN) * 0.2) for _ in range(EXPERTS))
        del self.experts

    def mix(self, h):
        w, ids = self.router(h)
        out = torch.zeros_like(h)
        for e in range(EXPERTS):
            token, choice = torch.where(ids == e)
            rows = h[token] * w[token, choice, None]
            out.index_add_(0, token, F.relu(rows @ self.w1[e].t()) @ self.w2[e].t())
        return out


LIFTED: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        ChoiceByChoice, TokenByToken, TokensStacked, PairsByMask, ScatterReduced, SplitBySizes, MaskedSoftmax, Dispatcher,
        CapacityBuffer, PaddedToLongest, DenseSummed, Thresholded, PerSample, LowRankBeside, NullExperts, LossFreeBias,
        GivenRouting, UniqueLoop, SearchSorted, HashRouted, NormsInside, WhereMask, GatheredStack, FlatIndex,
    )
}  # fmt: skip
UNBALANCEABLE: dict[str, type[nn.Module]] = {k.__name__: k for k in (StraightThrough, ManyGates, SharedAndOwn, ExpertChoiceGathered, RetrievedRows, RowsByParameter)}
MISSED: dict[str, type[nn.Module]] = {
    k.__name__: k for k in (TwoStreams, DifferentSizes, Convolutions, BatchNormed, SkippingPadding)
}
NEGATIVES: dict[str, type[nn.Module]] = {
    k.__name__: k for k in (HeadsRouted, TwoMemories, TwoCodebooks, GivenTables, FixedBranches)
}
ALL = LIFTED | UNBALANCEABLE | MISSED | NEGATIVES


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module in train mode with inputs."""
    torch.manual_seed(seed)
    return ALL[name]().train(), {"x": torch.randn(2, 16, WIDTH)}
