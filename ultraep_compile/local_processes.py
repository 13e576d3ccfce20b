"""Several processes on this machine, joined by gloo, that report to the one that started them."""

from __future__ import annotations

import queue as queues
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ultraep_compile.errors import OptionError, UltraEPError

Send = Callable[[Any], None]


def run_local(processes: int, function: Callable[..., Any], arguments: tuple, show: Callable[[Any], None]) -> Any:
    """Run `function(rank, send, *arguments)` on every rank of a fresh gloo group, one thread each.

    Args:
        function: importable by name, as are its arguments and what it returns.
        show: called here with everything that ranks send, as they send it.
    Returns: what rank 0 returned.
    Raises: OptionError for a mistake of the user that a rank found; RuntimeError if a process died otherwise.
    """
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    messages = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        fixed = (processes, str(Path(folder) / "store"), messages, function, arguments)
        workers = [context.Process(target=_worker, args=(r, *fixed), daemon=True) for r in range(processes)]
        for w in workers:
            w.start()
        try:
            return _listen(workers, messages, show)
        finally:
            for w in workers:
                w.kill()
                w.join()


def _listen(workers: list[Any], messages: Any, show: Callable[[Any], None]) -> Any:
    """Until all are done: pass on what they send, keep what rank 0 returns."""
    result = None
    while any(w.is_alive() for w in workers) or not messages.empty():
        try:
            kind, value = messages.get(timeout=0.2)
        except queues.Empty as silence:
            if any(w.exitcode not in (None, 0) for w in workers):
                raise RuntimeError("a process of the demo died; its error is printed above") from silence
            continue
        if kind == "mistake":
            raise OptionError(value)
        if kind == "result":
            result = value
        else:
            show(value)
    return result


def _worker(
    rank: int, processes: int, store: str, messages: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        result = function(rank, lambda value: messages.put(("shown", value)), *arguments)
    except UltraEPError as mistake:
        messages.put(("mistake", str(mistake)))
        raise SystemExit(2) from None
    if rank == 0:
        messages.put(("result", result))
    dist.barrier()
    dist.destroy_process_group()
