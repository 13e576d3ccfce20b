"""Files of load matrices: an `.npz` (or one `.npy`) of integer arrays [ranks, experts], or [microbatches, ranks, experts].

Read without pickle, and checked before anything is made of them.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ultraep_compile.errors import LoadsError
from ultraep_compile.planner.checks import COUNT_LIMIT

MAGIC = (b"PK", b"\x93NUMPY")
MAX_BYTES = 1 << 31
HOW = "Write it with numpy.savez(path, name=counts), counts an int array [ranks, experts]"


def read_loads(path: Path, dims: tuple[int, ...] = (2,)) -> dict[str, NDArray[np.int64]]:
    """The arrays by name, as int64, in the file's order.

    Parameters:
        path: an .npz of arrays, or an .npy, whose array is named after the file.
        dims: the numbers of dimensions that an array may have.
    Raises: LoadsError with the file, the array and what is wrong with it.
    """
    if path.is_dir():
        raise LoadsError(f"{path} is a directory. Give the .npz file of load matrices in it.")
    try:
        with open(path, "rb") as file:
            if not file.read(6).startswith(MAGIC):
                raise ValueError("it begins neither like a zip archive nor like an array")
            file.seek(0)
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.ndarray):
                _check_size(found.zip)
            arrays = {path.stem: found} if isinstance(found, np.ndarray) else {n: found[n] for n in found.files}
    except FileNotFoundError:
        raise LoadsError(f"There is no file {path}. Give an .npz of load matrices [ranks, experts].") from None
    except OSError as error:
        raise LoadsError(f"{path} cannot be read: {error.strerror or error}. Check path and permissions.") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, SyntaxError) as error:
        if "pickle" in str(error).lower():
            raise LoadsError(f"{path} holds Python objects, which are never loaded. {HOW}.") from None
        raise LoadsError(f"{path} is no .npz, or a damaged one ({error}). {HOW}.") from None
    except (MemoryError, RuntimeError) as error:
        raise LoadsError(f"{path} cannot be unpacked ({error}). {HOW}.") from None
    if not arrays:
        raise LoadsError(f"{path} holds no arrays. {HOW}.")
    return {name: _checked(f"{path}, array {name!r}", array, dims) for name, array in arrays.items()}


def _check_size(archive: zipfile.ZipFile) -> None:
    if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
        raise ValueError(f"it would unpack to more than {MAX_BYTES >> 30} GiB")


def _checked(where: str, array: NDArray, dims: tuple[int, ...]) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu":
        raise LoadsError(f"{where}: dtype is {array.dtype}. Pass token counts as integers.")
    if array.ndim not in dims or array.size == 0:
        shapes = " or ".join({2: "[ranks, experts]", 3: "[microbatches, ranks, experts]"}[n] for n in dims)
        raise LoadsError(f"{where}: shape is {list(array.shape)}. Pass {shapes}, a row per source rank.")
    ranks, experts = array.shape[-2:]
    if experts % ranks:
        raise LoadsError(
            f"{where}: {experts} experts cannot be divided over {ranks} ranks. Pass a row for every source rank, "
            f"and a number of experts that {ranks} divides."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > COUNT_LIMIT:
        raise LoadsError(f"{where}: a count is {min(low, 0) or high}. Pass counts between 0 and {COUNT_LIMIT}.")
    return array.astype(np.int64)
