"""Mistakes of a router that are noticed without waiting for the device: raised at the layer's next call.

On a GPU, looking at ids and scores before using them would stop the host in every layer. Instead the device notes the
first one that is wrong, and copies the note to the host on its way. Until it is read, outputs that would depend on a
wrong id are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultraep_compile.errors import RoutingError

_notes: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}


def check_later(ids: Tensor, scores: Tensor | None, experts: int, layer: str) -> None:
    """Raise what an earlier call of this layer did wrong, and have this call's choice looked at."""
    from ultraep_compile.codegen.guard_kernels import NOTHING, note_bad

    key = (layer, ids.device)
    if key not in _notes:
        _notes[key] = torch.full((2,), NOTHING, device=ids.device), torch.full((2,), NOTHING).pin_memory()
    on_device, on_host = _notes[key]
    _raise_if_noted(key, ids.shape[-1], scores)
    note_bad(ids, scores, experts, on_device)
    on_host.copy_(on_device, non_blocking=True)


def check_now() -> None:
    """Wait for all devices and raise what has been noted; for the end of a run."""
    for key in list(_notes):
        torch.cuda.synchronize(key[1])
        _raise_if_noted(key, 1, None)


def _raise_if_noted(key: tuple[str, torch.device], choices: int, scores: Tensor | None) -> None:
    from ultraep_compile.codegen.guard_kernels import NOTHING

    bad_id, bad_score = _notes[key][1].tolist()
    if bad_id == bad_score == NOTHING:
        return
    layer, _ = key
    del _notes[key]
    if bad_id != NOTHING:
        raise RoutingError(
            f"{layer}: in an earlier call, pair {bad_id} (token {bad_id // choices}, choice {bad_id % choices}) was routed to "
            "an expert that this layer does not have, or one that the token had named before in a layer that keeps one of both "
            "results; the outputs of such pairs were NaN. Correct the router (or the table of expert ids) that produced it."
        )
    column = f" (token {bad_score // scores.shape[-1]}, expert {bad_score % scores.shape[-1]})" if scores is not None else ""
    raise RoutingError(
        f"{layer}: in an earlier call, score {bad_score}{column} of the router was not finite. No expert can be chosen by "
        "such a score; look for an overflow before this layer (learning rate, loss scale, a bad batch) and repair the step."
    )
