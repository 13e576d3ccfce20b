"""Versions of the libraries that the project was tested with. Others are not refused: they are said to be untested."""

from __future__ import annotations

import functools
import importlib.metadata
import re

TESTED = {"torch": ("2.11", "2.15"), "triton": ("3.6", "3.9"), "transformers": ("5.0", "5.24")}
"""Package -> oldest and newest tested release (major.minor); `benchmarks/results/versions.md` says what ran when."""


def installed(package: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # asked at every compilation; what a process has imported does not change
def untested() -> tuple[str, ...]:
    """Say of each installed library outside the tested range what it is, in a sentence that ends in what to do."""
    out = []
    for package, (oldest, newest) in TESTED.items():
        version = installed(package)
        if version is not None and not _release(oldest) <= _release(version) <= _release(newest):
            out.append(
                f"{package} {version} is untested with ultraep_compile ({oldest} to {newest} are tested). "
                "Compare a few steps with the option verify=3, or install a tested version."
            )
    return tuple(out)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number: (2, 15) of `2.15.0a0+git123`."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
