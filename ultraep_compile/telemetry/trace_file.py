"""Trace files: one zip of plain arrays and JSON (an `.npz` that numpy can open), never a pickle.

Members: `meta.npy`, UTF-8 JSON as bytes, and `LAYER/ARRAY.npy` with LAYER the layer's index. The metadata
carries the schema, its version and a checksum over everything, so that a damaged or foreign file is an
error, not a chart.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.errors import TraceError
from ultraep_compile.telemetry.trace import LayerTrace, Trace, layer_shapes

SCHEMA = "ultraep-compile trace"
VERSION = 1
MAX_BYTES = 1 << 31  # a recorder's own bound is far below; what claims more is not one of our files
LAYER_KEYS = ("name", "ranks", "experts", "slots", "facts", "seen")
RECORD_AGAIN = "record it again with options={'trace': 'trace.npz'}"


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write `trace` to `path` in one step: a reader sees the old file or the new one, never a part."""
    arrays: dict[str, NDArray[Any]] = {}
    layers = []
    for index, layer in enumerate(trace):
        entry = {key: getattr(layer, key) for key in LAYER_KEYS}
        entry["seconds"] = list(layer.seconds)
        layers.append(entry)
        for name in layer_shapes(1, 1, 0, 0, 0):
            arrays[f"{index}/{name}"] = _narrow(getattr(layer, name))
        for number, values in enumerate(layer.seconds.values()):
            arrays[f"{index}/seconds{number}"] = np.asarray(values, dtype="<f4")
    meta = {"schema": SCHEMA, "version": VERSION, "info": trace.info, "layers": layers}
    meta = json.loads(json.dumps(meta))  # as the reader will see it
    meta["checksum"] = _checksum(meta, arrays)
    arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays}

    target = os.fspath(path)
    part = f"{target}.{os.getpid()}.part"
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as file:
            for name, array in arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read and check a trace; anything wrong with the file is a `TraceError` that says what to do."""
    shown = os.fspath(path)
    if not os.path.exists(shown):
        raise TraceError(
            f"There is no trace {shown!r}; give the path that the option `trace` named in the run."
        )
    if os.path.isdir(shown):
        raise TraceError(f"{shown!r} is a directory; give the path of the trace file in it.")
    try:
        with zipfile.ZipFile(shown) as file:
            arrays = _read_arrays(file, shown)
    except zipfile.BadZipFile as error:
        raise TraceError(
            f"{shown!r} is not a trace: it is no zip archive, or was cut short ({error}); {RECORD_AGAIN}."
        ) from error
    except OSError as error:
        raise TraceError(f"{shown!r} cannot be read: {error.strerror}; check its permissions.") from error
    except (zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{shown!r} is damaged ({error}); {RECORD_AGAIN}.") from error
    meta = _read_meta(arrays, shown)
    try:
        return _build(meta, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TraceError(f"{shown!r} is inconsistent: {error}; {RECORD_AGAIN}.") from error


def _read_arrays(file: zipfile.ZipFile, shown: str) -> dict[str, NDArray[Any]]:
    """All members as arrays. Sizes are checked before anything is allocated; object arrays are refused."""
    members = file.infolist()
    if sum(member.file_size for member in members) > MAX_BYTES:
        raise TraceError(f"{shown!r} would unpack to more than {MAX_BYTES >> 30} GiB; {RECORD_AGAIN}.")
    if "meta.npy" not in {member.filename for member in members}:
        raise TraceError(
            f"{shown!r} is a zip archive but not a trace of ours; give a file that the option `trace` wrote."
        )
    arrays = {}
    for member in members:
        content = file.read(member)
        stream = io.BytesIO(content)
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{member.filename} has array format {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.kind not in "iuf" or fortran:
            raise ValueError(f"{member.filename} holds {dtype}, not plain numbers")
        values = content[stream.tell() :]
        if any(size < 0 for size in shape) or np.prod(shape, dtype=object) * dtype.itemsize != len(values):
            raise ValueError(f"{member.filename} is shorter or longer than its header says")
        arrays[member.filename.removesuffix(".npy")] = np.frombuffer(values, dtype).reshape(shape)
    return arrays


def _read_meta(arrays: dict[str, NDArray[Any]], shown: str) -> dict[str, Any]:
    """The metadata, once schema, version and checksum are checked; leaves only the layers in `arrays`."""
    try:
        meta = json.loads(arrays.pop("meta").tobytes().decode())
        schema, version = meta["schema"], meta["version"]
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError, RecursionError) as error:
        raise TraceError(
            f"{shown!r} is not a trace of ours: its metadata is unreadable; {RECORD_AGAIN}."
        ) from error
    if schema != SCHEMA:
        raise TraceError(
            f"{shown!r} holds {schema!r}, not a trace; give a file that the option `trace` wrote."
        )
    if version != VERSION:
        raise TraceError(
            f"{shown!r} is a trace of version {version!r}, this program reads version {VERSION}; "
            "use the release that wrote it, or record it again."
        )
    checksum = meta.pop("checksum", None)
    if checksum != _checksum(meta, arrays):
        raise TraceError(f"{shown!r} was changed after it was written (checksum differs); {RECORD_AGAIN}.")
    return meta


def _build(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Trace:
    """The trace, every array checked against the shapes and bounds that the metadata implies."""
    layers = []
    for index, entry in enumerate(meta["layers"]):
        ranks, experts, slots = (int(entry[key]) for key in ("ranks", "experts", "slots"))
        if not (ranks >= 1 and slots >= 0 and experts >= 1 and experts % ranks == 0):
            raise ValueError(f"layer {index} has {experts} experts and {slots} slots on {ranks} ranks")
        n_records = len(arrays[f"{index}/microbatch_N"])
        shapes = layer_shapes(ranks, experts, slots, n_records, len(arrays[f"{index}/detail_n"]))
        found = {name: arrays[f"{index}/{name}"] for name in shapes}
        for name, shape in shapes.items():
            if found[name].shape != shape or found[name].dtype.kind != "i":
                kind = f"{found[name].dtype}{found[name].shape}"
                raise ValueError(f"{name} of layer {index} is {kind}, expected integers {shape}")
        seconds = {
            str(phase): np.array(arrays[f"{index}/seconds{number}"], dtype=np.float32)
            for number, phase in enumerate(entry["seconds"])
        }
        if any(values.shape != (n_records,) for values in seconds.values()):
            raise ValueError(f"the times of layer {index} do not match its {n_records} records")
        facts = {str(key): int(value) for key, value in dict(entry["facts"]).items()}
        layer = LayerTrace(
            name=str(entry["name"]), ranks=ranks, experts=experts, slots=slots, seconds=seconds, facts=facts,
            seen=int(entry["seen"]), **{name: array.astype(np.int64) for name, array in found.items()},
        )  # fmt: skip
        _check_values(layer, index)
        layers.append(layer)
    info = dict(meta["info"])
    _check_info(info)
    return Trace(layers, info)


MAX_ROWS = 1 << 40
"""Of one record or one expert: beyond, sums over a trace could leave int64."""


def _check_values(layer: LayerTrace, index: int) -> None:
    """Refuse values that no recorder writes, so that the report never has to think of them."""
    total_N, n = layer.expert_load_NE.sum(-1), layer.detail_n
    counted = (layer.expert_load_NE, layer.quota_NP, layer.source_load_NR, layer.kept_N2, layer.counts_nRE, layer.shares_nRP)
    noted = (layer.realised_NP, layer.rounds_N)
    rules = {
        "microbatches do not increase": (np.diff(layer.microbatch_N) > 0).all() and (layer.microbatch_N >= 0).all(),
        "more microbatches are recorded than were seen": len(layer) <= layer.seen <= MAX_ROWS,
        "a load is negative": all(load.min(initial=0) >= 0 for load in counted),
        "a load is too large": all(load.max(initial=0) <= MAX_ROWS for load in (*counted, *noted)),
        "a number of realised rows or rounds is unknown in another way than by -1": all(x.min(initial=0) >= -1 for x in noted),
        "a slot holds an unknown expert": (layer.slot_expert_NRS >= -1).all()
        and (layer.slot_expert_NRS < layer.experts).all(),
        "detail belongs to no record": (n >= 0).all() and (n < len(layer)).all() and (np.diff(n) > 0).all(),
        "a duration is negative or infinite": not any((s < 0).any() or np.isinf(s).any() for s in layer.seconds.values()),
        "a fact is negative or too large": all(0 <= fact <= 1 << 60 for fact in layer.facts.values()),
    }
    for text, holds in rules.items():  # sums below are safe once these hold
        if not holds:
            raise ValueError(f"{text} in layer {index}")
    sums = {
        "rows by source": (layer.source_load_NR.sum(-1), total_N),
        "planned rows": (layer.quota_NP.sum(-1), total_N),
        "detailed counts by expert": (layer.counts_nRE.sum(1), layer.expert_load_NE[n]),
        "detailed counts by source": (layer.counts_nRE.sum(2), layer.source_load_NR[n]),
        "detailed shares": (layer.shares_nRP.sum(1), layer.quota_NP[n]),
        "detailed shares by source": (layer.shares_nRP.sum(2), layer.source_load_NR[n]),
    }
    for text, (found, expected) in sums.items():
        if not np.array_equal(found, expected):
            raise ValueError(f"{text} of layer {index} do not add up to its loads")
    if (layer.kept_N2 > total_N[:, None]).any():
        raise ValueError(f"more rows stay on their rank than there are, in layer {index}")
    if (layer.counts_nRE.sum((1, 2)) >= 2**31).any():
        raise ValueError(f"a detailed record of layer {index} has more rows than a plan can have")


_INFO_NUMBERS = ("seen", "thinned", "dropped", "stride", "detail_stride", "started")


def _check_info(info: dict[str, Any]) -> None:
    """The same of what is known of the recording."""
    for name in _INFO_NUMBERS:
        value = info.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1 << 60:
            raise ValueError(f"{name} of the recording is {value!r}")
    notes = info.get("notes", [])
    if not isinstance(info.get("title", ""), str) or not isinstance(info.get("torch", ""), str):
        raise ValueError("title or version of the recording are no texts")
    if not isinstance(notes, list) or not all(isinstance(n, str) for n in notes):
        raise ValueError("the notes of the recording are no texts")


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Little-endian int32 where the values fit (files of half the size), else int64."""
    values = np.asarray(values)
    fits = values.size == 0 or (values.min() >= -(2**31) and values.max() < 2**31)
    return values.astype("<i4" if fits else "<i8")


def _checksum(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """SHA-256 over the metadata and over name, type, shape and bytes of every array."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
