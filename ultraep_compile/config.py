"""The options of the backend and the decorator: names, defaults, meaning, and the check of each value."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ultraep_compile.errors import OptionError, TopologyError, nearest
from ultraep_compile.ops.transport import TRANSPORTS
from ultraep_compile.planner.registry import planner_by_name

INNER_BACKENDS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `torch.compile(model, backend="ultraep", options={...})` and of `@balance(...)`."""

    ranks: int | None = None
    """Virtual ranks: slices of the tokens inside this process. None means 1 (nothing to balance: the inner backend's own
    graph) or, with a process group, its size."""

    group: dist.ProcessGroup | None = None
    """Process group over which the experts are parallel; None for virtual ranks, or where `shard_experts` set it."""

    redundant_experts: int = 2
    """Slots per rank for copies of hot experts. 2 balance almost any load; each costs the memory of one expert, shared by
    all layers."""

    planner: str = "quota"
    """How copies are planned: `quota` (best of several exact planners), or for comparison `greedy`, `eplb`, `lplb` and
    `none` (experts stay where they are)."""

    balance_from: int | str = 0
    """Tokens of one call, over all ranks, from which on a layer is planned. With fewer, as in decoding, experts compute
    where they are at home, with the same result. 0: always; `auto`: where the cost model expects copies to pay."""

    inner: str = "inductor"
    """The compiler that gets the rewritten graph: `inductor`, `aot_eager` or `eager`."""

    transport: str = "auto"
    """How processes of a group exchange tokens and weights: `collective` (gloo, NCCL), `symmetric` (Triton kernels over
    memory that all ranks can address: GPUs of one host with peer access, processes that share a GPU, or, for tests,
    processes on one CPU through shared files), or `auto`: symmetric on GPUs that can, else collective."""

    deadline_s: int = 300
    """Seconds after which a wait for another rank over symmetric memory is a `PeerTimeoutError`. The first step compiles, and
    not equally fast on all ranks."""

    expect_moe_sites: int | None = None
    """Raise unless exactly this many MoE layers are rewritten in the compiled graph; for continuous integration."""

    verify: int = 0
    """For the first so many calls, run the unmodified graph too and raise where the results differ."""

    trace: str | os.PathLike[str] | None = None
    """File (.npz) to record loads and plans to, for `ultraep-compile view`; None records nothing."""

    def __post_init__(self) -> None:
        for name in ("ranks", "redundant_experts", "expect_moe_sites", "verify"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise OptionError(f"option {name!r} is {value!r}, which is not an integer. Give a whole number.")
        if self.ranks is not None and self.ranks < 1:
            raise OptionError(f"option 'ranks' is {self.ranks}. Give 1 or more.")
        for name in ("redundant_experts", "expect_moe_sites", "verify"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise OptionError(f"option {name!r} is {value}. Give 0 or more.")
        start = self.balance_from
        if start != "auto" and (isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < 2**31):
            raise OptionError(f"option 'balance_from' is {start!r}. Give a number of tokens, 0 or more, or 'auto'.")
        planner_by_name(self.planner)
        if self.transport not in TRANSPORTS:
            raise OptionError(f"unknown transport {self.transport!r}. {nearest(self.transport, TRANSPORTS)}")
        if isinstance(self.deadline_s, bool) or not isinstance(self.deadline_s, int) or self.deadline_s < 1:
            raise OptionError(f"option 'deadline_s' is {self.deadline_s!r}. Give a whole number of seconds, 1 or more.")
        if self.inner not in INNER_BACKENDS:
            raise OptionError(f"unknown inner backend {self.inner!r}. {nearest(self.inner, INNER_BACKENDS)}")
        if self.group is not None:
            size = dist.get_world_size(self.group)
            if self.ranks is not None and self.ranks != size:
                raise TopologyError(
                    f"option 'ranks' is {self.ranks} but the process group has {size} processes. Leave 'ranks' out: with a "
                    "group, a rank is a process."
                )

    @classmethod
    def of(cls, options: Options | Mapping[str, Any] | None) -> Options:
        """Options from a mapping; an unknown name is an error that names the nearest one.

        What the mapping leaves out is read from the environment, and else has its default.
        """
        if isinstance(options, Options):
            return options
        given = dict(options or {})
        known = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option {name!r}. {nearest(name, known)}")
        return cls(**{**_from_environment(), **given})

    @property
    def disabled(self) -> bool:
        """Switched off for the whole process by ULTRAEP_COMPILE_DISABLE=1."""
        return os.environ.get("ULTRAEP_COMPILE_DISABLE", "0") not in ("", "0")

    def digest(self) -> str:
        """A short text that differs wherever the options do; stable across processes."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["group"] = self.group.group_name if self.group is not None else ""
        return hashlib.sha256(repr(sorted(values.items(), key=lambda kv: kv[0])).encode()).hexdigest()[:12]


VARIABLES = {f.name: f"ULTRAEP_COMPILE_{f.name.upper()}" for f in dataclasses.fields(Options) if f.name != "group"}
"""Environment variable of every option, for code that cannot pass options, such as transformers' Trainer."""


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in dataclasses.fields(Options):
        variable = VARIABLES.get(option.name, "")
        text = os.environ.get(variable, "")
        if not text:
            continue
        found[option.name] = text
        if "int" in str(option.type) and not ("str" in str(option.type) and not text.lstrip("-").isdigit()):
            try:
                found[option.name] = int(text)
            except ValueError:
                raise OptionError(f"{variable} is {text!r}, which is not an integer. Give a whole number.") from None
    return found
