"""Run a function on several gloo processes and bring back what each returned.

The processes are forked from a server that has imported what is slow to import and has run nothing else, so that they
start in a tenth of a second instead of several: importing torch's compiler and transformers cost more than most checks. Where
there is a GPU they are started afresh.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.distributed.fake_pg import FakeStore

_SLOW_TO_IMPORT = (
    "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict", "transformers.modeling_utils", "ultraep_compile.backend",
)  # fmt: skip


def start_processes(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Start `function(rank, *args)` on every rank with one thread and this process's environment; returns the processes.

    They are daemons. What the environment decides when torch or triton is imported is as when the first were started.
    """
    in_a_fork = os.environ.get("TRITON_INTERPRET") == "1"  # of `tests.interpreter`: it has imported what is needed
    # what is slow to import touches CUDA where there is any, and no fork can use it then
    method = "fork" if in_a_fork else "spawn" if torch.cuda.is_available() else "forkserver"
    context = mp.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([m for m in _SLOW_TO_IMPORT if importlib.util.find_spec(m.partition(".")[0])])
    environment = dict(os.environ)
    processes = [
        context.Process(target=_started, args=(environment, function, r, *args), daemon=True) for r in range(world)
    ]
    for p in processes:
        p.start()
    return processes


def _started(environment: dict[str, str], function: Callable[..., Any], *args: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def _process(rank: int, world: int, store: str, results: str, function: Callable[..., Any], args: tuple) -> None:
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
        processes = start_processes(world, _process, world, store, results, function, args)
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
