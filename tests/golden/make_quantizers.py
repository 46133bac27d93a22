"""Makes quantizers.npz: values and gradients of quantizers in PyTorch, its own and by papers.

    pip install torch==2.13.0 numpy
    python tests/golden/make_quantizers.py

The test suite reads the numbers and needs no PyTorch. Inputs of the first three groups are a grid
of multiples of scale / 8, with every edge and every exact half in it, and some random numbers.
"""

import pathlib

import numpy as np
import torch
from torch.ao.quantization import MovingAverageMinMaxObserver, PerChannelMinMaxObserver

OUT = pathlib.Path(__file__).with_name("quantizers.npz")
FORMATS = {
    "int2": (-2, 1),
    "int3": (-4, 3),
    "uint2": (0, 3),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-127, 127),
    "uint8": (0, 255),
}


def inputs(n: int, p: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Multiples of scale / 8 around both ends and zero, and random numbers over twice the range."""
    grids = [torch.arange(-20, 21, dtype=torch.float64) / 8 + centre for centre in (n, 0, p)]
    random = (torch.rand(40, generator=generator, dtype=torch.float64) * 2 - 0.5) * (p - n) + n
    return (torch.cat([*grids, random]) * scale).float()


class RoundPass(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g


def lsq(x, step, n, p, gradient_scale):
    """The paper's listing: composed operations, differentiated by PyTorch."""
    step = step * gradient_scale + (step - step * gradient_scale).detach()
    return RoundPass.apply(torch.clamp(x / step, n, p)) * step


def qil(x, center, half_width, q, signed):
    """Transformer with gamma = 1 and discretizer; magnitude restored by a constant."""
    magnitude = x.abs() if signed else x
    u = torch.clamp((magnitude - center) / (2 * half_width) + 0.5, 0, 1)
    u = u * torch.sign(x) if signed else u
    return RoundPass.apply(u * q) / q * (center + half_width).detach()


def main() -> None:
    """Computes every group and writes the file."""
    generator = torch.Generator().manual_seed(0)
    out: dict[str, np.ndarray] = {}

    def keep(name: str, **tensors) -> None:
        for key, value in tensors.items():
            out[f"{name}/{key}"] = np.asarray(torch.as_tensor(value).detach())

    for name, (n, p) in FORMATS.items():
        for kind, scale, zero_point in (
            ("symmetric", 0.25, 0),
            ("symmetric_uneven", 0.0371, 0),
            ("affine", 0.5, (n + p) // 2),
            ("affine_uneven", 0.0917, (n + 2 * p) // 3),
        ):
            x = (inputs(n, p, scale, generator) - zero_point * scale).requires_grad_()
            g = torch.randn(x.shape, generator=generator)
            y = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, n, p)
            y.backward(g)
            keep(f"uniform/{kind}/{name}", x=x, g=g, y=y, dx=x.grad)
            keep(f"uniform/{kind}/{name}", scale=scale, zero_point=zero_point)

        # A channel for each element, so that the gradient of the step comes element by element.
        x = inputs(n, p, 0.25, generator)[:, None].requires_grad_()
        step = torch.full(x.shape[:1], 0.25, requires_grad=True)
        zeros = torch.zeros(x.shape[:1])
        y = torch._fake_quantize_learnable_per_channel_affine(x, step, zeros, 0, n, p, 1.0)
        y.sum().backward()
        keep(f"learnable/{name}", x=x, y=y, dx=x.grad, dstep=step.grad)

        x = (torch.randn((6, 5), generator=generator) * p / 2 * 0.3).requires_grad_()
        step = torch.tensor(0.3, requires_grad=True)
        g = torch.randn(x.shape, generator=generator)
        y = lsq(x, step, n, p, 1 / (5 * p) ** 0.5)
        y.backward(g)
        keep(f"lsq/{name}", x=x, g=g, y=y, dx=x.grad, step=step, dstep=step.grad)

        signed = n < 0
        q = 2 ** (int(name.strip("uint")) - signed) - 1
        for kind, c, d in (("start", 0.75, 0.75), ("pruned", 0.9, 0.6)):
            x = torch.randn((8, 5), generator=generator).requires_grad_()
            center = torch.tensor(c, requires_grad=True)
            half_width = torch.tensor(d, requires_grad=True)
            g = torch.randn(x.shape, generator=generator)
            y = qil(x, center, half_width, q, signed)
            y.backward(g)
            keep(f"qil/{kind}/{name}", x=x, g=g, y=y, dx=x.grad, center=center)
            keep(f"qil/{kind}/{name}", half_width=half_width, dcenter=center.grad)
            keep(f"qil/{kind}/{name}", dhalf_width=half_width.grad)

    x = torch.randn((4, 3, 5), generator=generator).requires_grad_()
    scale = torch.tensor([0.1, 0.25, 0.4])
    zero_point = torch.tensor([3, -2, 0], dtype=torch.int32)
    g = torch.randn(x.shape, generator=generator)
    y = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, -8, 7)
    y.backward(g)
    keep("uniform_channel", x=x, g=g, y=y, dx=x.grad, scale=scale, zero_point=zero_point)

    batches = torch.randn((6, 7, 4), generator=generator) * torch.arange(1, 7)[:, None, None] + 0.5
    moving = MovingAverageMinMaxObserver(averaging_constant=0.01)
    channel = PerChannelMinMaxObserver(
        ch_axis=1, dtype=torch.quint8, qscheme=torch.per_channel_affine, eps=1e-12
    )
    for batch in batches:
        moving(batch)
        channel(batch)
    scale, zero_point = channel.calculate_qparams()
    keep("observers", batches=batches, ema_lo=moving.min_val, ema_hi=moving.max_val)
    keep("observers", lo=channel.min_val, hi=channel.max_val, scale=scale, zero_point=zero_point)

    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
