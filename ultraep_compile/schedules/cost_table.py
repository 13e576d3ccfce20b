"""Costs as a user writes them (two numbers, or a JSON file of lists) turned into a problem.

Keys of the file, all optional: `llm_forward`, `llm_backward`, `encoder_forward`, `encoder_backward`,
`generator_forward`, `generator_backward`: lists of length M; `encoder_items`, `generator_items`: M lists of
the sizes of a microbatch's items (they share its cost in proportion); `encoder_feeds`: the stages that read
the features; `encoders`, `generators`: lists of objects with the keys forward, backward, items, feeds, name,
where there are several. A frozen encoder has a backward of zeros."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultraep_compile.errors import OptionError, ScheduleError, nearest
from ultraep_compile.schedules.problem import Encoder, Generator, Problem, check_costs, place_virtual

LISTS = tuple(f"{unit}_{way}" for unit in ("encoder", "generator", "llm") for way in ("forward", "backward"))
KEYS = (*LISTS, "encoder_items", "generator_items", "encoder_feeds", "encoders", "generators")
UNIT_KEYS = ("forward", "backward", "items", "feeds", "name")


def read_costs(path: Path) -> dict[str, Any]:
    """The object in a cost file, its keys checked."""
    try:
        table = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"The cost file {path} cannot be read: {error}.") from error
    except ValueError as error:
        raise OptionError(f"The cost file {path} is not JSON: {error}.") from error
    if not isinstance(table, dict):
        raise OptionError(f"The cost file {path} must hold an object of lists, not a {type(table).__name__}.")
    for key in table:
        if key not in KEYS:
            raise OptionError(f"The cost file {path} has an unknown key {key!r}. {nearest(key, KEYS)}")
    return table


def parse_pair(option: str, text: str) -> tuple[float, float]:
    """`F,B` as two numbers."""
    parts = text.split(",")
    try:
        forward, backward = (float(part) for part in parts)
    except ValueError:
        raise OptionError(
            f"{option} is {text!r}. Give forward and backward as two numbers, like 1,2."
        ) from None
    check_costs(option, (forward, backward), 2)
    return forward, backward


def add_pair(table: dict[str, Any], unit: str, option: str, text: str, microbatches: int) -> None:
    """Put an option's two numbers into the table for every microbatch."""
    if any(f"{unit}_{way}" in table for way in ("forward", "backward")) or f"{unit}s" in table:
        raise OptionError(f"{option} and the cost file both give {unit} costs. Leave one out.")
    forward, backward = parse_pair(option, text)
    table[f"{unit}_forward"], table[f"{unit}_backward"] = [forward] * microbatches, [backward] * microbatches


def problem_from_table(
    table: dict[str, Any],
    stages: int,
    microbatches: int,
    virtual: int = 1,
    placement: str = "loop",
    latency: float = 0.0,
) -> Problem:
    """The problem that a table of costs describes; the LLM costs 1 and 2 where it says nothing."""
    m = microbatches
    for unit, default in (("llm", True), ("encoder", False), ("generator", False)):
        both = [way for way in ("forward", "backward") if f"{unit}_{way}" in table]
        if len(both) == 1:
            raise ScheduleError(
                f"The costs give {unit}_{both[0]} alone. Give forward and backward (zeros if frozen)."
            )
        if default and not both:
            table = {**table, "llm_forward": [1.0] * m, "llm_backward": [2.0] * m}
    llm = [_costs(f"llm_{way}", table[f"llm_{way}"], m) for way in ("forward", "backward")]
    bare = Problem(stages, m, llm[0], llm[1], latency=latency)
    problem = place_virtual(bare, virtual, placement) if virtual != 1 or placement == "vee" else bare
    return replace(problem, encoders=_encoders(table, m), generators=_generators(table, m))


def _encoders(table: dict[str, Any], m: int) -> tuple[Encoder, ...]:
    encoders = []
    for name, fields in _units(table, "encoder"):
        forward = _costs(f"{name}_forward", fields.get("forward"), m)
        backward = _costs(f"{name}_backward", fields.get("backward"), m)
        feeds = _list(f"{name} feeds", fields.get("feeds", [0]))
        if any(isinstance(s, bool) or not isinstance(s, int) for s in feeds):
            raise ScheduleError(
                f"{name} feeds {feeds}. Give the numbers of the stages that read its features."
            )
        encoders.append(
            Encoder(forward, backward, _items(name, fields.get("items"), m), tuple(feeds), name=name)
        )
    return tuple(encoders)


def _generators(table: dict[str, Any], m: int) -> tuple[Generator, ...]:
    generators = []
    for name, fields in _units(table, "generator"):
        forward = _costs(f"{name}_forward", fields.get("forward"), m)
        backward = _costs(f"{name}_backward", fields.get("backward"), m)
        cost = tuple(a + b for a, b in zip(forward, backward, strict=True))
        generators.append(Generator(cost, _items(name, fields.get("items"), m), name=name))
    return tuple(generators)


def _units(table: dict[str, Any], unit: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, fields) of each encoder or generator."""
    units = []
    if f"{unit}_forward" in table:
        units.append((unit, {key: table[f"{unit}_{key}"] for key in UNIT_KEYS if f"{unit}_{key}" in table}))
    for i, fields in enumerate(_list(f"{unit}s", table.get(f"{unit}s", []))):
        if not isinstance(fields, dict):
            raise ScheduleError(f"{unit}s[{i}] is {fields!r}. Give an object with forward and backward.")
        for key in fields:
            if key not in UNIT_KEYS:
                raise ScheduleError(f"{unit}s[{i}] has an unknown key {key!r}. {nearest(key, UNIT_KEYS)}")
        units.append((str(fields.get("name", f"{unit}{i}")), fields))
    return units


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ScheduleError(f"{name} is {value!r}. Give a list.")
    return value


def _costs(name: str, value: Any, m: int) -> tuple[float, ...]:
    row = tuple(_list(name, value))
    check_costs(name, row, m)
    return tuple(float(x) for x in row)


def _items(name: str, value: Any, m: int) -> tuple[tuple[float, ...], ...]:
    """Sizes of items as shares of their microbatch."""
    if value is None:
        return ()
    rows = _list(f"{name}_items", value)
    if len(rows) != m:
        raise ScheduleError(f"{name}_items has {len(rows)} entries, not {m}. Give one list per microbatch.")
    shares = []
    for j, row in enumerate(rows):
        sizes = tuple(_list(f"{name}_items[{j}]", row))
        check_costs(f"{name}_items[{j}]", sizes, len(sizes))
        total = sum(sizes)
        shares.append(tuple(x / total for x in sizes) if total else ())
    return tuple(shares)
