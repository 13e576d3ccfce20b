"""The table of rules: op name -> functions tried in turn. Ops without a rule that applies are probed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ultraep_compile.passes.lift.values import Call

if TYPE_CHECKING:
    from ultraep_compile.passes.lift.lifter import Lifter

Rule = Callable[["Lifter", Call], Any]
TABLE: dict[str, list[Rule]] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule: it returns a value (or a tuple of values), None where it does not apply, or raises
    `Refusal`.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            TABLE.setdefault(name, []).append(function)
        return function

    return register
