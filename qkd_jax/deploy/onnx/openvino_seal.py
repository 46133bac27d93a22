"""A hash inside an OpenVINO file that says that it and its weights are whole, and a description.

Both lie in the .xml's `rt_info`, which the engine keeps and does not read. The hash is of the .xml,
in which it counts as zeros, and of the .bin beside it: a file that was damaged, or the .bin of
another export, is refused before the engine follows any offset in it.
"""

import base64
import hashlib
import json
import os
import re
from pathlib import Path

from qkd_jax.deploy.description import Description
from qkd_jax.weights.files import damaged, read_bytes

SECTION = "qkd_jax"
BLANK = "0" * 64
REPAIR = "export the model again"
_SEAL = re.compile(rb'<sha256 value="([0-9a-f]{64})" />')
_DESCRIPTION = re.compile(rb'<description value="([A-Za-z0-9+/=]+)" />')


def rt_info(description: Description | None) -> dict[str, str]:
    """Returns what a model has to hold in its section of `rt_info` before it is saved."""
    if description is None:
        return {"sha256": BLANK}
    text = json.dumps(description.to_json(), separators=(",", ":"))
    return {"sha256": BLANK, "description": base64.b64encode(text.encode()).decode()}


def sealed(xml: bytes, weights: bytes) -> bytes:
    """Returns the .xml of a model saved with `rt_info`, with its hash."""
    (seal,) = _SEAL.finditer(xml)
    return xml[: seal.start(1)] + _digest(xml, weights) + xml[seal.end(1) :]


def read_sealed_xml(path: str | os.PathLike[str]) -> bytes:
    """Returns the .xml of a pair that is whole.

    Raises:
        ValueError: no such file, one that `to_openvino` has not written, or one of the two was
            changed.
    """
    xml = read_bytes(path)
    seals = list(_SEAL.finditer(xml))
    if len(seals) != 1:
        raise damaged(path, "it has no seal of to_openvino, or more than one", REPAIR)
    weights = read_bytes(Path(path).with_suffix(".bin"))
    (start, end), given = seals[0].span(1), seals[0].group(1)
    if _digest(xml[:start] + BLANK.encode() + xml[end:], weights) != given:
        why = "it or the .bin beside it is not what was written (SHA-256 differs)"
        raise damaged(path, why, REPAIR)
    return xml


def read_description(path: str | os.PathLike[str]) -> Description:
    """Returns the description that a file of `to_openvino` has.

    Raises:
        ValueError: as `read_sealed_xml`, or a file that was written without one.
    """
    found = _DESCRIPTION.search(read_sealed_xml(path))
    if found is None:
        raise ValueError(
            f"{os.fspath(path)} does not say how images become its input; export it with "
            "to_openvino(..., description=...)."
        )
    return Description.from_json(json.loads(base64.b64decode(found.group(1))))


def _digest(blank: bytes, weights: bytes) -> bytes:
    parts = [hashlib.sha256(part).digest() for part in (blank, weights)]
    return hashlib.sha256(b"".join(parts)).hexdigest().encode()
