"""Make the name of our backend known to Accelerate, and so to transformers' Trainer."""

from __future__ import annotations

import enum
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

_MODULE = "accelerate.utils.dataclasses"


def register_with_accelerate() -> None:
    """Let `TrainingArguments(torch_compile_backend="ultraep")` and Accelerate's `dynamo_backend` accept our name.

    Accelerate checks backends against a closed enumeration and knows nothing of torch's registry. The enumeration is
    extended now, or when Accelerate is imported; Accelerate is not imported for it.
    """
    if module := sys.modules.get(_MODULE):
        _extend(module)
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module: ModuleType) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = execute_and_extend
        return spec


def _extend(module: ModuleType) -> None:
    backends: type[enum.Enum] = module.DynamoBackend
    if "ULTRAEP" in backends.__members__:
        return
    member: Any = str.__new__(backends, "ULTRAEP")  # pyright: ignore
    member._name_ = member._value_ = "ULTRAEP"
    backends._member_map_["ULTRAEP"] = backends._value2member_map_["ULTRAEP"] = member
    backends._member_names_.append("ULTRAEP")
