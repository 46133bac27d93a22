"""Makes parity.npz: what PyTorch, brevitas and qwix make of random tensors of many shapes.

    pip install torch==2.14.1 brevitas==0.13.4 qwix==0.1.8 numpy
    python tests/golden/make_parity.py

Groups are "<oracle>|<number>|<what the test needs to know>". The suite reads the numbers and needs
none of the packages.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import qwix
import torch
from brevitas.nn import QuantConv2d, QuantReLU
from brevitas.quant import (
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)

OUT = pathlib.Path(__file__).with_name("parity.npz")
SHAPES = [(1,), (7,), (3, 5), (17, 4), (2, 3, 5), (2, 3, 4, 5), (1, 1, 9, 2), (2, 2, 3, 2, 3)]


def uniform(out, rng):
    """PyTorch's fake quantization, per tensor and per channel, value and gradient."""
    for number, shape in enumerate(SHAPES):
        for bits, signed, axis in ((2, True, None), (4, False, None), (8, True, -1), (4, True, 0)):
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            x = torch.tensor(rng.normal(0, high / 3, shape), dtype=torch.float32).requires_grad_()
            g = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
            size = 1 if axis is None else shape[axis]
            scale = torch.tensor(rng.uniform(0.1, 0.6, size), dtype=torch.float32)
            zero = torch.tensor(rng.integers(low, high + 1, size), dtype=torch.int32)
            ends = low, high
            if axis is None:
                y = torch.fake_quantize_per_tensor_affine(x, scale.item(), zero.item(), *ends)
            else:
                y = torch.fake_quantize_per_channel_affine(x, scale, zero, axis % len(shape), *ends)
            y.backward(g)
            keep(out, f"uniform|{number}|{bits},{int(signed)},{axis}", x=x, g=g, y=y, dx=x.grad)
            keep(out, f"uniform|{number}|{bits},{int(signed)},{axis}", scale=scale, zero=zero)


def learnable(out, rng):
    """PyTorch's learnable scale and zero point.

    Its mask is on the rounded code and LSQ's on the code before, so no element lies in the half
    step beyond an end of the grid where they differ.
    """
    for number, shape in enumerate(SHAPES):
        for bits, signed, axis in ((2, False, None), (4, True, None), (3, False, -1), (8, True, 0)):
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            size = 1 if axis is None else shape[axis]
            if axis is not None and (size == 1 or len(shape) == 1):
                continue  # PyTorch 2.14 loses the axis of the gradient there, and raises
            scale = rng.uniform(0.1, 0.6, size).astype(np.float32)
            zero = rng.integers(low, high + 1, size).astype(np.float32)
            if axis is None:
                # In the backward pass per tensor PyTorch 2.14 rounds by adding 1/2 and cutting off,
                # which is off by one for negative ones.
                zero = np.minimum(np.abs(zero), high)
            along = [1] * len(shape)
            along[axis or 0] = size
            wide = lambda v, along=along: np.reshape(v, along)
            u = rng.uniform(low - 0.4 * (high - low), high + 0.4 * (high - low), shape)
            u = np.where((u > high) & (u < high + 0.6), high + 0.7, u)
            u = np.where((u < low) & (u > low - 0.6), low - 0.7, u)
            x = torch.tensor((u - wide(zero)) * wide(scale), dtype=torch.float32).requires_grad_()
            g = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
            step, offset = (torch.tensor(v).requires_grad_() for v in (scale, zero))
            if axis is None:
                y = torch._fake_quantize_learnable_per_tensor_affine(
                    x, step, offset, low, high, 1.0
                )
            else:
                y = torch._fake_quantize_learnable_per_channel_affine(
                    x, step, offset, axis % len(shape), low, high, 1.0
                )
            y.backward(g)
            group = f"learnable|{number}|{bits},{int(signed)},{axis}"
            keep(out, group, x=x, g=g, y=y, dx=x.grad, scale=step, zero=offset)
            keep(out, group, dscale=step.grad, dzero=offset.grad)


def brevitas(out, rng):
    """Narrow-range weights per tensor and per channel, and activations behind a ReLU."""
    for bits in (2, 4, 8):
        for kind, quant in (
            ("tensor", Int8WeightPerTensorFloat),
            ("channel", Int8WeightPerChannelFloat),
        ):
            layer = QuantConv2d(3, 6, 3, weight_quant=quant, weight_bit_width=bits)
            weight = torch.tensor(rng.normal(size=(6, 3, 3, 3)), dtype=torch.float32)
            layer.weight.data = weight.clone()
            quantized = layer.quant_weight()
            group = f"brevitas_weight|{bits}|{kind}"
            codes = torch.round(quantized.value / quantized.scale)
            keep(out, group, x=weight, y=quantized.value, scale=quantized.scale, codes=codes)
        layer = QuantReLU(
            act_quant=Uint8ActPerTensorFloat, bit_width=bits, return_quant_tensor=True
        )
        layer.train()
        data = torch.tensor(abs(rng.normal(size=(4, 50))), dtype=torch.float32)
        layer(data)
        layer.eval()
        x = torch.tensor(rng.normal(size=(6, 20)), dtype=torch.float32).requires_grad_()
        g = torch.tensor(rng.normal(size=x.shape), dtype=torch.float32)
        found = layer(x)
        found.value.backward(g)
        keep(out, f"brevitas_input|{bits}|", x=x, g=g, y=found.value, dx=x.grad, scale=found.scale)


def quantize(out, rng):
    """qwix: absmax and minmax; per tensor, per channel, in tiles."""
    for number, (shape, channels, tiles) in enumerate(
        [
            ((9,), (), None),
            ((6, 8), (), None),
            ((6, 8), (0,), None),
            ((5, 4, 3), (0, 2), None),
            ((6, 8), (1,), {0: 3}),
            ((4, 16), (0,), {1: 8}),
        ]
    ):
        for qtype, how in (("int4", "absmax"), ("int8", "absmax"), ("int8", "minmax")):
            x = rng.normal(0.3, 1, shape).astype(np.float32)
            found = qwix.quantize(
                jnp.asarray(x),
                qtype,
                channelwise_axes=channels,
                tiled_axes=tiles,
                calibration_method=how,
            )
            axis, tile = next(iter(tiles.items())) if tiles else (-1, 0)
            words = ",".join(map(str, channels)), axis, tile, qtype, how
            group = f"qwix|{number}|{';'.join(map(str, words))}"
            keep(out, group, x=x, y=qwix.dequantize(found), scale=found.scale)
            keep(out, group, codes=np.asarray(found.qvalue).astype(np.int8))
            if found.zero_point is not None:
                keep(out, group, zero=np.asarray(found.zero_point).astype(np.int8))


def keep(out, group, **arrays):
    for key, value in arrays.items():
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        out[f"{group}/{key}"] = np.asarray(value)


def main() -> None:
    """Computes every group and writes the file."""
    out: dict[str, np.ndarray] = {}
    for number, make in enumerate((uniform, learnable, brevitas, quantize)):
        make(out, np.random.default_rng(number))
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size} bytes; torch {torch.__version__}")


if __name__ == "__main__":
    main()
