"""Sharded experts beside what else divides or wraps a model, each over 4 processes against one process in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from tests import forms, zoo
from tests.balancing import backend, relative
from tests.bundles import BUNDLES
from tests.multirank import fake_group, run_ranks
from ultraep_compile import clip_grad_norm_, shard_experts
from ultraep_compile.errors import ShardingError, SiteCountError
from ultraep_compile.report import collect_reports

WORLD = 4


class Blocks(nn.Module):
    """Dense and MoE layers; with `tie`, both MoE layers have the same experts."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(zoo.WIDTH, zoo.WIDTH), zoo.HandMoE()) for _ in range(2))
        if tie:
            for name in ("up", "up_bias", "down"):
                setattr(self.blocks[1][1], name, getattr(self.blocks[0][1], name))
        self.head = nn.Linear(zoo.WIDTH, zoo.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _batch() -> Tensor:
    return torch.randn(WORLD, 16, zoo.WIDTH, generator=torch.Generator().manual_seed(1))


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _steps(model: nn.Module, call: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Two optimizer steps after clipping: the norms, and the parameters in the end."""
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, eps=1e-6, foreach=False) for ps in (plain, sharded) if ps]
    norms = []
    for _ in range(2):
        for o in optimizers:
            o.zero_grad()
        zoo.loss_of(call(x)).backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.01))
        for o in optimizers:
            o.step()
    return norms, [_whole(p.detach()) for p in model.parameters()]


def _compare(rank: int, model: nn.Module, call: nn.Module, single: nn.Module) -> None:
    norms, weights = _steps(model, call, _batch()[rank : rank + 1])
    expected_norms, expected = _steps(single, single, _batch())
    assert relative(torch.stack(norms), torch.stack(expected_norms)) < 1e-5 and min(norms) > 0.01
    for (name, _), ours, theirs in zip(single.named_parameters(), weights, expected, strict=True):
        assert relative(ours, theirs) < 1e-5, name


def _with_ddp(rank: int, mesh) -> None:
    single = Blocks()
    model = shard_experts(copy.deepcopy(single), mesh)
    model.compile(backend=backend())
    wrapped = DistributedDataParallel(model)
    with collect_reports() as collected:
        _compare(rank, model, wrapped, single)
    assert any(s.sharded for g in collected.graphs for s in g.prepared.values())
    with pytest.raises(RuntimeError, match="mixed"):  # torch's own cannot; it must not give a wrong norm either
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def _with_split_graphs(rank: int, mesh) -> None:
    """Dynamo cuts the graph at DDP's buckets, here before the head: said, with the setting that ends it."""
    single = Blocks()
    single.head = nn.Linear(zoo.WIDTH, 2**20 // zoo.WIDTH)  # fills the first bucket
    x = _batch()[rank : rank + 1]
    for split in (True, False):
        torch._dynamo.reset()
        model = shard_experts(copy.deepcopy(single), mesh)
        model.compile(backend=backend(expect_moe_sites=2))
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
        with torch._dynamo.config.patch(optimize_ddp=split):
            if split:
                with pytest.raises(SiteCountError, match="optimize_ddp = False"):
                    wrapped(x)
            else:
                _compare(rank, model, wrapped, single)


def _with_fsdp(rank: int, mesh) -> None:
    single = Blocks()
    model = shard_experts(copy.deepcopy(single), mesh)
    experts = {p for p in model.parameters() if isinstance(p, DTensor)}
    for block in model.blocks:
        block[1].compile(backend=backend())
        fully_shard(block, mesh=mesh, ignored_params=experts)
    fully_shard(model, mesh=mesh, ignored_params=experts)
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    with collect_reports() as collected:
        _compare(rank, model, model, single)
    sites = [s for g in collected.graphs for s in g.prepared.values()]
    assert sites and all(s.sharded for s in sites)


def _with_ties(rank: int, mesh) -> None:
    single = Blocks(tie=True)
    model = shard_experts(copy.deepcopy(single), mesh)
    assert model.blocks[0][1].up is model.blocks[1][1].up
    assert len(list(model.parameters())) == len(list(single.parameters()))
    model.compile(backend=backend())
    _compare(rank, model, DistributedDataParallel(model), single)


def _initialised_in_place(rank: int, mesh) -> None:
    """A model made on the meta device, materialised, and initialised by its own code."""
    with torch.device("meta"):
        model = Blocks()
    shard_experts(model, mesh).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            nn.init.constant_(p, 0.25)
    assert all(bool((_whole(p) == 0.25).all()) for p in model.parameters())
    model.blocks[0][1].up.requires_grad_(False)
    x = _batch()[rank : rank + 1]
    zoo.loss_of(model(x)).backward()
    assert model.blocks[0][1].up.grad is None and model.blocks[0][1].down.grad is not None
    half = copy.deepcopy(model).to(torch.float64)
    assert half.blocks[0][1].up.dtype == torch.float64
    assert relative(half(x.double()).detach(), model(x).detach()) < 1e-5


def _with_accumulation_and_autocast(rank: int, mesh) -> None:
    single = Blocks()
    model = shard_experts(copy.deepcopy(single), mesh)
    model.compile(backend=backend())
    wrapped = DistributedDataParallel(model)
    for turn in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=turn == 1):
            x = _batch() * (turn + 1)
            if turn < 2:
                with wrapped.no_sync():
                    (zoo.loss_of(wrapped(x[rank : rank + 1])) / 3).backward()
            else:
                (zoo.loss_of(wrapped(x[rank : rank + 1])) / 3).backward()
            (zoo.loss_of(single(x)) / 3).backward()
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        assert p.grad is not None and relative(_whole(p.grad), q.grad) < 2e-2, name


def _uneven_ranks(rank: int, mesh) -> None:
    """Other token counts on every rank and in every step, and none at all on one of them."""
    single = zoo.HandMoE()
    model = shard_experts(copy.deepcopy(single), mesh)
    model.compile(backend=backend())
    for turn in range(2):
        x = torch.randn(1, (5 * rank + turn) % 16 if rank else 0, zoo.WIDTH)
        model(x).sum().backward()
        assert relative(model(x).detach(), single(x).detach()) < 1e-6


def _over_a_part_of_a_mesh(rank: int, mesh) -> None:
    """Two pairs of processes, each with all experts; one warning says what is left to do, and then it is right."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    single = zoo.HandMoE()
    with pytest.warns(UserWarning, match="divided over 2 of 4 processes.*average the gradients"):
        model = shard_experts(copy.deepcopy(single), both["ep"])
    model.compile(backend=backend())
    zoo.loss_of(model(_batch()[rank : rank + 1])).backward()
    zoo.loss_of(single(_batch())).backward()
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        if isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad.to_local(), group=both.get_group("dp"))
            assert relative(_whole(p.grad) / 2, q.grad) < 1e-5, name


def _checkpoints_that_do_not_fit(rank: int, mesh) -> None:
    """Refused by the name of the tensor; a good one loads afterwards."""
    model = shard_experts(zoo.HandMoE(), mesh)
    before = {k: _whole(v).clone() for k, v in model.state_dict().items()}
    good = zoo.HandMoE().state_dict()
    for wrong, message in (
        ({**good, "up": good["up"][:4]}, "size mismatch for up"),
        ({k: v for k, v in good.items() if k != "down"}, 'Missing key.*"down"'),
        ({**good, "extra": good["up"]}, 'Unexpected key.*"extra"'),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            model.load_state_dict(wrong)
    model.load_state_dict(before)
    assert all(torch.equal(_whole(v), before[k]) for k, v in model.state_dict().items())


def _with_bundles(rank: int, mesh) -> None:
    """What belongs to an expert is divided with it; products of sharded tensors are replicated as they are."""
    for name in ("quantised buffer", "quantised by row", "merged LoRA"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        single = BUNDLES[name]()
        model = shard_experts(copy.deepcopy(single), mesh)
        for key, value in model.state_dict().items():
            if value.dim() > 1 and "router" not in key:
                assert isinstance(value, DTensor) and value.to_local().shape[0] * WORLD == value.shape[0], key
        model.compile(backend=backend())
        with collect_reports() as collected:
            zoo.loss_of(model(_batch()[rank : rank + 1])).backward()
        (site,) = [s for g in collected.graphs for s in g.prepared.values()]
        assert site.sharded and not any(g.misses for g in collected.graphs)
        assert not any("unshard" in g.graph_module.code for g in collected.graphs), name
        zoo.loss_of(single(_batch())).backward()
        for (key, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            if isinstance(p.grad, DTensor):
                assert relative(_whole(p.grad), q.grad) < 1e-5, f"{name}: {key}"


QUICK = (
    _with_ddp, _with_split_graphs, _with_fsdp, _initialised_in_place, _uneven_ranks, _with_bundles, _over_a_part_of_a_mesh,
    _checkpoints_that_do_not_fit,
)  # fmt: skip
SLOW = (_with_ties, _with_accumulation_and_autocast)


def _one_by_one(rank: int, parts: tuple[Callable, ...]) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in parts:
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            part(rank, mesh)
        except BaseException as error:
            error.add_note(part.__name__)
            raise
        dist.barrier()


@pytest.mark.parametrize("parts", [pytest.param(QUICK, id="quick"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)])
def test_combinations_over_4_processes(parts: tuple[Callable, ...]) -> None:
    run_ranks(WORLD, _one_by_one, parts)


def test_experts_that_only_a_forward_shows_need_example_inputs() -> None:
    layer, inputs = forms.build("LoopOverHit")
    model = nn.ModuleDict({"mlp": layer})
    with fake_group(4):
        mesh = init_device_mesh("cpu", (4,))
        with pytest.raises(ShardingError, match=r"only a forward can tell: call shard_experts\(model, mesh, example_inputs\)"):
            shard_experts(model, mesh)
        shard_experts(layer, mesh, inputs)
    parameters = {n: p for n, p in layer.named_parameters() if n.startswith("experts.")}
    held = {n.split(".")[1] for n, p in parameters.items() if p.to_local().numel()}
    assert len(parameters) == 4 * forms.EXPERTS and held == {"0"}


def test_experts_of_a_layer_that_is_missed_are_refused_with_the_reason() -> None:
    layer, inputs = forms.build("SoftMixture")
    with fake_group(4), pytest.raises(ShardingError, match="experts is unbalanceable: every expert computes every token"):
        shard_experts(layer, init_device_mesh("cpu", (4,)), inputs)


def test_experts_that_tensor_parallelism_has_divided_are_refused_by_name() -> None:
    model = zoo.HandMoE()
    with fake_group(2):
        mesh = init_device_mesh("cpu", (2,))
        model.up = nn.Parameter(DTensor.from_local(model.up.detach(), mesh, [Shard(2)]))
        with pytest.raises(ShardingError, match=r"HandMoE\.up is divided already, by .*Shard\(dim=2\).* Call shard_experts first"):
            shard_experts(model, mesh)


def test_a_tie_to_something_else_is_refused_by_name() -> None:
    model = nn.ModuleDict({"moe": zoo.HandMoE(), "other": nn.Linear(24, zoo.EXPERTS)})
    model["other"].weight = model["moe"].up_bias
    with fake_group(4), pytest.raises(ShardingError, match=r"moe\.up_bias is tied to other\.weight, which holds no experts"):
        shard_experts(model, init_device_mesh("cpu", (4,)))
