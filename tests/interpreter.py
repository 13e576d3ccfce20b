"""Run functions in Triton's interpreter, which is chosen when triton is imported and so needs a process of its own.

One server for each test process imports what is slow to import and forks a process for every call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


@functools.cache
def _server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.interpreter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1],
    )  # fmt: skip


def run_interpreted(module: str, function: str, *arguments: object) -> None:
    """`module.function(*arguments)` in the interpreter; raises AssertionError with its traceback. JSON arguments."""
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps([module, function, *arguments]) + "\n")
    server.stdin.flush()
    fault = json.loads(server.stdout.readline())
    assert not fault, fault


def _call(module: str, function: str, *arguments: object) -> str:
    """In a process of its own; what it raised, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(2, 1)  # the server's own output is the answers
        fault = ""
        try:
            getattr(importlib.import_module(module), function)(*arguments)
        except BaseException:
            fault = traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            pipe.write(fault)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        fault = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return fault or (f"{module}.{function} ended with {status}" if status else "")


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.suppress(Exception):  # the call itself will tell
            importlib.import_module(request[0])
        print(json.dumps(_call(*request)), flush=True)


if __name__ == "__main__":
    main()
