"""An integer model as StableHLO, the program that XLA compiles, for cpu, cuda and tpu in one file.

`save_stablehlo` writes what `jax.export` serialises: the module, with the weights inside and any
batch size (the example's own, where `convert` was told any_batch=False), and its signature. Beside
it lies a JSON file with the versions and a SHA-256. It needs neither the model's source nor
`qkd_jax` to run:

    jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call(images)

What JAX promises of such files (https://docs.jax.dev/en/latest/export/export.html): they run in a
JAX up to six months newer than the one that wrote them, and up to three weeks older. For longer,
keep `model.safetensors` and `model.json`.

Products run on integers in int32 where integer kernels are fast, and on the same integers in
float32 on the CPU, layer by layer where that is exact (see `integer_apply`).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax import export

from qkd_jax import checks
from qkd_jax.deploy.integer.outputs import with_plain_outputs
from qkd_jax.deploy.integer.program import IntegerModel, Multiply, run
from qkd_jax.weights.files import damaged, read_bytes
from qkd_jax.whole_files import replace_file

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT, VERSION = "qkd_jax stablehlo", 1
REPAIR = "export the model again"


def save_stablehlo(
    integer: IntegerModel,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> int:
    """Writes an integer model as StableHLO, and `<path>.json` beside it.

    The module returns arrays, lists, tuples and dicts; a dataclass, a named tuple or another pytree
    becomes a dict of its fields.

    Args:
        integer: from `convert` or `load`.
        path: the file, such as "model.stablehlo".
        platforms: of `PLATFORMS`, those that the file is for.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: no platform, or an unknown one.
    """
    checks.at_least_one("platforms", platforms)
    for platform in platforms:
        checks.one_of("a platform", platform, PLATFORMS)
    program = with_plain_outputs(integer.program)
    (batch,) = export.symbolic_shape("batch")
    inputs = [
        jax.ShapeDtypeStruct((batch, *a.shape[1:]) if program.batch else a.shape, a.dtype)
        for a in program.signature
    ]
    # Constants of the module, not arguments.
    arrays = IntegerModel(jax.tree.map(np.asarray, integer.arrays), program)
    # An integer-only program has products without multipliers, and no floats on any platform.
    products = [s for s in program.steps if isinstance(s, Multiply)]
    exact = any(s.multiplier and s.exact for s in products)

    def on(formulation: str) -> Callable[..., Any]:
        return lambda *images: run(arrays, list(images), False, formulation)

    def forward(*images: Any) -> Any:
        if not exact:
            return on("int32")(*images)
        return jax.lax.platform_dependent(*images, cpu=on("cpu"), default=on("accelerator"))

    with _without_locations():
        exported = export.export(jax.jit(forward), platforms=list(platforms))(*inputs)
    data = bytes(exported.serialize())
    path = replace_file(path, data)
    card = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "platforms": list(exported.platforms),
        "inputs": [_describe(a) for a in exported.in_avals],
        "outputs": [_describe(a) for a in exported.out_avals],
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    replace_file(_card(path), f"{json.dumps(card, indent=1)}\n".encode())
    return len(data)


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Reads a file of `save_stablehlo`.

    Returns:
        images [batch, ...] -> the net's output; a net of several inputs takes as many arguments.

    Raises:
        ValueError: no such file, one that is damaged, of another version, or of a JAX that this one
            cannot read.
    """
    path = Path(path)
    try:
        card = json.loads(read_bytes(_card(path)))
        known = card["format"] == FORMAT and card["version"] == VERSION
        digest, writer = card["sha256"], card["jax"]
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise damaged(_card(path), f"it is no record of a {FORMAT}", REPAIR) from error
    if not known:
        raise damaged(_card(path), f"it is not of version {VERSION} of {FORMAT!r}", REPAIR)
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise damaged(path, f"its SHA-256 is not that of {_card(path).name}", REPAIR)
    try:
        return export.deserialize(bytearray(data)).call
    except Exception as error:  # flatbuffers and MLIR share no exception type
        raise ValueError(
            f"{path} was written by jax {writer} and cannot be read by jax {jax.__version__}; "
            f"{REPAIR} with this one, or use model.safetensors."
        ) from error


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of the module."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _card(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _describe(aval: Any) -> dict[str, Any]:
    return {
        "dtype": aval.dtype.name,
        "shape": [n if type(n) is int else str(n) for n in aval.shape],
    }
