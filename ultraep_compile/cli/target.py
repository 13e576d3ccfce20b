"""TARGET arguments: `package.module:factory` or `path/to/file.py:factory` -> model and example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ultraep_compile.errors import TargetError, nearest


def load_target(target: str) -> tuple[Any, Any]:
    """(model, inputs) that the factory returns; inputs None where it returns a model alone.

    Raises: TargetError that says which part of TARGET is wrong.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(
            f"TARGET {target!r} is not of the form package.module:factory or path/to/file.py:factory. Write it so."
        )
    module = _module(place)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise TargetError(f"{place} has no {name!r}. {nearest(name, known)}")
    factory = getattr(module, name)
    if not callable(factory):
        raise TargetError(
            f"{target} is {type(factory).__name__}, not a function. Name a function that returns a model."
        )
    try:
        made = factory()
    except (Exception, SystemExit) as reason:
        raise TargetError(
            f"{target}() raised {type(reason).__name__}: {reason}. Make it run without arguments."
        ) from reason
    return _split(target, made)


def _module(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise TargetError(f"there is no file {place}. Check the path.")
            name = f"ultraep_target_{path.stem}"  # a file json.py must not become the module json
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            sys.path.append(str(path.resolve().parent))  # for what it imports from beside it; last, for the same reason
            spec.loader.exec_module(module)
            return module
        sys.path.insert(0, "")
        return importlib.import_module(place)
    except TargetError:
        raise
    except (Exception, SystemExit) as reason:
        by_hand = f"python {place}" if place.endswith(".py") else f"python -c 'import {place}'"
        raise TargetError(
            f"{place} does not import: {type(reason).__name__}: {reason}. Run `{by_hand}` to see why."
        ) from reason


def _split(target: str, made: Any) -> tuple[Any, Any]:
    from torch import nn

    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{target}() returned {type(made).__name__}. Return a torch.nn.Module, or (module, inputs) with inputs a dict of "
            "keyword arguments or a tuple."
        )
    if inputs is not None and not isinstance(inputs, (dict, tuple, list)):
        raise TargetError(
            f"{target}() returned inputs of type {type(inputs).__name__}. Use a dict of keyword arguments or a tuple."
        )
    return model, inputs


def need_inputs(target: str, inputs: Any) -> Any:
    """The inputs, or a TargetError where the factory gave none."""
    if inputs is None:
        raise TargetError(
            f"{target}() returned a model without inputs. Return (model, inputs) so that its forward can be traced."
        )
    return inputs
