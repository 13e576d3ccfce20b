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
    """Seconds after which a wait for another rank is a `PeerTimeoutError`, over every transport. The first step compiles, and
    not equally fast on all ranks."""

    expect_moe_sites: int | None = None
    """Raise unless exactly this many MoE layers run balanced in every call of the compiled model, over all of its graphs; for
    continuous integration."""

    verify: int = 0
    """For the first so many calls, run the unmodified graph too and raise where the results differ."""

    watch: bool = False
    """At steps 1, 2, 4, ... 1024 and about every 1000th, compare one layer in turn with the module's own forward on what the
    step gave it, gradients included in training, and raise where they differ by more than rounding."""

    trace: str | os.PathLike[str] | None = None
    """File (.npz) to record loads and plans to, for `ultraep-compile view`; None records nothing."""

    def __post_init__(self) -> None:
        if self.ranks is not None:
            _check_number("ranks", self.ranks, 1)
        for name in ("redundant_experts", "verify"):
            _check_number(name, getattr(self, name))
        check_site_count(self.expect_moe_sites)
        if not isinstance(self.watch, bool):
            raise OptionError(f"option 'watch' is {self.watch!r}. Give True or False.")
        start = self.balance_from
        if start != "auto" and (isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < 2**31):
            raise OptionError(f"option 'balance_from' is {start!r}. Give a number of tokens, 0 or more, or 'auto'.")
        for name in ("planner", "transport", "inner"):
            if not isinstance(getattr(self, name), str):
                kind = type(getattr(self, name)).__name__
                raise OptionError(f"option {name!r} is {kind}, not a name. Give one of its names as text.")
        if self.trace is not None and not isinstance(self.trace, (str, os.PathLike)):
            raise OptionError(f"option 'trace' is {self.trace!r}, which is not a path. Give the name of a file, or None.")
        planner_by_name(self.planner)
        if self.transport not in TRANSPORTS:
            raise OptionError(f"unknown transport {self.transport!r}. {nearest(self.transport, TRANSPORTS)}")
        _check_number("deadline_s", self.deadline_s, 1)
        if self.inner not in INNER_BACKENDS:
            raise OptionError(f"unknown inner backend {self.inner!r}. {nearest(self.inner, INNER_BACKENDS)}")
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            cure = "Give mesh.get_group()" if hasattr(self.group, "get_group") else "Give a torch.distributed process group"
            raise OptionError(f"option 'group' is {type(self.group).__name__}, not a process group. {cure}.")
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
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options= is {type(options).__name__}. Give a dict of option names and values.")
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


def _check_number(name: str, value: object, least: int = 0) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"option {name!r} is {value!r}, which is not an integer. Give a whole number.")
    if value < least:
        raise OptionError(f"option {name!r} is {value}. Give {least} or more.")


def check_site_count(expected: object) -> None:
    """Refuse a number of expected MoE layers that no model can have. None: nothing is expected.

    Raises: OptionError.
    """
    if expected is not None:
        _check_number("expect_moe_sites", expected)


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
        if str(option.type) == "bool":
            found[option.name] = text.lower() not in ("0", "false", "no", "off")
        if "int" in str(option.type) and not ("str" in str(option.type) and not text.lstrip("-").isdigit()):
            try:
                found[option.name] = int(text)
            except ValueError:
                raise OptionError(f"{variable} is {text!r}, which is not an integer. Give a whole number.") from None
    return found
