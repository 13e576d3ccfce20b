"""Detection of MoE layers: the entry point. The method is explained in `lift/lifter.py`, the search in
`lift/find.py`.
"""

from ultraep_compile.passes.lift.find import find_moe_sites
from ultraep_compile.passes.lift.site import Miss, Site

__all__ = ["Miss", "Site", "find_moe_sites"]
