"""More ways in which layers exchange rows with other ranks, and in which their routers talk to other ranks.

Made like those of `forms_parallel`, with its parts: `FORMS[name](rank, world, each)`.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import (
    all_gather_tensor_autograd,
    all_reduce,
    all_to_all_single,
    all_to_all_single_autograd,
    reduce_scatter_tensor_autograd,
)
from torch.distributed.device_mesh import init_device_mesh

from tests.forms_parallel import TOP_K, WIDTH, AllToAll, Gshard, Sorted, StackedExperts, TopTwoGate, feed_forward

# ---- routers that talk to other ranks -------------------------------------------------------------------------------


class SummedLoads(Sorted):
    """Counts the tokens of every expert over all ranks, in a buffer that the router does not read."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        self.register_buffer("loads", torch.zeros(world * each))

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        with torch.no_grad():
            total = counts.float()
            dist.all_reduce(total)
            self.loads.add_(total)
        return super().exchanged(rows, counts)


class SummedLoss(Gshard):
    """The auxiliary loss is over the tokens of all ranks."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        self.gate = _SummedGate(world * each)


class _SummedGate(TopTwoGate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, combine, dispatch = super().forward(x)
        used = all_reduce(dispatch.any(-1).float().sum(0), "sum", dist.group.WORLD)  # pyright: ignore[reportArgumentType]
        return (self.wg(x).softmax(-1).mean(0) * used / used.sum()).sum(), combine, dispatch


class AgreedCapacity(Gshard):
    """As much room as the busiest expert of any rank needs: a size that depends on all ranks' data."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        self.gate = _AgreedGate(world * each)


class _AgreedGate(TopTwoGate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates = self.wg(x).softmax(-1)
        w, ids = gates.topk(TOP_K, -1)
        mask = F.one_hot(ids, self.experts).sum(1)
        most = mask.sum(0).max()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        slot = F.one_hot((mask.cumsum(0) - 1).clamp(min=0), int(most.item())) * mask[..., None]
        weight = torch.zeros_like(gates).scatter(-1, ids, w / w.sum(-1, keepdim=True))
        return gates.mean(), weight[..., None] * slot, slot.bool()


# ---- ways to exchange -----------------------------------------------------------------------------------------------


class Waited(Sorted):
    """The exchange is started, then waited for, by a handle."""

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, async_op=True).wait()
        send, receive = (c.view(self.world, -1).sum(1).tolist() for c in (counts, theirs))
        return self.finished(_Waited.apply(rows, receive, send), theirs, send, receive, _Waited.apply)

    def finished(self, arrived: Tensor, theirs: Tensor, send: list[int], receive: list[int], exchange) -> Tensor:
        number = torch.arange(self.each).repeat(self.world).repeat_interleave(theirs)
        order = torch.argsort(number, stable=True)
        y = self.experts(arrived[order], theirs.view(self.world, -1).sum(0))
        return exchange(torch.empty_like(y).index_copy(0, order, y), send, receive)


class _Waited(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, receive: list[int], send: list[int]) -> Tensor:
        ctx.sizes = receive, send
        out = x.new_empty(sum(receive), *x.shape[1:])
        handle = dist.all_to_all_single(out, x.contiguous(), receive, send, async_op=True)
        assert handle is not None
        handle.wait()
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        receive, send = ctx.sizes
        return _Waited.apply(grad, send, receive), None, None


class Listed(Waited):
    """Rows as lists of tensors of one size, one for each rank."""

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        room = len(rows)
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(rows))
        number = torch.arange(len(counts)).repeat_interleave(counts, output_size=len(rows))
        buffer = rows.new_zeros(len(counts), room, WIDTH).index_put((number, place), rows)
        arrived = _Listed.apply(buffer).view(self.world, self.each, room, WIDTH).transpose(0, 1)
        w1, w2, w3 = self.experts.weights()
        a = arrived.reshape(self.each, -1, WIDTH)
        y = (F.silu(a @ w1.mT) * (a @ w3.mT)) @ w2.mT
        back = y.view(self.each, self.world, room, WIDTH).transpose(0, 1).reshape(len(counts), room, WIDTH)
        return _Listed.apply(back)[number, place]


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [p.contiguous() for p in x.chunk(dist.get_world_size())]
        out = [torch.empty_like(p) for p in parts]
        dist.all_to_all(out, parts)
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Listed.apply(grad)


class OverMesh(Waited):
    """Functional collectives over a mesh; what they return is waited for by its first use."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        self.mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        theirs = all_to_all_single(counts, None, None, self.mesh)
        send, receive = (c.view(self.world, -1).sum(1).tolist() for c in (counts, theirs))
        exchange = lambda x, to, of: all_to_all_single_autograd(x, to, of, (self.mesh, 0))  # noqa: E731
        return self.finished(exchange(rows, receive, send), theirs, send, receive, exchange)


class HostsThenExperts(Gshard):
    """A token chooses a host, then an expert on it, with a capacity for either; both scores weigh the output."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        self.gate = _TwoLevelGate(world, each)


class _TwoLevelGate(torch.nn.Module):
    def __init__(self, hosts: int, each: int) -> None:
        super().__init__()
        self.hosts, self.each = hosts, each
        self.host, self.expert = torch.nn.Linear(WIDTH, hosts, bias=False), torch.nn.Linear(WIDTH, hosts * each, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        experts = self.hosts * self.each
        hosts = self.host(x).softmax(-1)
        chosen, own = hosts.topk(2, -1)
        room, space = 2 * math.ceil(len(x) / self.hosts), 2 * math.ceil(len(x) / experts)
        combine = torch.zeros(len(x), experts, 2 * space)
        for way in range(2):
            host = F.one_hot(own[:, way], self.hosts)
            host = host * ((host.cumsum(0) - 1) < room)
            inside = self.expert(x).unflatten(-1, (self.hosts, self.each)).softmax(-1)
            inside = (inside * host[..., None]).flatten(1)
            best, number = inside.max(-1)
            mask = F.one_hot(number, experts) * (best > 0)[:, None]
            place = (mask.cumsum(0) - 1) * mask
            mask = mask * (place < space)
            at = F.one_hot((place * mask).sum(-1) + way * space, 2 * space)
            combine = combine + (chosen[:, way] * best)[:, None, None] * mask[..., None] * at[:, None]
        return hosts.mean(), combine, combine.bool()


# ---- reported, not rewritten ----------------------------------------------------------------------------------------


class TwoHops(Waited):
    """Rows go to the right place within a host first, then between hosts: two groups."""

    def __init__(self, rank: int, world: int, each: int) -> None:
        super().__init__(rank, world, each)
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("between", "within"))
        self.between, self.within = mesh.get_group("between"), mesh.get_group("within")

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        room = len(rows)
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(rows))
        number = torch.arange(len(counts)).repeat_interleave(counts, output_size=len(rows))
        buffer = rows.new_zeros(len(counts), room, WIDTH).index_put((number, place), rows)
        half = self.world // 2
        hop = buffer.view(2, half, self.each, room, WIDTH).transpose(0, 1).contiguous()
        hop = AllToAll.apply(self.within, hop).transpose(0, 1).contiguous()
        arrived = AllToAll.apply(self.between, hop).reshape(self.world, self.each, room, WIDTH).transpose(0, 1)
        w1, w2, w3 = self.experts.weights()
        a = arrived.reshape(self.each, -1, WIDTH)
        y = (F.silu(a @ w1.mT) * (a @ w3.mT)) @ w2.mT
        back = y.view(self.each, 2, half, room, WIDTH).permute(1, 2, 0, 3, 4).contiguous()
        back = AllToAll.apply(self.between, back).transpose(0, 1).contiguous()
        back = AllToAll.apply(self.within, back).transpose(0, 1)
        return back.reshape(len(counts), room, WIDTH)[number, place]


class GatheredAround(Sorted):
    """All rows to all ranks before a module with this rank's experts, whose sums are divided over the ranks after it."""

    def exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        raise AssertionError("rows are gathered")

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, WIDTH)
        w, ids, _ = self.router(h, self.expert_bias)
        everyone = dist.group.WORLD
        assert everyone is not None
        rows, weights, chosen = (all_gather_tensor_autograd(t, 0, everyone) for t in (h, w, ids))
        y = self.experts(rows, chosen - dist.get_rank() * self.each, weights)
        return (reduce_scatter_tensor_autograd(y, "sum", 0, everyone) + self.shared(h)).view_as(x)


class _Looped(torch.nn.Module):
    """A module for each expert; choices are numbers of this rank's experts, and those of other ranks are left out."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.local = torch.nn.ModuleList(feed_forward() for _ in range(each))

    def forward(self, rows: Tensor, mine: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.local):
            token, way = torch.where(mine == number)
            out = out.index_add(0, token, expert(rows[token]) * weights[token, way, None])
        return out


class _Dense(StackedExperts):
    """A gather of weights, which a graph shows; others' rows weigh nothing."""

    def forward(self, rows: Tensor, mine: Tensor, weights: Tensor) -> Tensor:
        w1, w2, w3 = self.weights()
        ids = mine.clamp(0, len(w1) - 1)
        a = F.silu(torch.einsum("td,tkfd->tkf", rows, w1[ids])) * torch.einsum("td,tkfd->tkf", rows, w3[ids])
        return (torch.einsum("tkf,tkdf->tkd", a, w2[ids]) * (weights * (mine == ids))[..., None]).sum(1)


class GatheredLooped(GatheredAround):
    kind = _Looped  # pyright: ignore[reportAssignmentType]


class GatheredDense(GatheredAround):
    kind = _Dense


FORMS = {
    k.__name__: k
    for k in (SummedLoads, SummedLoss, AgreedCapacity, Waited, Listed, OverMesh, HostsThenExperts)
}
REPORTED = {k.__name__: k for k in (TwoHops, GatheredLooped, GatheredDense)}
