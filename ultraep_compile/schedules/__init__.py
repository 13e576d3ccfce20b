"""Nested pipeline schedules: encoder and generator work cut into the LLM's own pipeline.

Start at `plan` (plan.py) and the rule behind it (nested.py). `validate` proves a schedule, `report` plays and
measures it.
"""

from ultraep_compile.schedules.actions import Op, Schedule, parse_op, parse_schedule
from ultraep_compile.schedules.messages import Message, Transfer, lower
from ultraep_compile.schedules.plan import METHODS, plan, plan_many
from ultraep_compile.schedules.problem import (
    Caps,
    Encoder,
    Generator,
    Problem,
    items_from_sizes,
    place_virtual,
    uniform_problem,
)
from ultraep_compile.schedules.report import report, report_json
from ultraep_compile.schedules.simulate import peaks, simulate
from ultraep_compile.schedules.validate import validate

__all__ = [
    "METHODS",
    "Caps",
    "Encoder",
    "Generator",
    "Message",
    "Op",
    "Problem",
    "Schedule",
    "Transfer",
    "items_from_sizes",
    "lower",
    "parse_op",
    "parse_schedule",
    "peaks",
    "place_virtual",
    "plan",
    "plan_many",
    "report",
    "report_json",
    "simulate",
    "uniform_problem",
    "validate",
]
