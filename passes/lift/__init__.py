"""Lift the expert region of a MoE layer to `y = f(rows, expert_id)`: a function of single rows, in any order,
padded at will.

T tokens, K choices, P = T*K pairs (token by token), E experts, N rows of any buffer.
"""

from ultraep_compile.passes.lift.find import find_moe_sites
from ultraep_compile.passes.lift.markers import expert_mm, expert_take
from ultraep_compile.passes.lift.rewrite import replace_site
from ultraep_compile.passes.lift.site import Miss, Site
from ultraep_compile.passes.lift.values import Refusal
from ultraep_compile.passes.lift.verify import verify_site

__all__ = [
    "Miss",
    "Refusal",
    "Site",
    "expert_mm",
    "expert_take",
    "find_moe_sites",
    "replace_site",
    "verify_site",
]
