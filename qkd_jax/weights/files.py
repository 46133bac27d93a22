"""Files of named arrays: safetensors and .npz, read without trusting their content.

A file that is cut off, damaged or malicious gives a ValueError with its name, and no memory
is taken for sizes that the file only claims (deflated, it may hold ten times its own).
Nothing is unpickled.
"""

import io
import json
import math
import operator
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors

from qkd_jax.whole_files import check_file

# The names of https://github.com/safetensors/safetensors#format that NumPy and ml_dtypes can hold.
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# A deflated file may unpack to so many bytes, and so many times its own: weights are packed to no
# less than a third, and zlib alone would allow a thousand times.
USUAL, TIMES = 2**26, 10
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def damaged(path: Any, why: Any, repair: str = "get or write it again") -> ValueError:
    """Builds the error for a file that does not hold what it should (returned, not raised)."""
    return ValueError(f"{os.fspath(path)} is no file to rely on: {why}; {repair}.")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns a file's content.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a .safetensors file.

    Returns:
        ({name: array}, the file's own metadata).

    Raises:
        ValueError: no such file, or one that is damaged.
    """
    return parse_safetensors(read_bytes(path), path)


def read_sharded(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the .safetensors files that an index names, `model.safetensors.index.json`.

    The index is {"weight_map": {array's name: file's name}}, as `save_pretrained` writes it; the
    files lie beside it.

    Raises:
        ValueError: no such file, one that is damaged, or an array that its file lacks.
    """
    try:
        index = json.loads(read_bytes(path))
        places = index["weight_map"]
        files = sorted(set(places.values()))
        if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
            raise ValueError("it must name .safetensors files that lie beside it")
    # From the bytes' decoder, from JSON's, and for values of other kinds.
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        if not Path(path).is_file():
            raise
        raise damaged(path, f"it is no index of shards ({error})") from error
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        shard = read_safetensors(Path(path).with_name(file))[0]
        wanted = {name for name, place in places.items() if place == file}
        if shard.keys() != wanted:
            differ = ", ".join(sorted(shard.keys() ^ wanted)[:5])
            why = f"{file} and it name different arrays: {differ:.200}"
            raise damaged(path, why, "get all files of one checkpoint again")
        arrays |= shard
    return arrays


def parse_safetensors(
    data: bytes, path: str | os.PathLike[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Takes apart the content of a .safetensors file; `path` is for messages."""
    try:
        entries = safetensors.deserialize(data)
        arrays = {}
        for name, entry in entries:
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{os.fspath(path)} has {name!r} in {entry['dtype']}, which NumPy cannot hold; "
                    f"convert it to one of {', '.join(DTYPES)}."
                )
            dtype = np.dtype(DTYPES[entry["dtype"]])
            arrays[name] = _array(path, name, dtype, entry["data"], entry["shape"])
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise damaged(path, error) from error
    return arrays, metadata


def safetensors_bytes(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Returns the content of a .safetensors file; the same arrays give the same bytes."""
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    kept, specs = [], {}
    for name, array in sorted(arrays.items()):
        array = np.asarray(array, order="C")
        if array.dtype not in names:
            raise ValueError(
                f"array {name!r} is {array.dtype}, which a .safetensors file cannot hold; allowed: "
                f"{', '.join(str(d) for d in names)}."
            )
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        kept.append(array)  # the specs hold addresses
        specs[name] = safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
    return bytes(safetensors.serialize(specs, metadata=dict(metadata) or None))


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """Returns the content of a .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a .npz file of plain arrays.

    Raises:
        ValueError: no such file, one that is damaged, or one with pickled objects inside.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {os.fspath(path)}.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path)
            return {
                info.filename.removesuffix(".npy"): _read_npy(archive, info, path)
                for info in archive.infolist()
            }
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,  # an unknown method of compression
        RuntimeError,  # encrypted
        OverflowError,
        MemoryError,
        UnicodeDecodeError,
        struct.error,
    ) as error:
        raise damaged(path, error or type(error).__name__) from error


def _check_sizes(archive: zipfile.ZipFile, path: Any) -> None:
    """Raises ValueError where the sizes that a zip's index declares cannot be true."""
    stored = os.stat(path).st_size
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > max(USUAL, TIMES * stored):
        raise damaged(
            path,
            f"its arrays claim {claimed:,} bytes, and the file has {stored:,}",
            "write it again, with numpy.savez and not numpy.savez_compressed",
        )
    if len({info.filename for info in archive.infolist()}) < len(archive.infolist()):
        raise damaged(path, "two entries have one name")


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Any) -> np.ndarray:
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = NPY_HEADERS[version](file)
        except Exception as error:  # it is parsed as Python, which has many types
            raise damaged(path, f"{info.filename!r} has no header of an array") from error
        if dtype.kind not in "biufc":
            raise ValueError(
                f"{os.fspath(path)} has {info.filename!r} in {dtype}; only arrays of plain numbers "
                "are read, and nothing is unpickled. Save plain arrays with numpy.savez, or, with "
                "bfloat16 among them, a .safetensors file."
            )
        data = file.read()
    if not dtype.itemsize:
        raise damaged(path, f"{info.filename!r} declares {dtype}")
    return _array(path, info.filename, dtype, data, shape, order="F" if fortran else "C")


def _array(
    path: Any, name: str, dtype: np.dtype, data: bytes, shape: Any, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Returns bytes as an array; ValueError where they do not fit the shape."""
    try:
        sizes = [operator.index(n) for n in shape]
        if min([0, *sizes]) < 0 or math.prod(sizes) * dtype.itemsize != len(data):
            raise ValueError
        flat = np.frombuffer(bytearray(data), dtype) if data else np.zeros(0, dtype)
        return flat.reshape(sizes, order=order)  # refuses more than 64 axes, or 2^63 elements
    except (ValueError, TypeError, OverflowError) as error:
        why = f"{name!r:.200} declares {dtype} {shape!r:.80} for {len(data):,} bytes"
        raise damaged(path, why) from error
