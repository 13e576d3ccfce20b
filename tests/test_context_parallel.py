"""Tokens divided over the sequence: attention exchanges keys and values, MoE layers see this rank's tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention

from tests import forms, zoo
from tests.balancing import backend, relative
from tests.multirank import run_ranks
from ultraep_compile import shard_experts
from ultraep_compile.report import collect_reports

WORLD, HEADS, LENGTH = 2, 4, 32


class Attention(nn.Module):
    """Causal; with a group, queries of this rank's part of the sequence meet keys and values of all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(zoo.WIDTH, 3 * zoo.WIDTH)
        self.group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.group is None:
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (all_gather_tensor_autograd(t.contiguous(), 2, self.group) for t in (k, v))
            row = dist.get_rank() * q.shape[2] + torch.arange(q.shape[2], device=q.device)
            mask = torch.arange(k.shape[2], device=q.device) <= row[:, None]
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, moe: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(Attention(), moe()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _compare(rank: int, kind: type[nn.Module], device: str) -> None:
    """Loss and all gradients of both parts of the sequence, against one process with the whole sequence in eager."""
    torch._dynamo.reset()
    mesh = init_device_mesh(device, (WORLD,))
    single = Model(kind).to(device)
    x = torch.randn(2, LENGTH, zoo.WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    mine = x.chunk(WORLD, 1)[rank].contiguous()
    model = copy.deepcopy(single)
    for layer in model.layers:
        layer[0].group = mesh.get_group()
    shard_experts(model, mesh, (mine,))
    model.compile(backend=backend(redundant_experts=1))
    with collect_reports() as collected:
        loss = zoo.loss_of(model(mine))
        loss.backward()
    assert sum(len(g.prepared) for g in collected.graphs) == len(model.layers)
    _assert_mean(model, loss, single, x)


def _assert_mean(model: nn.Module, loss: Tensor, single: nn.Module, x: Tensor) -> None:
    expected = zoo.loss_of(single(x))
    expected.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    assert relative(loss / WORLD, expected.detach()) < 1e-5
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        grad = p.grad
        assert grad is not None and q.grad is not None
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        else:
            dist.all_reduce(grad)
            grad = grad / WORLD
        assert relative(grad, q.grad) < 1e-5, name


def _on_cpus(rank: int) -> None:
    for kind in (zoo.HandMoE, forms.LIFTED["LoopOverHit"]):
        _compare(rank, kind, "cpu")


def test_a_sequence_divided_over_ranks() -> None:
    """With stacked experts, and with experts that were lifted from a loop while attention exchanged beside them."""
    run_ranks(WORLD, _on_cpus)


def _on_gpus(rank: int) -> None:
    """torch's own `context_parallel` around the step: ring attention in eager, MoE layers compiled one by one, in bf16."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl", device_id=torch.device("cuda", rank))
    assert isinstance(group, dist.ProcessGroup)
    mesh = DeviceMesh.from_group(group, "cuda")
    single = Model(zoo.HandMoE).to("cuda", torch.bfloat16)
    x = torch.randn(2, 256, zoo.WIDTH, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    model = copy.deepcopy(single)
    shard_experts(model, mesh)
    for layer in model.layers:
        layer[1].compile(backend=backend(redundant_experts=1))
    mine = x.clone()
    with collect_reports() as collected, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with context_parallel(mesh, buffers=[mine], buffer_seq_dims=[1]):
            loss = zoo.loss_of(model(mine))
            loss.backward()
        expected = zoo.loss_of(single(x))
        expected.backward()
    assert sum(len(g.prepared) for g in collected.graphs) == len(model.layers)
    loss = loss.detach().clone()
    dist.all_reduce(loss, group=group)
    assert relative(loss / WORLD, expected.detach()) < 2e-2
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        if isinstance(p.grad, DTensor) and q.grad is not None:
            assert relative(p.grad.full_tensor(), q.grad) < 5e-2, name


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA devices")
def test_under_torchs_context_parallel() -> None:
    run_ranks(WORLD, _on_gpus)
