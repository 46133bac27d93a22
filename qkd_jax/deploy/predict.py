"""Classifies image files with an exported model.

    python -m qkd_jax.deploy.predict runs/qkd_digits a.png b.png
    python -m qkd_jax.deploy.predict runs/qkd_digits/model/student.onnx a.png --engine=openvino
    python -m qkd_jax.deploy.predict runs/qkd_digits/model/student.tflite a.png
    python -m qkd_jax.deploy.predict runs/qkd_digits/model/student a.png --top=1 --json

MODEL is a run folder (with --net where it has several), a folder of `model.json`, an .onnx file, a
.tflite file or the .xml of an OpenVINO one.
Size, channels and normalisation of the image come from the model's files; photographs are turned as
their EXIF orientation says, and transparent images lie on white. Exit code 2 says that
something that was given is wrong; the message says what.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.deploy.description import MAX_PIXELS, Description
from qkd_jax.deploy.integer.convert import integer_apply
from qkd_jax.deploy.integer.saved_model import JSON, describe, load
from qkd_jax.deploy.litert.file_seal import read_description
from qkd_jax.deploy.litert.litert_runtime import open_tflite
from qkd_jax.deploy.onnx.engines import ONNX_ENGINES, import_engine, open_onnx, without_telemetry
from qkd_jax.deploy.onnx.stamp import read_stamp

BATCH = 64
# Ending of a file -> the engines that run it, the first one by default.
FILES = {".onnx": tuple(ONNX_ENGINES), ".tflite": ("litert",), ".xml": ("openvino",)}


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model ready to classify: its description, and normalised images to logits."""

    path: Path
    engine: str
    description: Description
    logits: Callable[[np.ndarray], np.ndarray]


def open_predictor(
    model: str | os.PathLike[str], *, engine: str | None = None, net: str = ""
) -> Predictor:
    """Opens an exported model.

    Args:
        model: a run folder, a folder that `deploy.save` wrote, an .onnx or a .tflite file, or the
            .xml of `to_openvino`.
        engine: a key of `ENGINES`; None takes "onnxruntime" for an .onnx file, "litert" for a
            .tflite file, "openvino" for an .xml, else "jax".
        net: which net of a run folder; may be left out where there is one.

    Raises:
        ValueError: no such model or engine, one that the engine does not run, damaged files, or
            files without preprocessing.
        ImportError: the engine is not installed.
    """
    path = Path(model)
    if engine is not None:
        checks.one_of("engine", engine, ENGINES)
    kind = path.suffix if path.suffix in FILES else ""
    engine = engine or (FILES[kind][0] if kind else "jax")
    if (path / "model").is_dir() and not (path / JSON).is_file():
        path = _net_folder(path, net)
    elif net:
        raise ValueError(f"net is {net!r}, and {path} is no run folder; leave it out.")
    if kind and engine not in FILES[kind]:
        takes = " or ".join(repr(name) for name in FILES[kind])
        raise ValueError(
            f"{path} is a {kind} file, which {engine} does not run; give engine={takes}."
        )
    if not kind and engine != "jax":
        ending = next(ending for ending, engines in FILES.items() if engine in engines)
        path = path.with_name(f"{path.name}{ending}")  # where --mode=export writes it
        if not path.is_file():
            target = " --target=litert" if engine == "litert" else ""
            raise ValueError(
                f"{engine} runs {ending} files, and there is no {path}; give one, or write it with "
                f"--mode=export{target}."
            )
    return ENGINES[engine](path)


def _net_folder(run: Path, net: str) -> Path:
    nets = sorted(p.parent.name for p in (run / "model").glob(f"*/{JSON}"))
    if not nets:
        raise ValueError(
            f"{run} has no exported model; run: python launch.py --mode=export --workdir={run}"
        )
    if not net and len(nets) > 1:
        raise ValueError(f"{run} has the nets {', '.join(nets)}; name one with --net.")
    if net and net not in nets:
        raise checks.unknown("net", net, nets)
    return run / "model" / (net or nets[0])


def _jax(path: Path) -> Predictor:
    integer, description = load(path), describe(path)
    if description is None:
        raise ValueError(
            f"{path / JSON} does not say how images become the model's input; save it with "
            "qkd_jax.deploy.save(..., description=qkd_jax.deploy.Description(...))."
        )
    shape = (1, *description.image_shape)
    inputs = [(0, *a.shape[1:]) for a in integer.program.signature]
    if inputs != [(0, *shape[1:])]:
        raise ValueError(f"{path / JSON} has images {shape[1:]} for a model of {inputs}.")
    return Predictor(
        path, "jax", description, lambda images: np.asarray(_single(integer_apply(integer, images)))
    )


def _single(output: Any) -> Any:
    """Returns the one array that a model returns."""
    leaves = jax.tree.leaves(output)
    if len(leaves) != 1:
        raise ValueError(f"the model returns {len(leaves)} arrays; a classifier returns one.")
    return leaves[0]


def _onnx(path: Path, engine: str) -> Predictor:
    _need(engine)
    if path.suffix == ".onnx":
        _need("onnx")
    description = read_stamp(path)
    try:
        run = open_onnx(path, engine)
    except Exception as error:  # the engine's own
        raise ValueError(f"{ONNX_ENGINES[engine]} cannot open {path}: {error}") from error
    return Predictor(path, engine, description, lambda images: _single(run(images)))


def _litert(path: Path) -> Predictor:
    _need("ai_edge_litert")
    description, run = read_description(path), open_tflite(path)
    return Predictor(path, "litert", description, lambda images: _single(run(images)))


ENGINES: dict[str, Callable[[Path], Predictor]] = {
    "jax": _jax,
    "litert": _litert,
    **{engine: functools.partial(_onnx, engine=engine) for engine in ONNX_ENGINES},
}


def _need(package: str) -> None:
    try:
        with without_telemetry():
            import_engine(package)
    except ImportError as error:
        raise ImportError(f"{error} --engine=jax needs none of it.") from error


def predict(
    predictor: Predictor,
    paths: Sequence[str | os.PathLike[str]],
    *,
    top: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> list[dict[str, Any]]:
    """Classifies image files.

    Args:
        predictor: from `open_predictor`.
        paths: image files that Pillow reads.
        top: how many classes to give for each image.
        max_pixels: images with more are refused, before they are decoded.

    Returns:
        One {"image", "predictions": [{"class", "index", "probability"}]} for each image, the most
        probable class first. A class without a name is called by its number.

    Raises:
        ValueError: a file that is no image or a very large one, `top` out of range, or logits that
            are not finite or do not fit the class names.
    """
    checks.integer_in("top", top, 1)
    description, names = predictor.description, predictor.description.classes
    results: list[dict[str, Any]] = []
    for start in range(0, len(paths), BATCH):
        files = [os.fspath(path) for path in paths[start : start + BATCH]]
        batch = np.stack([description.read_image(path, max_pixels=max_pixels) for path in files])
        logits = np.asarray(predictor.logits(description.normalize(batch)), np.float64)
        if logits.ndim != 2 or len(logits) != len(batch):
            raise ValueError(
                f"{predictor.path} gives {logits.shape} for {len(batch)} images; a classifier "
                "gives [batch, classes]."
            )
        if names and len(names) != logits.shape[1]:
            raise ValueError(
                f"{predictor.path} has {logits.shape[1]} logits and {len(names)} names of classes."
            )
        for path, row in zip(files, logits, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(
                    f"{predictor.path} gives logits that are not finite for {path}: {row}; the "
                    "model is damaged or was trained to NaN. Export it again."
                )
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        for path, row in zip(files, shares, strict=True):
            best = np.argsort(-row, kind="stable")[:top]
            predictions = [
                {
                    "class": names[i] if names else str(i),
                    "index": int(i),
                    "probability": float(row[i]),
                }
                for i in best
            ]
            results.append({"image": path, "predictions": predictions})
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qkd_jax.deploy.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run folder, a folder of model.json, .onnx, .tflite, .xml")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--engine", choices=list(ENGINES), help="default: what runs the model")
    parser.add_argument("--net", default="", help="which net of a run folder")
    parser.add_argument("--top", type=int, default=3, help="classes to show (3)")
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help="of an image, at most (50 million)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    try:
        predictor = open_predictor(given.model, engine=given.engine, net=given.net)
        results = predict(predictor, given.images, top=given.top, max_pixels=given.max_pixels)
    except (ValueError, ImportError) as error:
        print(checks.printable(f"error: {error}"), file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(results, indent=1))
        return 0
    for entry in results:
        classes = ", ".join(
            f"{p['class']} {100 * p['probability']:.2f} %" for p in entry["predictions"]
        )
        print(checks.printable(f"{entry['image']}: {classes}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
