"""Process groups by name, as compiled graphs know them. A name may come to stand for another group: one that was made again."""

from __future__ import annotations

import torch.distributed as dist

from ultraep_compile.errors import TopologyError


def resolve(name: str) -> dist.ProcessGroup:
    """The group that has this name now. Raises TopologyError where there is none."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore
    except (RuntimeError, ValueError):
        raise TopologyError(
            f"the process group {name!r} is gone: it was destroyed, and none of that name was made since. Make it again; if its name "
            "is another one then, call torch._dynamo.reset() and compile with the new group (a sharded model: call shard_experts "
            "again with the new mesh first)."
        ) from None


def is_alive(group: dist.ProcessGroup) -> bool:
    """Can this very group still be used?"""
    try:
        return resolve(group.group_name) is group
    except (TopologyError, RuntimeError, ValueError):
        return False
