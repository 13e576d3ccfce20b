"""Custom ops in the namespace `ultraep`; importing this package registers them all."""

from ultraep_compile.ops import dispatch, experts, grouped_gemm, replicate, routing, unshard

__all__ = ["dispatch", "experts", "grouped_gemm", "replicate", "routing", "unshard"]
