"""Operations and schedules as values: they print, parse back, serialise and compare.

An operation prints as in torch.distributed.pipelining, stage then kind then microbatch: `2F0` is the forward
of microbatch 0 on stage 2. Kinds: F forward, B whole backward, I and W its input and weight part, EF and EB
forward and backward of an encoder, G forward and backward of a generator. For the last three the number in
front is the index of the encoder or generator. An operation on items lists (microbatch.item):
`0EF(3.0,3.1,5.2)`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.problem import NO_CAPS, Caps, Encoder, Generator, Problem

KINDS = ("EF", "EB", "F", "B", "I", "W", "G")
_OP = re.compile(r"(\d+)(EF|EB|F|B|I|W|G)(?:(\d+)|\((\d+\.\d+(?:,\d+\.\d+)*)\))")
_TITLE = "# pipeline schedule, format 1"


class Op(NamedTuple):
    """One operation of one rank."""

    kind: str
    stage: int  # stage of the LLM, or index of the encoder or generator
    microbatch: int  # -1 if the operation works on items
    items: tuple[tuple[int, int], ...] = ()  # (microbatch, item)

    def __str__(self) -> str:
        if not self.items:
            return f"{self.stage}{self.kind}{self.microbatch}"
        return f"{self.stage}{self.kind}({','.join(f'{j}.{i}' for j, i in self.items)})"

    @property
    def microbatches(self) -> tuple[int, ...]:
        """The microbatches that it works on, each once."""
        if not self.items:
            return (self.microbatch,)
        return tuple(dict.fromkeys(j for j, _ in self.items))


def parse_op(text: str) -> Op:
    """The inverse of str(op).

    >>> parse_op("2F0")
    Op(kind='F', stage=2, microbatch=0, items=())
    """
    match = _OP.fullmatch(text)
    if match is None:
        raise ScheduleError(
            f"{text!r} is not an operation. Write stage, kind and microbatch, for example 2F0."
        )
    stage, kind, microbatch, items = match.groups()
    if items is None:
        return Op(kind, int(stage), int(microbatch))
    pairs = (pair.split(".") for pair in items.split(","))
    return Op(kind, int(stage), -1, tuple((int(j), int(i)) for j, i in pairs))


@dataclass(frozen=True, slots=True)
class Schedule:
    """For each rank the operations in the order in which it runs them."""

    problem: Problem
    ranks: tuple[tuple[Op, ...], ...]
    method: str = "custom"
    caps: Caps = NO_CAPS  # what the builder promises never to exceed
    note: str = ""  # what was chosen and why

    def __str__(self) -> str:
        head = {
            "method": self.method,
            "note": self.note,
            "caps": asdict(self.caps),
            "problem": asdict(self.problem),
        }
        lines = [_TITLE, "# " + json.dumps(head)]
        lines += [f"rank {r}: {' '.join(map(str, ops))}" for r, ops in enumerate(self.ranks)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """All of it, as one JSON object. `from_json` is the inverse."""
        value = asdict(self)
        value["ranks"] = [[str(op) for op in ops] for ops in self.ranks]
        return json.dumps(value)


def parse_ranks(text: str) -> tuple[tuple[Op, ...], ...]:
    """The `rank r: op op ...` lines of a printed schedule."""
    ranks = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, ops = line.partition(":")
        if not colon or name.strip() != f"rank {len(ranks)}":
            raise ScheduleError(f"Expected a line 'rank {len(ranks)}: ...', found {line[:40]!r}.")
        ranks.append(tuple(parse_op(word) for word in ops.split()))
    return tuple(ranks)


def parse_schedule(text: str) -> Schedule:
    """The inverse of str(schedule)."""
    lines = text.splitlines()
    if len(lines) < 2 or lines[0] != _TITLE or not lines[1].startswith("# {"):
        raise ScheduleError(f"Not a printed schedule: it must start with {_TITLE!r}.")
    head = _load(lines[1][2:])
    return schedule_from_fields(head, parse_ranks("\n".join(lines[2:])))


def from_json(text: str) -> Schedule:
    """The inverse of Schedule.to_json."""
    value = _load(text)
    ranks = value.get("ranks")
    if not isinstance(ranks, list):
        raise ScheduleError("Not a schedule: the JSON object has no list 'ranks'.")
    return schedule_from_fields(value, tuple(tuple(parse_op(op) for op in ops) for ops in ranks))


def replace_microbatches(ops: Iterable[Op], names: tuple[int, ...]) -> list[Op]:
    """Each LLM operation on microbatch j turned into the same on microbatch names[j]."""
    return [Op(op.kind, op.stage, names[op.microbatch]) for op in ops]


def _load(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ScheduleError(f"Not a schedule: {error}.") from error
    if not isinstance(value, dict) or not isinstance(value.get("problem"), dict):
        raise ScheduleError("Not a schedule: no object with a 'problem'.")
    return value


def schedule_from_fields(head: Mapping[str, Any], ranks: tuple[tuple[Op, ...], ...]) -> Schedule:
    """A schedule from the fields of its JSON form and its operations."""
    try:
        fields = {key: _tuples(value) for key, value in head["problem"].items()}
        fields["encoders"] = tuple(Encoder(**_fields(e)) for e in head["problem"].get("encoders", ()))
        fields["generators"] = tuple(Generator(**_fields(g)) for g in head["problem"].get("generators", ()))
        fields["caps"] = Caps(**_fields(head["problem"].get("caps", {})))
        problem = Problem(**fields)
        caps = Caps(**_fields(head.get("caps", {})))
    except (TypeError, AttributeError) as error:
        raise ScheduleError(f"Not a schedule of this version: {error}.") from error
    return Schedule(problem, ranks, str(head.get("method", "custom")), caps, str(head.get("note", "")))


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    return {key: _tuples(entry) for key, entry in value.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value
