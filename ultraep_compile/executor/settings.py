"""How a pipeline runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ultraep_compile.errors import OptionError, nearest
from ultraep_compile.schedules import METHODS, Schedule
from ultraep_compile.schedules.base import BASES

_CHOICES = {"method": METHODS, "base": BASES, "costs": ("estimated", "measured"), "generator": ("whole", "split")}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of `ultraep_compile.pipeline`."""

    microbatches: int
    """Into how many microbatches the samples of a batch are divided."""
    method: str = "nested"
    """How the schedule is planned: nested, or a baseline (colocated, encoder-first, flush, recompute, optimus, uneven)."""
    base: str = "1f1b"
    """The schedule of the language model alone: 1f1b, gpipe, interleaved, zero-bubble, dualpipev."""
    virtual: int = 1
    """Stages per rank."""
    encoder_memory: float | None = None
    """Encoder microbatches whose activations a rank may hold; None: the fewest that cost no time."""
    generator: str = "whole"
    """`whole`: every rank runs the generator on whole microbatches; `split`: samples of one microbatch go to all ranks."""
    generator_group: int = 0
    """Microbatches that wait for the generator together; 0: one per rank (whole), one (split)."""
    deadline: float = 300.0
    """Seconds that another rank may take before a wait ends with an error."""
    costs: str = "estimated"
    """What plans are made from: `estimated` from parameters and sizes; `measured`: from the second step's times."""
    schedule: Schedule | None = None
    """A schedule to follow in every step, instead of planning one for each batch."""
    compare_batches: bool = True
    """Compare a checksum of every value of the ranks' batches when a step begins: ranks of one pipeline need the same batch."""
    trace: bool = False
    """Measure every operation of every step (`Pipeline.timeline`). On a GPU this waits for the device after each step."""
    measure_memory: bool = False
    """Count the bytes of activations that autograd saves (`StepResult.peak_bytes`)."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise OptionError(f"{name!r} is {value!r}. {nearest(str(value), known)}")
        for name in ("microbatches", "virtual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name!r} is {value!r}. Give a whole number of at least 1.")
        if self.method == "disttrain":
            raise OptionError(
                "'method' is 'disttrain', which cuts the model for ranks of its own. It can be planned, not run."
            )
        if not self.deadline > 0:
            raise OptionError(f"'deadline' is {self.deadline!r}. Give the seconds that a peer may take, more than 0.")

    @classmethod
    def of(cls, microbatches: int, given: Mapping[str, Any]) -> Settings:
        """Settings from keyword arguments; an unknown one is refused."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"There is no setting {name!r} of a pipeline. {nearest(name, known)}")
        return cls(microbatches, **given)
