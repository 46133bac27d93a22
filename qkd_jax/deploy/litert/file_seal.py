"""A hash inside a .tflite file that says it is whole, and a description of its input.

The interpreter reads a damaged file as it comes, past the ends of its arrays. So a file of
`to_tflite` has a SHA-256 of itself among its metadata, which every reader here checks before the
first offset of the file is followed. The hash lies behind a mark and counts as zeros in itself.
"""

import hashlib
import json
import os

from qkd_jax.deploy.description import Description
from qkd_jax.deploy.litert.flat_file import Program, flat_bytes
from qkd_jax.weights.files import damaged, read_bytes

DESCRIPTION, SHA256 = "qkd_jax.description", "qkd_jax.sha256"
MARK = b"qkd_jax.seal\x00\x01\xf6\x9d"
DESCRIBED = b"qkd_jax.json\x00\x01\xf6\x9d"
DIGEST = 32
REPAIR = "export the model again"


def sealed(program: Program, description: Description | None) -> bytes:
    """Returns the file of a program, with its hash and its description."""
    metadata = {SHA256: MARK + bytes(DIGEST)}
    if description is not None:
        text = json.dumps(description.to_json(), separators=(",", ":")).encode()
        metadata[DESCRIPTION] = DESCRIBED + len(text).to_bytes(8, "little") + text
    data = flat_bytes(program, metadata)
    assert data.count(MARK) == 1
    at = data.index(MARK) + len(MARK)
    return data[:at] + hashlib.sha256(data).digest() + data[at + DIGEST :]


def read_sealed(path: str | os.PathLike[str]) -> bytes:
    """Returns a file's content.

    Raises:
        ValueError: no such file, one that `to_tflite` has not written, or one that was changed.
    """
    data = read_bytes(path)
    if data.count(MARK) != 1:
        raise damaged(path, "it has no seal of to_tflite, or more than one", REPAIR)
    at = data.index(MARK) + len(MARK)
    blank = data[:at] + bytes(DIGEST) + data[at + DIGEST :]
    if len(blank) != len(data) or hashlib.sha256(blank).digest() != data[at : at + DIGEST]:
        raise damaged(path, "its content is not what was written (SHA-256 differs)", REPAIR)
    return data


def read_description(path: str | os.PathLike[str]) -> Description:
    """Returns the description that a file of `to_tflite` has.

    Raises:
        ValueError: as `read_sealed`, or a file that was written without one.
    """
    data = read_sealed(path)
    at = data.find(DESCRIBED)
    if at < 0:
        raise ValueError(
            f"{os.fspath(path)} does not say how images become its input; export it with "
            "to_tflite(..., description=...)."
        )
    at += len(DESCRIBED)
    size = int.from_bytes(data[at : at + 8], "little")
    return Description.from_json(json.loads(data[at + 8 : at + 8 + size]))
