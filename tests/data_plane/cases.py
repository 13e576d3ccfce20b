"""Plans and bundles that the data plane is tested with, on the CPU and on a GPU."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ultraep_compile.codegen.bundle import Bundle, Part
from ultraep_compile.codegen.routes import sender_reference

WEIGHTS = (
    Part((24, 40), torch.bfloat16),
    Part((7,), torch.bfloat16),  # 14 bytes: copied two bytes at a time
    Part((3, 11), torch.float8_e4m3fn),  # 33 bytes: byte by byte
    Part((5, 13), torch.float32),  # 260 bytes: four at a time
    Part((0, 4), torch.bfloat16),
    Part((70, 130), torch.float32),  # more than one tile, more than one small chunk, with a tail
    Part((), torch.int64),
)


GRADS = (
    Part((24, 40), torch.float32),
    Part((7,), torch.float32),
    Part((3, 11), torch.bfloat16),
    Part((0,), torch.float32),
    Part((70, 130), torch.float32),
    Part((71, 129), torch.bfloat16),
)


def random_plan(ranks: int, masters: int, slots: int, seed: int, hot: float = 0.5) -> Tensor:
    """int32 [R, S]: no expert twice on a rank nor on its home; `hot`: how likely a slot takes the most copied expert."""
    rng = random.Random(seed)
    plan = torch.full((ranks, slots), -1, dtype=torch.int32)
    favourite = rng.randrange(ranks * masters)
    for r in range(ranks):
        for s in range(slots):
            expert = favourite if rng.random() < hot else rng.randrange(ranks * masters)
            if rng.random() < 0.85 and expert // masters != r and expert not in plan[r].tolist():
                plan[r, s] = expert
    return plan


def filled(parts: tuple[Part, ...], experts: int, seed: int, device: str = "cpu") -> list[Tensor]:
    """Random bytes, [E, ...] per part."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for p in parts:
        raw = torch.randint(0, 256, (experts * p.nbytes,), dtype=torch.uint8, generator=g)
        made.append(raw.view(p.dtype).view(experts, *p.shape).to(device))
    return made


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def senders(bundle: Bundle, plan: Tensor, mode: str) -> list[int]:
    if mode == "direct":
        return [-1] * plan.numel()
    return sender_reference(plan.tolist(), bundle.masters, force=mode == "relay")
