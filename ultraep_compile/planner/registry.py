"""The planners by name. A planner decides which copies exist and how many tokens each computes.

Planners of other systems place their copies on earlier counts and divide the tokens that come by a rule of their
own. They register that rule as `divide`; called as a planner they take the counts at hand for their history.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from numpy.typing import NDArray

from ultraep_compile.errors import OptionError, nearest
from ultraep_compile.planner.placement import Placement

# (counts_RE int64 [R, E], slots of each rank, or one number for all) -> Placement
Planner = Callable[[NDArray, int | NDArray], Placement]
P = TypeVar("P", bound=Planner)
Divide = Callable[[NDArray, NDArray], NDArray]  # (counts_RE, slot_expert_RS) -> quota_P int64 [P]
PLANNERS: dict[str, Planner] = {}
DIVIDE: dict[str, Divide] = {}
MOST_TOKENS = 2**24  # that a copy may cost: keys of the kernels hold this times the ranks
IDEAL = "ideal"  # a figure beside the planners: what a router with perfectly even counts would cost


def register(name: str, divide: Divide | None = None) -> Callable[[P], P]:
    """Make a planner known to `make_plan` and to the `planner` option; `divide` marks one that uses history."""

    def add(planner: P) -> P:
        PLANNERS[name] = planner
        if divide is not None:
            DIVIDE[name] = divide
        return planner

    return add


def split_name(name: str) -> tuple[str, int | None]:
    """`quota:2000` as ("quota", 2000): a copy takes as long as 2000 tokens. Other names have no number.

    Where a number comes from: `cost_model.copy_tokens`, printed by `replay` for the layers at hand.
    """
    base, colon, number = str(name).partition(":")
    if not colon:
        return base, None
    if base != "quota" or not (number.isascii() and number.isdigit() and int(number) <= MOST_TOKENS):
        raise OptionError(
            f"The planner {name!r} is not known. Only quota takes a number: quota:2000 makes a copy where it saves the "
            f"fullest rank more than the 2000 tokens that could be computed while it travels (0 to {MOST_TOKENS})."
        )
    return base, int(number)


def planner_by_name(name: str) -> Planner:
    """The planner, or an OptionError that names the nearest one."""
    name, copy_tokens = split_name(name)
    if name == IDEAL:
        raise OptionError(
            "The planner 'ideal' is a figure and no plan: what a router with perfectly even counts would cost. "
            "Compare with it in `ultraep-compile plan` and `replay`, and run with 'quota'."
        )
    if name not in PLANNERS:
        raise OptionError(f"There is no planner {name!r}. {nearest(str(name), PLANNERS)}")
    planner: Callable[..., Placement] = PLANNERS[name]
    return planner if copy_tokens is None else partial(planner, copy_tokens=copy_tokens)


def uses_history(name: str) -> bool:
    """Whether the planner is meant to place its copies on earlier counts."""
    return name in DIVIDE
