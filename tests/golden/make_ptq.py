"""Makes ptq.npz: GPTQ and SmoothQuant by qwix.

    pip install qwix==0.1.8
    python tests/golden/make_ptq.py

The test suite reads the numbers and needs no qwix. Inputs have correlated rows of uneven size and
two dead ones, as a trained layer's inputs have; they are small integers, so that X X^T is exact.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from qwix._src.core import qarray
from qwix.contrib import gptq_core, smooth_quant

OUT = pathlib.Path(__file__).with_name("ptq.npz")
# name: (rows, columns, qtype, axes with a scale each, group, block)
CASES = {
    "tensor_int4": (12, 40, "int4", (), None, 128),
    "channel_int4": (12, 136, "int4", (0,), None, 128),
    "channel_int8": (8, 60, "int8", (0,), None, 128),
    "channel_int2": (9, 70, "int2", (0,), None, 32),
    # qwix takes a group's scale from the weights as they were at the block's start, so a block is a
    # group: then both are the weights at the group's start.
    "group_int4": (10, 96, "int4", (0,), 32, 32),
    "group_int8": (8, 128, "int8", (0,), 64, 64),
}


def main() -> None:
    """Computes every case and writes the file."""
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for name, (rows, columns, qtype, axes, group, block) in CASES.items():
        weight = rng.normal(size=(rows, columns)).astype(np.float32)
        mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns)
        inputs = (np.eye(columns) + mixing) @ rng.normal(size=(columns, 3 * columns))
        inputs = np.clip(np.rint(inputs * rng.uniform(1, 9, (columns, 1))), -99, 99)
        inputs[[3, columns - 2]] = 0
        hessian = gptq_core.compute_hessian(jnp.asarray(inputs, jnp.float32))
        how = qarray.HowToQuantize(
            qtype=getattr(jnp, qtype),
            channelwise_axes=list(axes),
            tiled_axes={} if group is None else {1: group},
        )
        found, _ = gptq_core.quantize_weight(
            jnp.asarray(weight), hessian, how, blocksize=block, percdamp=0.01
        )
        out[f"gptq/{name}/weight"] = weight
        out[f"gptq/{name}/inputs"] = inputs.astype(np.int8)
        out[f"gptq/{name}/codes"] = np.asarray(found.qvalue).astype(np.int8)
        out[f"gptq/{name}/scale"] = np.asarray(found.scale)
    activations = rng.uniform(1e-3, 30, 24).astype(np.float32)
    weights = rng.uniform(1e-3, 2, 24).astype(np.float32)
    out["smooth/activations"], out["smooth/weights"] = activations, weights
    for alpha in (0.0, 0.5, 0.75, 1.0):
        scale = smooth_quant.compute_scales_ratio(
            jnp.asarray(activations), jnp.asarray(weights), alpha
        )
        out[f"smooth/scale_{alpha}"] = np.asarray(scale)
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size} bytes, jax {jax.__version__}")


if __name__ == "__main__":
    main()
