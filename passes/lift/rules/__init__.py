"""Rules for the ops that mean something in a MoE layer; all others are probed.

A new form of MoE is a new rule in one of these modules, and maybe a new finder in `anchors`.
"""

from ultraep_compile.passes.lift.rules import gathers, products, rows, shapes, structure
from ultraep_compile.passes.lift.rules.table import TABLE, rule

__all__ = ["TABLE", "gathers", "products", "rows", "rule", "shapes", "structure"]
