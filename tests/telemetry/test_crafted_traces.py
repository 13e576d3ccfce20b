"""Whatever a trace file holds, `view` makes a report of it or raises a TraceError."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_traces import record_run

from ultraep_compile.errors import TraceError
from ultraep_compile.telemetry import Recorder, read_trace, write_report, write_trace
from ultraep_compile.telemetry import trace_file as module

NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-3, 40), st.sampled_from([-(2**63), 2**63 - 1, 2**31, -(2**31) - 1, 0, -1])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.integers(-3, 9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("crafted") / "t.npz"
    recorder = Recorder(path)
    recorder.describe("layers.0.mlp", top_k=2, expert_bytes=1 << 20, row_bytes=64, flops_per_row=100)
    write_trace(record_run(recorder, layers=2, microbatches=3), path)
    return path.read_bytes()


def _judge(content: bytes, folder: Path) -> None:
    path = folder / "crafted.npz"
    path.write_bytes(content)
    try:
        trace = read_trace(path)
        write_report(trace, folder / "report.html")
    except TraceError as error:
        assert str(error)


def _members(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        arrays = {n.removesuffix(".npy"): np.load(io.BytesIO(file.read(n))) for n in file.namelist()}
    return json.loads(arrays.pop("meta").tobytes()), arrays


def _signed(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """A file with a checksum that holds, as somebody writes it who means harm."""
    meta.pop("checksum", None)
    meta["checksum"] = module._checksum(json.loads(json.dumps(meta)), arrays)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, array in {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays}.items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def _places(value: Any, way: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, each in inner for place in _places(each, (*way, key)))]


LIMITS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LIMITS
@given(data=st.data())
def test_bytes(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 50))]
        else:
            content[at:at] = data.draw(st.binary(max_size=20))
        if not content:
            break
    _judge(bytes(content), tmp_path)


@LIMITS
@given(data=st.data())
def test_numbers(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    meta, arrays = _members(good)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        array = arrays[name].astype(np.float64 if "seconds" in name else np.int64)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
            value = data.draw(st.floats(width=32))
        else:
            value = data.draw(NUMBERS)
        if array.size and data.draw(st.booleans()):
            array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = value
        elif data.draw(st.booleans()):
            array = np.full(array.shape, value, array.dtype)
        else:
            array = array[: data.draw(st.integers(0, len(array)))]
        arrays[name] = array
    _judge(_signed(meta, arrays), tmp_path)


@LIMITS
@given(data=st.data())
def test_metadata(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    meta, arrays = _members(good)
    place = data.draw(st.sampled_from([p for p in _places(meta) if p and p[0] in ("info", "layers")]))
    holder = meta
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[place[-1]] = data.draw(JSON)
    else:
        del holder[place[-1]]
    _judge(_signed(meta, arrays), tmp_path)
