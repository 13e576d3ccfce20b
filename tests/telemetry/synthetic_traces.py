"""Random loads and legal plans, without the planner."""

from __future__ import annotations

import torch

from ultraep_compile.telemetry import Recorder, Trace


def random_counts(seed: int, ranks: int, experts: int, rows: int = 400, skew: float = 1.2) -> torch.Tensor:
    """int64 [R, E]: rows per source rank, experts drawn from a log-normal."""
    generator = torch.Generator().manual_seed(seed)
    popularity = (skew * torch.randn(experts, generator=generator)).exp()
    ids = torch.multinomial(popularity.expand(ranks, -1), rows, replacement=True, generator=generator)
    return torch.zeros(ranks, experts, dtype=torch.int64).scatter_add_(1, ids, torch.ones_like(ids))


def simple_plan(counts_RE: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A legal plan: again and again the busiest rank fills a free slot of the idlest."""
    ranks, experts = counts_RE.shape
    masters = experts // ranks
    shares = torch.zeros(ranks, ranks, masters + slots, dtype=torch.int64)
    shares[:, :, :masters] = counts_RE.view(ranks, ranks, masters)
    slot_expert = torch.full((ranks, slots), -1, dtype=torch.int32)
    for _ in range(ranks * slots):
        load = shares.sum((0, 2))
        free = (slot_expert < 0).any(1)
        if not free.any():
            break
        busy, idle = int(load.argmax()), int(torch.where(free, load, load.max() + 1).argmin())
        local = int(shares[:, busy, :masters].sum(0).argmax())
        expert = busy * masters + local
        if busy == idle or bool((slot_expert[idle] == expert).any()):
            break
        slot = int((slot_expert[idle] < 0).nonzero()[0])
        wanted = int(load[busy] - load[idle]) // 2
        slot_expert[idle, slot] = expert
        for source in range(ranks):
            take = min(wanted, int(shares[source, busy, local]))
            shares[source, busy, local] -= take
            shares[source, idle, masters + slot] += take
            wanted -= take
    return slot_expert, shares.view(ranks, -1).to(torch.int32)


def record_run(recorder: Recorder, layers: int = 3, microbatches: int = 5, seed: int = 0) -> Trace:
    """Layers of different sizes, with realised loads and times on some of the records."""
    for microbatch in range(microbatches):
        for layer in range(layers):
            ranks, experts, slots = 4, 8 + 8 * (layer % 2), 1 + layer % 2
            counts = random_counts(seed + 100 * microbatch + layer, ranks, experts)
            slot_expert, shares = simple_plan(counts, slots)
            name, seconds = f"layers.{layer}.mlp", {"plan": 1e-3}
            number = recorder.record(name, counts, slot_expert, shares, seconds=seconds)
            if microbatch % 2 == 0:
                recorder.add(number, realised_P=shares.sum(0), seconds={"replicate": 2e-3}, rounds=1)
                recorder.add(number, seconds={"plan": 0.5e-3})
    return recorder.trace()
