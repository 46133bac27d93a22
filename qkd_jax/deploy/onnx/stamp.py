"""Preprocessing and class names inside an ONNX file, and a hash that says it is whole.

Both lie in the file's `metadata_props`, where every engine leaves them alone. Those of OpenVINO's
own files are `openvino_seal`'s, and are read here as well.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qkd_jax.deploy.description import Description
from qkd_jax.deploy.onnx.engines import import_engine
from qkd_jax.deploy.onnx.openvino_seal import read_description
from qkd_jax.weights.files import damaged, read_bytes
from qkd_jax.whole_files import replace_file

DESCRIPTION, SHA256 = "qkd_jax.description", "qkd_jax.sha256"
REPAIR = "export the model again"


def stamp_onnx(path: str | os.PathLike[str], description: Description) -> int:
    """Writes a description into an ONNX file; returns the file's new size in bytes."""
    onnx = import_engine("onnx")
    model = onnx.load(os.fspath(path))
    text = json.dumps(description.to_json(), separators=(",", ":"))
    kept = {p.key: p.value for p in model.metadata_props}
    onnx.helper.set_model_props(model, {**kept, DESCRIPTION: text, SHA256: _digest(model, text)})
    data = model.SerializeToString()
    replace_file(path, data)
    return len(data)


def read_stamp(path: str | os.PathLike[str]) -> Description:
    """Reads what `stamp_onnx` wrote into an ONNX file, or `to_openvino` into an .xml.

    Raises:
        ValueError: no such file, one without a description, or one that was changed since.
    """
    if Path(path).suffix == ".xml":
        return read_description(path)
    onnx = import_engine("onnx")
    data = read_bytes(path)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's, which is no dependency of ours
        raise damaged(path, f"it is no ONNX file ({error})", REPAIR) from error
    stamps = {p.key: p.value for p in model.metadata_props}
    if not all(isinstance(text, str) for text in stamps.values()):  # protobuf's word for no UTF-8
        raise damaged(path, "its metadata is no text", REPAIR)
    if DESCRIPTION not in stamps:
        raise ValueError(
            f"{os.fspath(path)} does not say how images become its input; export it with "
            "--mode=export, or add that with qkd_jax.deploy.stamp_onnx."
        )
    if stamps.get(SHA256) != _digest(model, stamps[DESCRIPTION]):
        raise damaged(path, "its content is not what was written (SHA-256 differs)", REPAIR)
    try:
        return Description.from_json(json.loads(stamps[DESCRIPTION]))
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error).rstrip("."), REPAIR) from error


def _digest(model: Any, description: str) -> str:
    parts = [description.encode(), model.graph.SerializeToString(deterministic=True)]
    parts += [o.SerializeToString(deterministic=True) for o in model.opset_import]
    parts += [f.SerializeToString(deterministic=True) for f in model.functions]
    return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()
