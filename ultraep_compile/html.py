"""Pieces of self-contained HTML pages: everything is in the file, and its own policy lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any


def plotly_script() -> str:
    """plotly.js as text that may stand inside a script element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("\r\n", "\n").replace("</script", "<\\/script")


def script_policy(*scripts: str) -> str:
    """The script-src of a Content-Security-Policy that allows these scripts only."""
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)


def json_text(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Write in one step: a reader sees the old page or the new one, never a part."""
    target = os.path.abspath(os.fspath(path))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    part = f"{target}.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(part, target)
