"""Every error a user can meet. Each message ends in what to do; `assert` is kept for our own bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UltraEPError(Exception):
    """Base of all errors raised for a mistake that the user can mend."""


class OptionError(UltraEPError, ValueError):
    """An option of the backend, the decorator or a command has a wrong name or value."""


class ArgumentError(UltraEPError, TypeError):
    """A function was given something of another kind than it works on, such as no model or no mesh."""


class ForwardError(UltraEPError, RuntimeError):
    """A model's own forward raised on the inputs that it was given; the cause is what it raised."""


class TopologyError(UltraEPError, ValueError):
    """Ranks, experts, slots and process group do not fit together."""


class RoutingError(UltraEPError, ValueError):
    """The router produced scores or expert ids that no expert can serve."""


class DerivativeError(UltraEPError, NotImplementedError):
    """A derivative is asked for that balanced experts do not have: a second one, or one in forward mode."""


class LoadsError(UltraEPError, ValueError):
    """A load matrix has a wrong shape, type or sign."""


class SiteCountError(UltraEPError):
    """Fewer or more MoE layers were rewritten than the caller said there are."""


class TargetError(UltraEPError, ValueError):
    """A command's TARGET does not import, or does not give a model."""


class TraceError(UltraEPError, ValueError):
    """A trace or plan file is corrupt, foreign, or of another version."""


class ScheduleError(UltraEPError, ValueError):
    """A pipeline problem is impossible, or a schedule breaks one of its rules."""


class PartsError(UltraEPError, ValueError):
    """A model cannot be taken apart for a pipeline as asked, or a batch cannot be divided."""


class PipelineError(UltraEPError, ValueError):
    """A pipeline cannot run a model or a batch as asked, or its ranks were not given the same."""


class ShardingError(UltraEPError, ValueError):
    """The experts of a model cannot be divided over the ranks as asked."""


class VerificationError(UltraEPError):
    """A rewritten model does not compute what the unmodified model computes."""


class PoolError(UltraEPError, ValueError):
    """A region of symmetric memory is unknown, differs between ranks, or is used outside its bounds or after close."""


class PeerTimeoutError(UltraEPError, TimeoutError):
    """A wait for another rank passed its deadline, or that rank is gone; what depended on it was not used."""


def need_model(model: object, function: str) -> None:
    """Refuse what is no module.

    Raises: ArgumentError.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}, not an instance" if isinstance(model, type) else type(model).__name__
        raise ArgumentError(f"{function} was given {what}. Give it a model: a torch.nn.Module.")


def nearest(name: str, known: Iterable[str]) -> str:
    """A ` Did you mean 'x'?` clause for an unknown name, or the list of known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
