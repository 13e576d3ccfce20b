"""The planners by name. A planner decides which copies exist and how many tokens each computes."""

from __future__ import annotations

from collections.abc import Callable

from numpy.typing import NDArray

from ultraep_compile.errors import OptionError, nearest
from ultraep_compile.planner.placement import Placement

Planner = Callable[[NDArray, int], Placement]  # (counts_RE int64 [R, E], slots per rank) -> Placement
PLANNERS: dict[str, Planner] = {}


def register(name: str) -> Callable[[Planner], Planner]:
    """Make a planner known to `make_plan` and to the `planner` option."""

    def add(planner: Planner) -> Planner:
        PLANNERS[name] = planner
        return planner

    return add


def planner_by_name(name: str) -> Planner:
    """The planner, or an OptionError that names the nearest one."""
    if name not in PLANNERS:
        raise OptionError(f"There is no planner {name!r}. {nearest(str(name), PLANNERS)}")
    return PLANNERS[name]
