"""A vision-language model trained as a nested pipeline: every process holds one stage of its language model.

    torchrun --nproc-per-node 2 examples/train_multimodal_torchrun.py                # gloo, CPU
    torchrun --nproc-per-node 4 examples/train_multimodal_torchrun.py --device cuda  # NCCL, one GPU per process

`pipeline` finds encoder and language model, cuts the latter, and nests the encoder's work into the pipeline's schedule. The
model learns to tell which of three textures an image shows; some samples are text alone. Rank 0 trains an untouched copy on
the same batches, and the losses must agree.
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

import ultraep_compile

IMAGE, PATCHES, LENGTH, SAMPLES = 60, 16, 22, 16  # token id of an image's rows; rows of an image; tokens; batch


def make_model() -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def make_batch(number: int, device: torch.device) -> dict[str, Tensor]:
    """Questions with an image of horizontal, vertical or no stripes, and the answer; every fourth sample has no image."""
    g = torch.Generator().manual_seed(number)
    kind = torch.randint(0, 3, (SAMPLES,), generator=g)
    ids = torch.randint(10, 50, (SAMPLES, LENGTH), generator=g)
    seen = torch.arange(SAMPLES) % 4 != 3
    ids[seen, 1 : 1 + PATCHES] = IMAGE
    ids[:, -1] = torch.where(seen, kind, 5)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    stripes = (torch.arange(16) // 2 % 2).float() * 2 - 1
    pictures = torch.stack([stripes[:, None].expand(16, 16), stripes[None].expand(16, 16), torch.zeros(16, 16)])
    pixels = pictures[kind[seen]][:, None].expand(-1, 3, -1, -1) + 0.3 * torch.randn(
        int(seen.sum()), 3, 16, 16, generator=g
    )
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def train(steps: int, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = make_model().to(device)
    untouched = copy.deepcopy(model)
    whole = sum(p.numel() for p in model.parameters())

    # All that a pipeline takes.
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("pp",))
    pipe = ultraep_compile.pipeline(model, mesh, microbatches=2 * ranks, inputs=make_batch(0, device))
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=2e-3)

    reference = torch.optim.AdamW(untouched.parameters(), lr=2e-3)
    first = last = 0.0
    for number in range(steps):
        batch = make_batch(number, device)
        optimizer.zero_grad()
        result = pipe.step(batch)  # forward and backward
        ultraep_compile.clip_grad_norm_(pipe.parameters(), 1.0)
        optimizer.step()
        last = float(result)
        first = first or last
        if rank == 0:
            reference.zero_grad()
            expected = untouched(**batch).loss
            expected.backward()
            nn.utils.clip_grad_norm_(untouched.parameters(), 1.0)
            reference.step()
            print(f"step {number}: loss {last:.5f}, on one process without us {expected.item():.5f}", flush=True)
            assert abs(last - expected.item()) <= 1e-3 * abs(expected.item())
    if rank == 0:
        print(pipe.explain())
        assert last < first, "it does not learn"
        held = sum(p.numel() for p in pipe.parameters())
        print(f"ok: {ranks} processes, this one with {held:,} of {whole:,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description="A nested pipeline under torchrun.")
    parser.add_argument("--steps", type=int, default=8)
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
        train(chosen.steps, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
