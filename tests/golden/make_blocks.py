"""Makes blocks.npz: what torchao makes of tensors in blocks with small scales, MX and NVFP4.

    pip install torch==2.14.1 torchao==0.18.0 numpy
    python tests/golden/make_blocks.py

"mx|<element format>" holds x, the scales' E8M0 bytes and the values; "nvfp4" x, the scale of the
tensor, the blocks' E4M3 scales and the values. The suite reads the numbers and needs no package.
"""

import pathlib

import numpy as np
import torch
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

OUT = pathlib.Path(__file__).with_name("blocks.npz")
ELEMENTS = {
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e3m2": DTYPE_FP6_E3M2,
    "e2m3": DTYPE_FP6_E2M3,
    "e2m1": torch.float4_e2m1fn_x2,
}


def tensor(rng, block):
    """Rows of very different sizes, ties and powers of two, zeros, and one block of zeros."""
    x = rng.normal(size=(6, 4 * block)) * np.exp2(rng.integers(-9, 7, (6, 1)))
    x[1] = np.exp2(rng.integers(-6, 5, 4 * block)) * rng.choice([-1, 1], 4 * block)
    x[2] = rng.integers(-24, 25, 4 * block) / 4  # many half way between two values
    x[3, :block] = 0
    x[4, ::3] = 0
    x[5] = 2.0**-18 * np.abs(x).max() * rng.normal(size=4 * block)
    return x.astype(np.float32)


def main():
    rng, out = np.random.default_rng(0), {}
    for name, kind in ELEMENTS.items():
        x = torch.tensor(tensor(rng, 32))
        scale, codes = to_mx(x, kind, 32, ScaleCalculationMode.FLOOR)
        y = to_dtype(codes, scale, kind, 32, torch.float32)
        out[f"mx|{name}|x"], out[f"mx|{name}|y"] = x.numpy(), y.numpy()
        out[f"mx|{name}|scale"] = scale.view(torch.uint8).numpy()
    x = torch.tensor(tensor(rng, 16))
    second = per_tensor_amax_to_scale(x.abs().max())
    made = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=second)
    out["nvfp4|x"], out["nvfp4|tensor_scale"] = x.numpy(), second.numpy()
    out["nvfp4|scale"] = made.scale.to(torch.float32).numpy()
    out["nvfp4|y"] = made.dequantize(torch.float32).numpy()
    np.savez_compressed(OUT, **out)
    print({name: array.shape for name, array in out.items()})


if __name__ == "__main__":
    main()
