"""Makes weight_only.npz: AWQ, HQQ, GPTQ by activation order and error propagation by others.

    pip install qwix==0.1.8 hqq==0.2.8.post1 autoawq==0.2.9 llmcompressor==0.14.0.1 \
        gptqmodel==7.7.0
    python tests/golden/make_weight_only.py

The test suite reads the numbers and needs none of them. Activations have a few wide channels, as a
language model's have, and are small integers, so that X X^T is exact.
"""

import pathlib

import numpy as np
import torch
from awq.quantize.quantizer import AwqQuantizer
from compressed_tensors.quantization import QuantizationArgs
from gptqmodel.quantization import gar
from hqq.core.optimize import optimize_weights_proximal_v2
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from qwix.contrib import qep_core

OUT = pathlib.Path(__file__).with_name("weight_only.npz")
GROUP = 32


def activations(rng: np.random.Generator, columns: int, samples: int) -> np.ndarray:
    """Returns [samples, columns]: correlated channels, of which a few are 10 times as wide."""
    mixing = np.eye(columns) + 0.5 * rng.normal(size=(columns, columns)) / np.sqrt(columns)
    sizes = rng.uniform(1, 4, columns)
    sizes[rng.permutation(columns)[: columns // 16]] *= 10
    return np.clip(np.rint(rng.normal(size=(samples, columns)) @ mixing * sizes), -127, 127)


def awq(rng: np.random.Generator, out: dict[str, np.ndarray]) -> None:
    """The search for a scale and for a range, of one linear layer."""
    weight = rng.standard_t(4, size=(64, 96)).astype(np.float32)
    x = activations(rng, 96, 200).astype(np.float32)
    out["awq/weight"], out["awq/inputs"] = weight, x.astype(np.int8)
    # An affine range that is cut at both ends puts them between two codes: a tie.
    skewed = (np.abs(weight) - 0.2).astype(np.float32)
    out["awq/skewed"] = skewed
    symmetric = weight
    for name, bits, affine in (("int4", 4, False), ("uint4", 4, True), ("uint3", 3, True)):
        weight = skewed if affine else symmetric
        quantizer = AwqQuantizer.__new__(AwqQuantizer)
        quantizer.w_bit, quantizer.group_size, quantizer.zero_point = bits, GROUP, affine
        quantizer.duo_scaling, quantizer.max_chunk_memory = False, 2**30
        quantizer.n_parallel_calib_samples = None
        layer = torch.nn.Linear(96, 64, bias=False)
        layer.weight.data = torch.tensor(weight)
        inputs = torch.tensor(x)
        with torch.no_grad():
            scale = quantizer._compute_best_scale(
                inputs,
                torch.ones(96),
                inputs.abs().mean(0),
                layer,
                [layer],
                layer(inputs),
            )
            clip = quantizer._compute_best_clip(torch.tensor(weight), inputs)
        out[f"awq/{name}/scale"], out[f"awq/{name}/clip"] = scale.numpy(), clip.squeeze(-1).numpy()


def hqq(rng: np.random.Generator, out: dict[str, np.ndarray]) -> None:
    """Zero points after 1 and 20 steps, with errors in the weight's unit and no early stop."""
    weight = (3 * rng.standard_t(3, size=(24, 64))).astype(np.float32)
    out["hqq/weight"] = weight
    for bits in (8, 4, 3, 2):
        low, high = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
        scale = (2**bits - 1) / (high - low)
        for steps in (2, 20):
            codes, _, zero = optimize_weights_proximal_v2(
                torch.tensor(weight),
                torch.tensor(scale),
                torch.tensor(-low * scale),
                [0, 2**bits - 1],
                axis=1,
                dtype=torch.float32,
                opt_params=dict(
                    lp_norm=0.7,
                    beta=10.0,
                    kappa=1.01,
                    iters=steps,
                    tol=0.0,
                    early_stop=False,
                    scale_gridsearch=False,
                ),
            )
            out[f"hqq/uint{bits}/zero_{steps}"] = zero.numpy()
            out[f"hqq/uint{bits}/codes_{steps}"] = codes.numpy().astype(np.uint8)


def gptq(rng: np.random.Generator, out: dict[str, np.ndarray]) -> None:
    """Static groups, the columns sorted by the diagonal of H; and the order of whole groups."""
    rows, columns = 12, 160
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    x = activations(rng, columns, 3 * columns)
    hessian = torch.tensor((x.T @ x).astype(np.float32))
    # Half a step above the largest code: its symmetric scale is that of `scaling="qmax_half"`.
    groups = weight.reshape(rows, -1, GROUP)
    scale = np.abs(groups).max(-1) / 7.5
    args = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=GROUP,
        actorder="weight",
    )
    found, _, fallback = quantize_weight(
        torch.tensor(weight)[None],
        hessian[None].clone(),
        torch.tensor(scale)[None],
        torch.zeros(1, rows, columns // GROUP),
        None,
        args,
    )
    assert not fallback.any()
    local = gar.compute_local_perms(torch.diag(hessian), GROUP)
    order = gar.compute_global_perm(torch.diag(hessian), GROUP)
    out["gptq/weight"], out["gptq/inputs"] = weight, x.astype(np.int8)
    out["gptq/scale"], out["gptq/rounded"] = scale, found[0].numpy()
    out["gptq/group_order"] = gar.compose_final_perm(local, order, GROUP).numpy()


def propagation(rng: np.random.Generator, out: dict[str, np.ndarray]) -> None:
    """The corrected weight."""
    weight = rng.normal(size=(10, 48)).astype(np.float32)
    x = activations(rng, 48, 150)
    noisy = np.rint(x + rng.normal(size=x.shape) * 3)
    stats = qep_core.compute_qep_stats(noisy.T.astype(np.float32), x.T.astype(np.float32))
    for strength in (0.5, 1.0):
        found = qep_core.weight_correct(
            weight,
            stats["hessian"],
            stats["hessian_delta"],
            correction_factor=strength,
            damping_factor=0.01,
        )
        out[f"qep/corrected_{strength}"] = np.asarray(found)
    out["qep/weight"], out["qep/inputs"] = weight, x.astype(np.int8)
    out["qep/noisy"] = noisy.astype(np.int16)


def main() -> None:
    """Computes every case and writes the file."""
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for method in (awq, hqq, gptq, propagation):
        method(rng, out)
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
