"""Traces come back exactly; files that are not ours, or damaged, are refused with a sentence that helps."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from synthetic_traces import record_run

from ultraep_compile.errors import TraceError
from ultraep_compile.telemetry import Recorder, Trace, read_trace, write_trace
from ultraep_compile.telemetry import trace_file as module
from ultraep_compile.telemetry.trace import layer_shapes


@pytest.fixture
def trace(tmp_path) -> Trace:
    recorder = Recorder(tmp_path / "unused.npz")
    recorder.describe("layers.0.mlp", top_k=2, expert_bytes=1 << 33)
    recorder.annotate(title="títle", notes=["<b>"])
    return record_run(recorder)


def members(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rewrite(path, changed: dict[str, bytes]) -> None:
    content = members(path) | changed
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def change_meta(path, resign: bool, **changes) -> None:
    content = members(path)
    arrays = {name.removesuffix(".npy"): np.load(io.BytesIO(data)) for name, data in content.items()}
    meta = json.loads(arrays.pop("meta").tobytes())
    meta |= changes
    if resign:
        meta.pop("checksum")
        meta["checksum"] = module._checksum(meta, arrays)
    rewrite(path, {"meta.npy": npy(np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))})


def test_round_trip_is_exact(trace, tmp_path):
    write_trace(trace, tmp_path / "t.npz")
    found = read_trace(tmp_path / "t.npz")
    assert found.info == trace.info
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    for ours, theirs in zip(trace, found, strict=True):
        assert (ours.name, ours.ranks, ours.experts, ours.slots, ours.facts, ours.seen) == (
            theirs.name, theirs.ranks, theirs.experts, theirs.slots, theirs.facts, theirs.seen,
        )  # fmt: skip
        for name in layer_shapes(1, 1, 0, 0, 0):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
            assert getattr(theirs, name).dtype == np.int64
        assert list(ours.seconds) == list(theirs.seconds)
        for phase, values in ours.seconds.items():
            assert np.array_equal(values, theirs.seconds[phase], equal_nan=True)


def test_numbers_beyond_32_bits_survive(trace, tmp_path):
    trace.layers[0].realised_NP[0, 0] = 1 << 40
    write_trace(trace, tmp_path / "t.npz")
    assert read_trace(tmp_path / "t.npz").layers[0].realised_NP[0, 0] == 1 << 40


def test_empty_trace(tmp_path):
    write_trace(Trace(), tmp_path / "sub" / "t.npz")
    assert len(read_trace(tmp_path / "sub" / "t.npz")) == 0


def test_same_trace_gives_same_checksum_and_numpy_can_open_it(trace, tmp_path):
    write_trace(trace, tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
    assert (meta["schema"], meta["version"], len(meta["checksum"])) == ("ultraep-compile trace", 1, 64)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(TraceError, match=r"There is no trace.*give the path"):
        read_trace(tmp_path / "absent.npz")
    with pytest.raises(TraceError, match="is a directory; give the path"):
        read_trace(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1}), npy([1, 2])])
def test_not_a_zip(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"no zip archive.*record it again"):
        read_trace(path)


def test_foreign_npz(tmp_path):
    np.savez(tmp_path / "t.npz", loads=np.ones(3))
    with pytest.raises(TraceError, match="not a trace of ours; give a file"):
        read_trace(tmp_path / "t.npz")


def test_cut_short_at_any_place(trace, tmp_path):
    write_trace(trace, tmp_path / "t.npz")
    content = (tmp_path / "t.npz").read_bytes()
    for size in range(0, len(content), max(1, len(content) // 25)):
        (tmp_path / "cut.npz").write_bytes(content[:size])
        with pytest.raises(TraceError):
            read_trace(tmp_path / "cut.npz")


def test_any_flipped_byte_is_noticed_or_harmless(trace, tmp_path):
    write_trace(trace, tmp_path / "t.npz")
    content = bytearray((tmp_path / "t.npz").read_bytes())
    refused = 0
    for place in range(0, len(content), max(1, len(content) // 200)):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            found = read_trace(tmp_path / "bad.npz")
        except TraceError:
            refused += 1
        else:  # dates and the like
            assert np.array_equal(found.layers[0].quota_NP, trace.layers[0].quota_NP)
    assert refused > 100


def test_wrong_version_and_schema(trace, tmp_path):
    path = tmp_path / "t.npz"
    write_trace(trace, path)
    change_meta(path, resign=False, version=2)
    with pytest.raises(TraceError, match="version 2, this program reads version 1; use the release"):
        read_trace(path)
    change_meta(path, resign=False, schema="something")
    with pytest.raises(TraceError, match="holds 'something', not a trace"):
        read_trace(path)


def test_wrong_checksum(trace, tmp_path):
    path = tmp_path / "t.npz"
    write_trace(trace, path)
    rewrite(path, {"0/quota_NP.npy": npy(trace.layers[0].quota_NP.astype("<i4") + 1)})
    with pytest.raises(TraceError, match=r"checksum differs.*record it again"):
        read_trace(path)


LAYER = {"name": "x", "ranks": 4, "experts": 8, "slots": 1, "facts": {}, "seen": 1, "seconds": []}


@pytest.mark.parametrize(
    "layers",
    [
        3,
        [None],
        [{"name": "x"}],
        [LAYER | {"ranks": 3}],
        [LAYER | {"slots": 2}],
        [LAYER | {"facts": 7}],
        [LAYER | {"seconds": ["plan", "unknown", "more"]}],
        [LAYER | {"ranks": 1e999}],
    ],
)
def test_inconsistent_metadata(trace, tmp_path, layers):
    path = tmp_path / "t.npz"
    write_trace(trace, path)
    change_meta(path, resign=True, layers=layers)
    with pytest.raises(TraceError, match=r"is inconsistent.*record it again"):
        read_trace(path)


def test_unreadable_metadata(trace, tmp_path):
    path = tmp_path / "t.npz"
    write_trace(trace, path)
    for content in (b"[" * 100_000, b"[]", b"\xff", b"{}"):
        rewrite(path, {"meta.npy": npy(np.frombuffer(content, dtype=np.uint8))})
        with pytest.raises(TraceError, match="metadata is unreadable"):
            read_trace(path)


def test_impossible_values(trace, tmp_path):
    trace.layers[0].slot_expert_NRS[0, 0, 0] = 99
    write_trace(trace, tmp_path / "t.npz")
    with pytest.raises(TraceError, match="unknown expert"):
        read_trace(tmp_path / "t.npz")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in a file was run",))


def test_pickled_arrays_are_refused_and_never_loaded(trace, tmp_path):
    path = tmp_path / "t.npz"
    write_trace(trace, path)
    rewrite(path, {"0/quota_NP.npy": npy(np.array([Bomb()], dtype=object))})
    with pytest.raises(TraceError, match="is damaged"):
        read_trace(path)


def test_headers_that_claim_more_than_there_is_are_refused(trace, tmp_path):
    path = tmp_path / "t.npz"
    write_trace(trace, path)
    huge = npy(np.zeros(3, dtype="<i8")).replace(b"(3,)", b"(3000000000000000,)")
    rewrite(path, {"0/quota_NP.npy": huge})
    with pytest.raises(TraceError, match="is damaged"):
        read_trace(path)


def test_bombs_are_refused_before_they_unpack(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("meta.npy", bytes(1 << 21))
    with pytest.raises(TraceError, match="unpack to more"):
        read_trace(tmp_path / "t.npz")
