"""A pipeline beside what trainers use: clipping, accumulation, autocast, checkpointing, compiled stages, data parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import ultraep_compile
from tests.executor import toys
from tests.multirank import run_ranks
from ultraep_compile.executor.holdings import names_of
from ultraep_compile.executor.pipeline import Pipeline


def made(mesh: DeviceMesh, model: toys.ToyParts, count: int, **settings: Any) -> Pipeline:
    return ultraep_compile.pipeline(model, mesh, count, deadline=60.0, **settings)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients_differ(pipe: Pipeline, single: toys.Parts) -> float:
    expected = names_of(None, single)
    worst = 0.0
    for name, p in pipe.named_parameters():
        grad = expected[name].grad
        if grad is not None:
            assert p.grad is not None, name
            worst = max(worst, relative(full(p.grad), grad))
    return worst


def _clipping(mesh: DeviceMesh) -> float:
    """The norm is the whole model's, tied and replicated tensors counted once."""
    model = toys.parts(2)
    single = toys.copied(model)
    pipe = made(mesh, model, 5)
    batch = toys.microbatches(5, 3)
    worst = 0.0
    for kind in (2.0, float("inf"), 1.0):
        pipe.zero_grad()
        pipe.step({"microbatches": batch})
        for p in names_of(None, single).values():
            p.grad = None
        toys.reference(single, batch)
        parameters = {id(p): p for p in names_of(None, single).values()}.values()
        expected = torch.nn.utils.clip_grad_norm_(parameters, 0.1, kind)
        norm = ultraep_compile.clip_grad_norm_(pipe.parameters(), 0.1, kind)
        worst = max(worst, relative(norm, expected), gradients_differ(pipe, single))
    return worst


def _training(mesh: DeviceMesh) -> float:
    """Accumulation over two steps, an optimizer, and tied and replicated weights that stay equal on all ranks."""
    model = toys.parts(2, sound=True)
    single = toys.copied(model)
    pipe = made(mesh, model, 5)
    ours = torch.optim.SGD(pipe.parameters(), lr=0.1)
    theirs = torch.optim.SGD({id(p): p for p in names_of(None, single).values()}.values(), lr=0.1)
    for turn in range(4):
        batch = toys.microbatches(5, turn, sound=True)
        pipe.step({"microbatches": batch}, scale=0.5)
        toys.reference(single, batch)
        if turn % 2:
            for p in names_of(None, single).values():
                if p.grad is not None and not getattr(p, "_halved", False):
                    p.grad *= 0.5
                    p._halved = True  # pyright: ignore[reportAttributeAccessIssue]
            ours.step()
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
            for p in names_of(None, single).values():
                p._halved = False  # pyright: ignore[reportAttributeAccessIssue]
    own = pipe.state_dict()
    worst = max(relative(tensor, names_of(None, single)[name].detach()) for name, tensor in own.items())
    copies = [torch.empty_like(own["stages.0.embedding.weight"]) for _ in range(2)]
    dist.all_gather(copies, own["stages.0.embedding.weight"])
    assert torch.equal(*copies), "tied weights came apart"
    return worst


def _autocast(mesh: DeviceMesh) -> float:
    """bf16 products, as one process under the same autocast computes them."""
    model = toys.parts(2)
    single = toys.copied(model)
    pipe = made(mesh, model, 5)
    batch = toys.microbatches(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = pipe.step({"microbatches": batch})
        loss, _ = toys.reference(single, batch)
    assert relative(result.loss, loss) < 1e-5
    assert gradients_differ(pipe, single) < 1e-2  # bf16 products: the order of summation shows
    return 0.0


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False)


def _checkpointing(mesh: DeviceMesh) -> float:
    worst = 0.0
    for base in ("1f1b", "zero-bubble"):
        model = toys.parts(2)
        for stage in model.stages:
            stage.module = _Checkpointed(stage.module)
        single = toys.copied(model)
        pipe = made(mesh, model, 5, base=base)
        batch = toys.microbatches(5, 5)
        pipe.step({"microbatches": batch})
        toys.reference(single, batch)
        worst = max(worst, gradients_differ(pipe, single))
    return worst


def _compiled(mesh: DeviceMesh) -> float:
    worst = 0.0
    for base in ("1f1b", "zero-bubble"):
        model = toys.parts(2)
        single = toys.copied(model)
        for part in (*model.stages, *model.encoders):
            part.module.compile(backend="aot_eager", dynamic=True)
        pipe = made(mesh, model, 4, base=base, measure_memory=True)
        batch = toys.microbatches(4, 6)
        pipe.step({"microbatches": batch})
        toys.reference(single, batch)
        worst = max(worst, gradients_differ(pipe, single))
    return worst


def _memory(mesh: DeviceMesh) -> float:
    """Encoder activations do not grow with the number of microbatches, and are c = 2 of them; LLM as 1F1B."""
    peaks = {}
    for count in (2, 4, 8, 16):
        batch = toys.microbatches(1, 7) * count
        pipe = made(mesh, toys.parts(2), count, measure_memory=True)
        peaks[count] = pipe.step({"microbatches": batch}).peak_bytes
    one, two = peaks[2]["encoder"], peaks[16]["encoder"]
    assert peaks[4]["encoder"] == peaks[8]["encoder"] == two == 2 * one > 0, peaks
    assert len({peak["llm"] for peak in peaks.values()}) == 1, peaks
    pipe = made(mesh, toys.parts(2), 8, method="encoder-first", measure_memory=True)
    first = pipe.step({"microbatches": toys.microbatches(1, 7) * 8}).peak_bytes
    assert first["encoder"] == 4 * one
    return 0.0


CHECKS = (_clipping, _training, _autocast, _checkpointing, _compiled, _memory)


def _two_ranks(rank: int) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    return {check.__name__: check(mesh) for check in CHECKS}


def test_two_ranks() -> None:
    for row in run_ranks(2, _two_ranks):
        assert all(x < 1e-5 for x in row.values()), row


def _data_parallel(rank: int) -> dict[str, float]:
    """Two pipelines of two ranks: gradients are those of the mean of their losses; plain, and with sharded stages."""
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    mine = mesh["dp"].get_local_rank()
    for sharded in (False, True):
        for base in ("1f1b", "zero-bubble"):
            model = toys.parts(2, tied=not sharded)
            single = toys.copied(model)
            pipe = made(mesh, model, 5, base=base)
            if sharded:
                for stage, r in zip(model.stages, pipe.stage_rank, strict=True):
                    if r == pipe.rank:
                        fully_shard(stage.module, mesh=mesh["dp"], reshard_after_forward=False)
            batches = [toys.microbatches(5, 8 + i) for i in range(2)]
            result = pipe.step({"microbatches": batches[mine]})
            losses = [toys.reference(single, batch)[0] for batch in batches]
            for p in {id(p): p for p in names_of(None, single).values()}.values():
                if p.grad is not None:
                    p.grad /= 2
            worst = max(relative(result.loss, torch.stack(losses).mean()), gradients_differ(pipe, single))
            norm = ultraep_compile.clip_grad_norm_(pipe.parameters(), 0.1)
            grads = {id(p): p.grad for p in names_of(None, single).values() if p.grad is not None}.values()
            found[f"{sharded} {base}"] = max(worst, relative(norm, torch.nn.utils.get_total_norm(grads)))
    return found


def test_data_parallel_pipelines() -> None:
    for row in run_ranks(4, _data_parallel):
        assert all(x < 1e-5 for x in row.values()), row
