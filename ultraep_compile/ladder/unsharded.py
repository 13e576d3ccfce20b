"""Parameters that FSDP2 has divided, whole for as long as a layer is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def unsharded(model: nn.Module, *paths: str) -> Iterator[None]:
    """All parameters inside of these modules are whole, and forwards leave them so. All ranks must come here alike.

    What FSDP2's hooks do around a forward (gather, divide again) would happen below a recording, and not at all where a
    forward is called without hooks.
    """
    managers = list(dict.fromkeys(m for path in paths for m in _managers(model, path)))
    with contextlib.ExitStack() as stack:
        for module in managers:
            module.unshard()  # pyright: ignore[reportCallIssue]
            stack.callback(module.reshard)  # pyright: ignore[reportArgumentType]
            stack.enter_context(_without_hooks(module))
        yield


def _managers(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """FSDP2's modules inside of one, and the one that holds its remaining parameters."""
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        above = model.get_submodule(".".join(parts[:length]))
        if isinstance(above, FSDPModule):
            yield above
            break
    yield from (m for m in model.get_submodule(path).modules() if isinstance(m, FSDPModule))


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    state = module._get_fsdp_state()  # pyright: ignore[reportCallIssue]
    around = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    handles: list[RemovableHandle] = [h for handle in around for h in getattr(handle, "handles", (handle,))]
    before = [(hooks, dict(hooks)) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    for hooks, _ in before:
        for handle in handles:
            hooks.pop(handle.id, None)
    try:
        yield
    finally:
        for hooks, kept in before:
            hooks.clear()
            hooks.update(kept)
