"""MoE layers whose experts are divided over a process group already, in the forms of libraries for expert parallelism.

A rank makes its layer with `build(name, rank, world)`: routers and dense parts are the same on all ranks, experts are its own.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_gather_tensor_autograd,
    all_to_all_single,
    all_to_all_single_autograd,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

WIDTH, FFN, TOP_K = 32, 24, 2


class AllToAll(torch.autograd.Function):
    """Equal parts to every rank, and back in backward."""

    @staticmethod
    def forward(ctx, group, x: Tensor) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, AllToAll.apply(ctx.group, grad.contiguous())


class Exchange(torch.autograd.Function):
    """Parts of given sizes to every rank."""

    @staticmethod
    def forward(ctx, x: Tensor, receive: list[int], send: list[int]) -> Tensor:
        ctx.sizes = receive, send
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        receive, send = ctx.sizes
        return Exchange.apply(grad, send, receive), None, None


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, FFN), nn.GELU(), nn.Linear(FFN, WIDTH))


# ---- dispatch and combine tensors, with capacity --------------------------------------------------------------------


class TopTwoGate(nn.Module):
    """Dispatch and combine tensors [tokens, experts, capacity], an auxiliary loss; tokens beyond the capacity are dropped."""

    def __init__(self, experts: int, capacity_factor: float = 1.0) -> None:
        super().__init__()
        self.experts, self.capacity_factor = experts, capacity_factor
        self.wg = nn.Linear(WIDTH, experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates = self.wg(x).softmax(-1)
        capacity = int(2 * self.capacity_factor * math.ceil(len(x) / self.experts))
        first = F.one_hot(gates.argmax(-1), self.experts)
        second = F.one_hot(gates.masked_fill(first.bool(), 0.0).argmax(-1), self.experts)
        places = [first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)]
        loss = (gates.mean(0) * first.to(x.dtype).mean(0)).mean()
        first, second = (mask * (place < capacity) for mask, place in zip((first, second), places, strict=True))
        w = [(gates * mask).sum(-1) for mask in (first, second)]
        total = (w[0] + w[1]).clamp(min=1e-6)
        combine = torch.zeros(len(x), self.experts, capacity)
        for mask, place, weight in zip((first, second), places, w, strict=True):
            slot = F.one_hot((place * mask).sum(-1), capacity).to(x.dtype)
            combine = combine + torch.einsum("se,sc->sec", (weight / total)[:, None] * mask, slot)
        return loss, combine, combine.bool()


class Gshard(nn.Module):
    """As fairscale has it: einsum dispatch, all-to-all, one module for each expert of this rank, and back."""

    def __init__(self, rank: int, world: int, each: int, capacity_factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = TopTwoGate(world * each, capacity_factor)
        torch.manual_seed(100 + rank)
        self.experts = nn.ModuleList(feed_forward() for _ in range(each))
        assert dist.group.WORLD is not None
        self.group, self.world, self.each = dist.group.WORLD, world, each

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        self.l_aux, combine, dispatch = self.gate(h)
        rows = torch.einsum("sec,sm->ecm", dispatch.to(h.dtype), h)
        rows = AllToAll.apply(self.group, rows).reshape(self.world, self.each, -1, WIDTH)
        parts = [expert(chunk) for chunk, expert in zip(rows.chunk(self.each, dim=1), self.experts, strict=True)]
        y = AllToAll.apply(self.group, torch.cat(parts, dim=1)).reshape(self.world * self.each, -1, WIDTH)
        return torch.einsum("sec,ecm->sm", combine, y).view_as(x)


# ---- permuted rows, exchanged in parts of any size ------------------------------------------------------------------


class Router(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)

    def forward(self, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.gate(h).sigmoid()
        _, ids = torch.topk(scores + bias, k=TOP_K, dim=-1, sorted=False)
        w = scores.gather(-1, ids)
        counts = torch.histc(ids.view(-1).float(), bins=len(bias), min=0, max=len(bias))
        return w / w.sum(-1, keepdim=True), ids, counts


class StackedExperts(nn.Module):
    """This rank's experts, each on its own rows."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(each, FFN, WIDTH) * 0.2)
        self.w2 = nn.Parameter(torch.randn(each, WIDTH, FFN) * 0.2)
        self.w3 = nn.Parameter(torch.randn(each, FFN, WIDTH) * 0.2)

    def weights(self) -> list[Tensor]:
        return [w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3)]

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        w1, w2, w3 = self.weights()
        out = []
        for e, x in enumerate(rows.split(counts.tolist())):
            a = F.silu(x @ w1[e].transpose(-2, -1)) * (x @ w3[e].transpose(-2, -1))
            out.append(a @ w2[e].transpose(-2, -1))
        return torch.cat(out)


class GroupedExperts(StackedExperts):
    """The same by grouped products, in bf16."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        w1, w2, w3 = (w.bfloat16().transpose(-2, -1) for w in self.weights())
        x = rows.bfloat16()
        product = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
        a = F.silu(product(x, w1, offs=ends)) * product(x, w3, offs=ends)
        return product(a, w2, offs=ends).type_as(rows)


class Sorted(nn.Module):
    """Rows sorted by expert, counts exchanged, rows exchanged, sorted again by expert of this rank, and all of it back."""

    kind = StackedExperts

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.shared = Router(world * each), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("expert_bias", torch.zeros(world * each))
        self.register_buffer("tokens_per_expert", torch.zeros(world * each), persistent=False)
        torch.manual_seed(100 + rank)
        self.experts = self.kind(each)
        self.world, self.each = world, each

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        send, receive = (c.view(self.world, -1).sum(1).tolist() for c in (counts, theirs))
        arrived = Exchange.apply(rows, receive, send)
        number = torch.arange(self.each).repeat(self.world).repeat_interleave(theirs)
        order = torch.argsort(number, stable=True)
        y = self.experts(arrived[order], theirs.view(self.world, -1).sum(0))
        back = torch.empty_like(y).index_copy(0, order, y)
        return Exchange.apply(back, send, receive)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        w, ids, counts = self.router(h, self.expert_bias)
        with torch.no_grad():
            self.get_buffer("tokens_per_expert").add_(counts)
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // TOP_K
        rows = self.exchanged(h[token], counts.long())
        rows = rows * w.view(-1)[order][:, None]
        out = torch.zeros_like(h).index_add(0, token, rows)
        return (out + self.shared(h)).view_as(x)


class SortedGrouped(Sorted):
    kind = GroupedExperts


class Dispatcher:
    """Hooks that exchange the rows of an experts module."""

    def __init__(self, mesh: DeviceMesh, each: int) -> None:
        self.group, self.world, self.each = mesh.get_group(), mesh.size(), each

    def dispatch(self, module: nn.Module, args: tuple) -> tuple[Tensor, Tensor]:
        rows, counts = args
        with torch.no_grad():
            theirs = all_to_all_single(counts, None, None, group=self.group)
            theirs = torch.ops._c10d_functional.wait_tensor(theirs)
            self.send, self.receive = (c.view(self.world, -1).sum(1).tolist() for c in (counts, theirs))
        arrived = all_to_all_single_autograd(rows, self.receive, self.send, self.group)
        number = torch.arange(self.each).repeat(self.world).repeat_interleave(theirs)
        self.order = torch.argsort(number, stable=True)
        return arrived[self.order], theirs.view(self.world, -1).sum(0)

    def combine(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        back = torch.empty_like(y).index_copy(0, self.order, y)
        return all_to_all_single_autograd(back, self.send, self.receive, self.group)


class Hooked(Sorted):
    """As torchtitan parallelises it: experts are distributed tensors, and hooks on their module exchange the rows."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        mesh = init_device_mesh("cpu", (world,))
        for name, p in list(self.experts.named_parameters()):
            part = DTensor.from_local(p.detach(), mesh, [Shard(0)], run_check=False)
            self.experts.register_parameter(name, nn.Parameter(part))
        dispatcher = Dispatcher(mesh, each)
        self.experts.register_forward_pre_hook(dispatcher.dispatch)
        self.experts.register_forward_hook(dispatcher.combine)

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        return self.experts(rows, counts)


class HookedGrouped(Hooked):
    kind = GroupedExperts


# ---- around it ------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Two layers of a kind."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Hooked(rank, world, each) for i in range(2)})
        with torch.no_grad():
            for p in self.layers["1"].parameters():
                p.mul_(0.9)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + layer(F.rms_norm(x, (WIDTH,)))
        return x


class Halves(Gshard):
    """Two groups, each with all experts between its ranks."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank % (world // 2), world // 2, each)
        groups = [dist.new_group(list(range(half, half + world // 2))) for half in (0, world // 2)]
        self.group = groups[rank // (world // 2)]


# ---- reported, not rewritten ----------------------------------------------------------------------------------------


class Gathered(Gshard):
    """All rows to all ranks, the experts' outputs summed: no all-to-all."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        self.l_aux, combine, dispatch = self.gate(h)
        rows = torch.einsum("sec,sm->ecm", dispatch.to(h.dtype), h)
        whole = all_gather_tensor_autograd(rows[None].contiguous(), 0, self.group)
        mine = whole.unflatten(1, (self.world, self.each))[:, dist.get_rank()]
        parts = [expert(mine[:, e]) for e, expert in enumerate(self.experts)]
        y = all_gather_tensor_autograd(torch.stack(parts)[None], 0, self.group)[:, :, dist.get_rank()].flatten(0, 1)
        return torch.einsum("sec,ecm->sm", combine, y).view_as(x)


class Keeping(Sorted):
    """Leaves what came from other ranks in an attribute."""

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        self.last_rows = Exchange.apply(rows[: self.world], [1] * self.world, [1] * self.world)
        return super().exchanged(rows, counts)


class Unlike(Gshard):
    """Experts of one rank compute something else."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        if rank == 1:
            for expert in self.experts:
                expert.register_module("1", nn.ReLU())


class AcrossRows(Gshard):
    """What an expert makes of a row depends on the rows that came along, from all ranks."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        self.experts = nn.ModuleList(_Centred() for _ in range(each))


class _Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y - y.mean((0, 1), keepdim=True)


REPORTED: dict[str, type[nn.Module]] = {k.__name__: k for k in (Gathered, Keeping, Unlike, AcrossRows)}
FORMS: dict[str, type[nn.Module]] = {k.__name__: k for k in (Gshard, Sorted, SortedGrouped, Hooked, HookedGrouped, Decoder)}


def build(name: str, rank: int, world: int, each: int) -> nn.Module:
    return (FORMS | REPORTED | {"Halves": Halves})[name](rank, world, each).train()
