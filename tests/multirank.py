"""Run a function on several gloo processes and bring back what each returned."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.distributed.fake_pg import FakeStore


def _process(rank: int, world: int, store: str, results: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=300)
    )
    try:
        outcome = ("ok", function(rank, *args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    torch.save(outcome, f"{results}.{rank}")
    if outcome[0] == "ok":
        dist.barrier()
        dist.destroy_process_group()
    else:
        os._exit(1)  # the others must not wait for this rank


@contextlib.contextmanager
def fake_group(world: int) -> Iterator[dist.ProcessGroup]:
    """A group in which this process is rank 0 and nobody else exists: for what must not get as far as an exchange."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, *args)` on every rank of a fresh gloo group; its results by rank. Raises with all tracebacks."""
    with tempfile.TemporaryDirectory() as folder:
        store, results = os.path.join(folder, "store"), os.path.join(folder, "result")
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_process, args=(r, world, store, results, function, args), daemon=True)
            for r in range(world)
        ]
        for p in processes:
            p.start()
        failed = False
        for p in processes:
            p.join(timeout=400)
            failed |= p.exitcode != 0
            if failed:
                for q in processes:
                    q.join(timeout=5)
                    q.kill()
        outcomes = [
            torch.load(f"{results}.{r}", weights_only=False) if os.path.exists(f"{results}.{r}") else ("error", "died")
            for r in range(world)
        ]
    errors = [f"rank {r}:\n{text}" for r, (kind, text) in enumerate(outcomes) if kind == "error"]
    if errors or failed:
        raise AssertionError("\n".join(errors) or "a process died")
    return [value for _, value in outcomes]
