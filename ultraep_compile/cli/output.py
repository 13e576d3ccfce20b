"""Where commands write: a failure names the file, its option and the cure, and never shows a traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ultraep_compile.errors import OptionError


@contextlib.contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Turn a failure of the file system inside the block into an OptionError about `path`, which `option` named."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"{path} cannot be written: {reason}. Choose another {option}.") from None


def make_folder(path: Path, option: str) -> None:
    """Make a folder, with those above it, unless it is there."""
    with writing(path, option):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file whole."""
    with writing(path, option):
        path.write_text(text, encoding="utf-8")


def file_names(names: list[str]) -> dict[str, str]:
    """The part of a file name that stands for each module path: letters, digits and `_`, no two of them alike.

    >>> file_names(["model.layers.0", "a/b", "a.b", ""])
    {'model.layers.0': 'model_layers_0', 'a/b': 'a_b', 'a.b': 'a_b_2', '': 'model'}
    """
    out: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"\W", "_", name)[:120] or "model"
        number, chosen = 2, plain
        while chosen in out.values():
            chosen, number = f"{plain}_{number}", number + 1
        out[name] = chosen
    return out
