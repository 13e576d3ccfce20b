"""Expert-parallel training: every process keeps its own experts, every microbatch is balanced.

    torchrun --nproc-per-node 2 examples/train_torchrun.py               # gloo, CPU
    torchrun --nproc-per-node 8 examples/train_torchrun.py --device cuda  # NCCL, one GPU per process

`shard_experts` divides the experts over the processes, DistributedDataParallel averages the dense gradients,
and AdamW steps both. Rank 0 trains an untouched copy on the whole batch as well, and the losses must agree.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ultraep_compile

SAMPLES, LENGTH = 8, 32


def make_model() -> nn.Module:
    """The same weights in every process. No auxiliary loss: its mean over ranks is not the batch's."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """One optimizer step; the loss before it."""
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # foreach=False: expert parameters are DTensors, dense ones are not, and one call cannot step both kinds.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, foreach=False)


def train(steps: int, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = make_model().to(device)
    untouched = copy.deepcopy(model)

    # All that expert parallelism takes.
    ultraep_compile.prepare(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=device)})
    ultraep_compile.shard_experts(model, init_device_mesh(device.type, (ranks,)))
    model.compile(backend=ultraep_compile.ultraep, options={"redundant_experts": 1, "inner": "aot_eager"})
    torch._dynamo.config.optimize_ddp = False  # else the graph is cut at DDP's buckets, through MoE layers
    parallel = DistributedDataParallel(model)
    optimizer = make_optimizer(parallel)

    whole, here = (sum(p.numel() for p in parts) for parts in _expert_parameters(model))
    assert here * ranks == whole, f"rank {rank} holds {here} of {whole} expert parameters"
    reference = make_optimizer(untouched)
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        ids = torch.randint(0, 128, (SAMPLES, LENGTH), generator=generator).to(device)
        loss = step(parallel, optimizer, ids.chunk(ranks)[rank])
        dist.all_reduce(loss)
        loss /= ranks  # the mean of the ranks' losses is the loss of the whole batch
        if rank == 0:
            expected = step(untouched, reference, ids)
            print(f"step {number}: loss {loss:.6f}, on one process without us {expected:.6f}", flush=True)
            assert abs(loss - expected) <= 1e-5 * abs(expected)
    if rank == 0:
        print(f"ok: {ranks} processes, each with {here:,} of {whole:,} expert parameters")


def _expert_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Sharded parameters: as the optimizer and `state_dict` see them, and what this process holds of them."""
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    return list(sharded), [p.to_local() for p in sharded]


def main() -> None:
    parser = argparse.ArgumentParser(description="Expert-parallel training under torchrun.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    if chosen.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if chosen.device == "cuda" else "gloo")
    try:
        if SAMPLES % dist.get_world_size():
            raise SystemExit(f"{dist.get_world_size()} processes cannot share a batch of {SAMPLES} evenly")
        train(chosen.steps, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
