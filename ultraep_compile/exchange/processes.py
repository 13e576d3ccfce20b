"""What one process can know of another on the same machine."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["alive", "stopped", "ended", "unknown"]


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from others that had its number before."""

    host: str
    """The machine, and the space of process numbers on it: containers have their own."""
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        """The process that asks."""
        return cls(_host(), os.getpid(), _status(os.getpid())[1])

    def state(self) -> State:
        """How the process is. `unknown` for one on another machine, and where the system does not tell."""
        if self.host != _host() or not self.started:
            return "unknown"
        letter, started = _status(self.pid)
        if started != self.started or letter in "ZX":
            return "ended"
        return "stopped" if letter in "Tt" else "alive"


def _status(pid: int) -> tuple[str, str]:
    """The state letter of a process and when it started; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # its name, in brackets, may hold anything
    return fields[0], fields[19]


@functools.cache
def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()
