"""Our calls before and after what else wraps a model, in the orders that trainers have; over processes against one in eager."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests import forms, zoo
from tests.balancing import backend, relative
from tests.multirank import fake_group, run_ranks
from ultraep_compile import prepare, shard_experts
from ultraep_compile.errors import ShardingError, TopologyError
from ultraep_compile.preparation import findings_of
from ultraep_compile.report import collect_reports

WIDTH = zoo.WIDTH
EXPERTS = {"traced": zoo.HandMoE, "lifted": forms.LIFTED["LoopOverHit"]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.attention, self.moe = Attention(), moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x + self.attention(x))


class Decoder(nn.Module):
    def __init__(self, rung: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): Block(EXPERTS[rung]()) for i in range(2)})
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


def _batch() -> Tensor:
    return torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(1))


def _experts(model: nn.Module) -> set[nn.Parameter]:
    return {p for n, p in model.named_parameters() if ".moe." in n and "router" not in n}


def _wrap_blocks(model: Decoder, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for name, block in list(model.layers.items()):
        model.layers[name] = wrap(block)


def _fsdp(model: Decoder, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def _equal(call: nn.Module, single: nn.Module, mesh: DeviceMesh, whole: Callable[[str, Tensor], Tensor]) -> None:
    """Output and gradients; `whole(name, gradient)` is that of the mean of the losses, however it came about."""
    rows = slice(mesh.get_local_rank() * 4 // mesh.size(), (mesh.get_local_rank() + 1) * 4 // mesh.size())
    with collect_reports() as collected:
        y = call(_batch()[rows])
        zoo.loss_of(y).backward()
    sites = [s for g in collected.graphs for s in g.prepared.values()]
    assert len(sites) == 2 and all(s.group for s in sites) and not any(g.misses for g in collected.graphs)
    expected = single(_batch())
    zoo.loss_of(expected).backward()
    assert relative(y.detach(), expected[rows].detach()) < 1e-5
    theirs = dict(single.named_parameters())
    for name, p in call.named_parameters():
        for part in ("_orig_mod.", "_checkpoint_wrapped_module.", "module."):
            name = name.replace(part, "")
        assert p.grad is not None
        assert relative(whole(name, p.grad), theirs[name].grad) < 1e-5, name


def _full(name: str, grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _averaged(name: str, grad: Tensor) -> Tensor:
    """Dense gradients over all ranks; those of divided experts are there already."""
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    dist.all_reduce(grad := grad.clone())
    return grad / dist.get_world_size()


# ---- each in the order of its name ----------------------------------------------------------------------------------


def fsdp_prepare(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _fsdp(model, mesh)
    prepare(model, (_batch()[:1],))
    assert all(isinstance(p, DTensor) for p in model.layers.parameters()), "divided again afterwards"
    model.compile(backend=backend(group=dist.group.WORLD))
    _equal(model, single, mesh, _full)


def fsdp_of_dense_part_shard_experts(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _fsdp(model, mesh, _experts(model))
    shard_experts(model, mesh, (_batch()[:1],))
    assert all(isinstance(p, DTensor) for p in model.layers.parameters())
    model.compile(backend=backend())
    _equal(model, single, mesh, _full)


def fsdp_shard_experts(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _fsdp(model, mesh)
    with pytest.raises(ShardingError, match=r"layers\.0\.moe.* is divided already, by .*Call shard_experts first.*ignored_params"):
        shard_experts(model, mesh, (_batch()[:1],))


def ddp_prepare(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ShardingError, match="the model is wrapped by DistributedDataParallel already"):
        shard_experts(wrapped, mesh, (_batch()[:1],))
    prepare(wrapped, (_batch()[:1],))
    wrapped.compile(backend=backend(group=dist.group.WORLD))
    with torch._dynamo.config.patch(optimize_ddp=False):
        _equal(wrapped, single, mesh, _full)


def compile_prepare(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    call = torch.compile(model, backend=backend(group=dist.group.WORLD, expect_moe_sites=2))
    prepare(call, (_batch()[:1],))  # pyright: ignore[reportArgumentType]
    assert len(findings_of(call)) == 2  # pyright: ignore[reportArgumentType]
    _equal(call, single, mesh, _averaged)  # pyright: ignore[reportArgumentType]


def compile_blocks_shard_experts(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _wrap_blocks(model, lambda b: torch.compile(b, backend=backend(expect_moe_sites=1)))  # pyright: ignore
    shard_experts(model, mesh, (_batch()[:1],))
    _equal(model, single, mesh, _averaged)


def checkpoint_shard_experts_compile(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _wrap_blocks(model, checkpoint_wrapper)
    shard_experts(model, mesh, (_batch()[:1],))
    assert not any("_checkpoint" in key for key in model.state_dict())
    model.compile(backend=backend())
    _equal(model, single, mesh, _averaged)


def checkpoint_around_compiled(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    """The layer is compiled while an eager checkpoint keeps what autograd saves: our trials must not be among that."""
    shard_experts(model, mesh, (_batch()[:1],))
    for block in model.layers.values():
        block.moe.compile(backend=backend())  # pyright: ignore
    _wrap_blocks(model, checkpoint_wrapper)
    _equal(model, single, mesh, _averaged)


def checkpoint_compile_fsdp_prepare(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _wrap_blocks(model, checkpoint_wrapper)
    for block in model.layers.values():
        block.compile(backend=backend(group=dist.group.WORLD))
    _fsdp(model, mesh)
    prepare(model, (_batch()[:1],))
    _equal(model, single, mesh, _full)


def meta_shard_experts_checkpoint_compile_fsdp(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    model = model.to("meta")
    shard_experts(model, mesh, (_batch()[:1],))
    ignored = _experts(model)
    _wrap_blocks(model, checkpoint_wrapper)
    for block in model.layers.values():
        block.compile(backend=backend())
    _fsdp(model, mesh, ignored)
    _filled(model, single)
    _equal(model, single, mesh, _full)


def _filled(model: nn.Module, single: nn.Module) -> None:
    model.to_empty(device="cpu")
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {k: v.clone() for k, v in single.state_dict().items()}, options=whole)


_TENSOR_PARALLEL = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}


def _with_tensor_parallel(single: Decoder, model: Decoder, *, first: bool, fsdp: bool) -> None:
    """Attention over pairs of ranks that have the same tokens, experts over the others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))

    def parallelize() -> None:
        for block in model.layers.values():
            parallelize_module(block.attention, mesh["tp"], _TENSOR_PARALLEL)  # pyright: ignore

    def average(name: str, grad: Tensor) -> Tensor:
        grad = _full(name, grad)
        if fsdp or (".moe." in name and "router" not in name):
            return grad
        dist.all_reduce(grad := grad.clone(), group=mesh.get_group("ep"))
        return grad / 2

    if fsdp:
        model = model.to("meta")
    if first:
        parallelize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ultraep: experts are divided over 2 of 4")
        shard_experts(model, mesh["ep"], (_batch()[:1],))
    if not first:
        parallelize()
    if fsdp:
        ignored = _experts(model)
        _wrap_blocks(model, checkpoint_wrapper)
        for block in model.layers.values():
            block.moe.compile(backend=backend())  # pyright: ignore
        _fsdp(model, mesh["ep"], ignored)
        _filled(model, single)
    else:
        model.compile(backend=backend())
    _equal(model, single, mesh["ep"], average)


def tensor_parallel_shard_experts(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _with_tensor_parallel(single, model, first=True, fsdp=False)


def shard_experts_tensor_parallel(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _with_tensor_parallel(single, model, first=False, fsdp=False)


def meta_shard_experts_tensor_parallel_checkpoint_compile_fsdp(single: Decoder, model: Decoder, mesh: DeviceMesh) -> None:
    _with_tensor_parallel(single, model, first=False, fsdp=True)


QUICK = [
    (fsdp_prepare, "lifted"), (fsdp_of_dense_part_shard_experts, "lifted"), (fsdp_shard_experts, "lifted"), (ddp_prepare, "lifted"),
    (compile_prepare, "lifted"), (checkpoint_shard_experts_compile, "lifted"), (checkpoint_around_compiled, "traced"),
    (meta_shard_experts_tensor_parallel_checkpoint_compile_fsdp, "traced"),
]  # fmt: skip
ORDERS = (
    fsdp_prepare, fsdp_of_dense_part_shard_experts, fsdp_shard_experts, ddp_prepare, compile_prepare, compile_blocks_shard_experts,
    checkpoint_shard_experts_compile, checkpoint_around_compiled, checkpoint_compile_fsdp_prepare, tensor_parallel_shard_experts,
    shard_experts_tensor_parallel, meta_shard_experts_checkpoint_compile_fsdp,
    meta_shard_experts_tensor_parallel_checkpoint_compile_fsdp,
)  # fmt: skip
SLOW = [(order, rung) for order in ORDERS for rung in EXPERTS if (order, rung) not in QUICK]


def _one_by_one(rank: int, cases: list[tuple[Callable, str]]) -> None:
    mesh = init_device_mesh("cpu", (4,))
    for order, rung in cases:
        torch._dynamo.reset()
        single = Decoder(rung)
        try:
            order(single, copy.deepcopy(single), mesh)
        except BaseException as error:
            error.add_note(f"{order.__name__} {rung}")
            raise
        dist.barrier()


@pytest.mark.parametrize("cases", [pytest.param(QUICK, id="quick"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)])
def test_orders_over_4_processes(cases: list[tuple[Callable, str]]) -> None:
    run_ranks(4, _one_by_one, cases)


def test_experts_that_tensor_parallelism_has_divided_are_refused_where_they_are_modules() -> None:
    model = Decoder("lifted")
    with fake_group(2):
        mesh = init_device_mesh("cpu", (2,))
        prepare(model, (_batch()[:1],))
        for block in model.layers.values():
            for expert in block.moe.experts.children():  # pyright: ignore
                parallelize_module(expert, mesh, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()})
        with pytest.raises(ShardingError, match=r"layers\.0\.moe\.experts\.0\..* is divided already.*Call shard_experts first"):
            shard_experts(model, mesh)


def _transformers_own(rank: int, folder: str) -> str:
    """Mixtral divided by transformers' own plan: what is said by shard_experts, and by the backend with a group."""
    from transformers import MixtralForCausalLM

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    inputs = {"input_ids": zoo.tokens(2, 16)["input_ids"]}
    plain = MixtralForCausalLM.from_pretrained(folder)(**inputs).logits
    model = MixtralForCausalLM.from_pretrained(folder, tp_plan="auto")
    with pytest.raises(ShardingError, match=r"mlp\.experts\..* is divided already"):
        shard_experts(model, init_device_mesh("cpu", (2,)))
    model.compile(backend=backend())
    assert relative(model(**inputs).logits.detach(), plain.detach()) < 1e-5, "left as it is"
    torch._dynamo.reset()
    model.compile(backend=backend(group=dist.group.WORLD))
    with pytest.raises(TopologyError) as refused:
        model(**inputs)
    return str(refused.value)


@pytest.mark.slow
def test_a_model_that_transformers_divides_itself_is_refused_by_name(tmp_path) -> None:
    model, _ = zoo.build("mixtral", "batched_mm")
    model.save_pretrained(tmp_path)
    for said in run_ranks(2, _transformers_own, str(tmp_path)):
        assert "weights of its experts are divided already" in said and "call shard_experts" in said
