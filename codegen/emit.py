"""Generated kernel source: written once to a file that a person can read and step through, then imported.

Triton needs a file behind every kernel. The file's name holds a hash of its text, so equal specifications share one and
a change of ours never meets an old file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def cache_folder() -> Path:
    """Where generated files lie: `ultraep_compile` in the user's cache folder, else in the temporary folder.

    Only the user can write there: what is imported must be what was generated.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(root) / "ultraep_compile", Path(tempfile.gettempdir()) / f"ultraep_compile_{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="ultraep_compile_"))


def load_source(text: str) -> ModuleType:
    """The module with this text; one per process for equal texts."""
    name = f"ultraep_gen_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        path = cache_folder() / f"{name}.py"
        if not path.exists() or path.read_text() != text:
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(text)
            os.replace(draft, path)  # another process sees the whole file or none
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
