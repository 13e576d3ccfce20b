"""Make an unmodified PyTorch model run as if its load were perfectly balanced.

    model.compile(backend="ultraep", options={"ranks": 8})      # several ranks simulated in one process
    shard_experts(model, mesh); model.compile(backend="ultraep")  # one rank per process
    @balance(ranks=8)                                           # on a model class
    pipeline(model, mesh, microbatches=8, inputs=batch).step(batch)  # a multimodal model as a nested pipeline

Symbols used throughout: T tokens, D model width, E experts, K top-k, R ranks, S redundant experts (slots) per rank,
M = E/R masters per rank, P = R*(M+S) physical experts, N rows of an expert buffer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ultraep_compile.huggingface import register_with_accelerate

__version__ = "0.1.0"

_PUBLIC = {
    "Options": "config",
    "UltraEPError": "errors",
    "balance": "decorator",
    "clip_grad_norm_": "clipping",
    "explain": "explanation",
    "pipeline": "executor.pipeline",
    "prepare": "preparation",
    "real_tokens": "ops.padding",
    "shard_experts": "sharding",
    "ultraep": "backend",
}
__all__ = [
    "Options",
    "UltraEPError",
    "balance",
    "clip_grad_norm_",
    "explain",
    "pipeline",
    "prepare",
    "real_tokens",
    "shard_experts",
    "ultraep",
]

if TYPE_CHECKING:
    from ultraep_compile.backend import ultraep
    from ultraep_compile.clipping import clip_grad_norm_
    from ultraep_compile.config import Options
    from ultraep_compile.decorator import balance
    from ultraep_compile.errors import UltraEPError
    from ultraep_compile.executor.pipeline import pipeline
    from ultraep_compile.explanation import explain
    from ultraep_compile.ops.padding import real_tokens
    from ultraep_compile.preparation import prepare
    from ultraep_compile.sharding import shard_experts


def __getattr__(name: str) -> object:
    """Load on first use: the command line and the planner start without the compiler."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"ultraep_compile.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'ultraep_compile' has no attribute {name!r}")


register_with_accelerate()
