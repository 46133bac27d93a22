"""Makes papers.npz: quantizers restated from their papers in PyTorch, float64, by autograd.

    pip install torch==2.14.1 torchao==0.18 numpy
    python tests/golden/make_papers.py

Each restatement composes the paper's formula from differentiable operations, with a
straight-through function only where the paper has one; nothing is shared with the library. The
suite reads the numbers and needs no PyTorch. Groups are "<quantizer>|<bits>|<signed>|<options>";
parameters carry their own names, gradients a "d" in front, without the library's gradient scale.
"""

import pathlib

import numpy as np
import torch
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

OUT = pathlib.Path(__file__).with_name("papers.npz")
# The 16 values of NF4, from appendix E of its paper, to seven places.
NF4 = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]


class Pass(torch.autograd.Function):
    """f(x) with a gradient of ours: backward(x, f(x), g)."""

    @staticmethod
    def forward(ctx, x, function, backward):
        y = function(x)
        ctx.save_for_backward(x, y)
        ctx.back = backward
        return y

    @staticmethod
    def backward(ctx, g):
        return ctx.back(*ctx.saved_tensors, g), None, None


def straight(x, function=torch.round):
    return Pass.apply(x, function, lambda x, y, g: g)


def ends(bits, signed):
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + (bits >= 8), 2 ** (bits - 1) - 1


def lsq(x, step, n, p):
    return straight(torch.clamp(x / step, n, p)) * step


def lsq_plus(x, params, bits, signed, options):
    n, p = ends(bits, signed)
    if "offset" not in params:
        return lsq(x, params["step"], n, p)
    # The offset is on the grid already, so snapping it changes nothing.
    return lsq(x - params["offset"], params["step"], n, p) + params["offset"]


def tqt(x, params, bits, signed, options):
    n, p = ends(bits, signed)
    step = 2 ** straight(params["log2_threshold"], torch.ceil) / 2 ** (bits - signed)
    return lsq(x, step, n, p)


def pact(x, params, bits, signed, options):
    alpha, p = params["alpha"], 2**bits - 1
    # Clipping carries alpha's whole gradient; the scale is a constant to it.
    clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    fixed = alpha.detach()
    return straight(clipped * p / fixed) * fixed / p


def dorefa(x, params, bits, signed, options):
    steps = 2**bits - 1

    def quantize(r):
        return straight(steps * r) / steps

    if not signed:
        return quantize(torch.clamp(x, 0, 1))
    if bits == 1:
        return straight(x, lambda x: torch.where(x >= 0, 1.0, -1.0) * x.abs().mean())
    t = torch.tanh(x)
    top = t.detach().abs().max()
    out = 2 * quantize(t / (2 * top) + 0.5) - 1
    return out * top if options.get("restore", True) else out


def ewgs(x, params, bits, signed, options):
    steps, delta = 2**bits - 1, options.get("delta", 1e-3)
    xn = torch.clamp((x - params["lower"]) / (params["upper"] - params["lower"]), 0, 1)
    xq = Pass.apply(
        xn,
        lambda x: torch.round(steps * x) / steps,
        lambda x, y, g: g * (1 + delta * torch.sign(g) * (x - y)),
    )
    return params["gain"].abs() * (2 * (xq - 0.5) if signed else xq)


def soft(u, floor, bend):
    """The hard staircase with the gradient of the soft one."""
    value = floor + bend(u - floor)
    return value + (torch.round(u) - value).detach()


def dsq(x, params, bits, signed, options):
    n, p = ends(bits, signed)
    alpha = params["alpha"]
    k, s = torch.log(2 / alpha - 1), 1 / (1 - alpha)
    u = torch.clamp(x / params["step"], n, p)
    at = torch.where(u.detach() >= p, p, torch.where(u.detach() <= n, n, torch.floor(u.detach())))
    out = soft(u, at, lambda f: 0.5 * (1 + s * torch.tanh(k * (f - 0.5))))
    inside = (u > n) & (u < p)
    return torch.where(inside, out, u.detach()) * params["step"]


def sigmoid(x, params, bits, signed, options):
    n, p = ends(bits, signed)
    temperature = params["temperature"].detach()
    u = torch.clamp(x / params["step"], n, p)
    at = torch.floor(u.detach())
    full = 2 * torch.sigmoid(temperature / 2) - 1
    low = torch.sigmoid(-temperature / 2)
    out = soft(u, at, lambda f: (torch.sigmoid(temperature * (f - 0.5)) - low) / full)
    inside = (u > n) & (u < p)
    return torch.where(inside, out, u.detach()) * params["step"]


def binary(x, params, bits, signed, options):
    sign = Pass.apply(
        x,
        lambda x: torch.where(x >= 0, 1.0, -1.0).double(),
        lambda x, y, g: g * (x.abs() <= 1),
    )
    return (params["alpha"] if options.get("static") else x.abs().mean()) * sign


def ternary(x, params, bits, signed, options):
    def code(x):
        size = x.abs()
        above = size > options.get("threshold", 0.7) * size.mean()
        return size[above].mean() * torch.sign(x) * above

    return straight(x, code)


def apot(x, params, bits, signed, options):
    # The exponents that the paper's own code lists, by bits of magnitude.
    table = {
        1: [[1]],
        2: [[1, 2, 3]],
        3: [[1, 2, 4], [3]],
        4: [[1, 3, 5], [2, 4, 6]],
        5: [[1, 3, 6], [2, 4, 7], [5]],
        6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
    }
    grid = torch.zeros(1).double()
    for exponents in table[bits - signed]:
        grid = (grid[:, None] + torch.tensor([0.0, *(2.0**-e for e in exponents)])).flatten()
    grid = grid / grid.max()
    spread = 1.0
    if options.get("normalize"):
        spread = x.detach().std(correction=0)
        x = (x - x.detach().mean()) / spread

    def nearest(u):
        return grid[(u.abs()[..., None] - grid).abs().argmin(-1)] * torch.sign(u)

    u = torch.clamp(x / params["alpha"], -1 if signed else 0, 1)
    return straight(u, nearest) * params["alpha"] * spread


def codebook(x, params, bits, signed, options):
    if bits == 4:  # as published
        grid = torch.tensor(NF4).double()
    else:
        half, top = 2 ** (bits - 1), 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
        up = torch.special.ndtri(torch.linspace(0.5, top, half + 1).double())
        down = torch.special.ndtri(torch.linspace(0.5, top, half).double())
        grid = torch.cat([-down.flip(0)[:-1], up]) / up[-1]
    u = torch.clamp(x / params["scale"].detach(), -1, 1)
    return (
        straight(u, lambda u: grid[(u[..., None] - grid).abs().argmin(-1)])
        * params["scale"].detach()
    )


def learn_bits(x, params, bits, signed, options):
    b = straight(params["bits"])
    high = 2 ** (b - int(signed)) - 1
    low = -(2 ** (b - 1)) if signed else torch.zeros(())
    u = x / params["step"]
    out = torch.where(u >= high, high, torch.where(u <= low, low, straight(u)))
    return out * params["step"]


def surrogate(kind, strength):
    def quantizer(x, params, bits, signed, options):
        n, p = ends(bits, signed)
        if kind == "ewgs":
            u = torch.clamp(x / params["step"], n, p)
            rounded = Pass.apply(
                u,
                torch.round,
                lambda x, y, g: g * (1 + strength * torch.sign(g) * (x - y) / (p - n)),
            )
            return rounded * params["step"]
        extra = {"dsq": {"alpha": torch.tensor(strength).double()}}.get(
            kind, {"temperature": torch.tensor(strength).double()}
        )
        return {"dsq": dsq, "sigmoid": sigmoid}[kind](x, {**params, **extra}, bits, signed, options)

    return quantizer


CASES = [
    *(("lsq_plus", b, True, {}, {"step": 0.21}) for b in (2, 4)),
    *(("lsq_plus", b, False, {}, {"step": 0.25, "offset": -0.5}) for b in (2, 3, 4)),
    *(("tqt", b, s, {}, {"log2_threshold": 0.3}) for b in (2, 4, 8) for s in (True, False)),
    *(("pact", b, False, {}, {"alpha": 1.3}) for b in (1, 2, 4)),
    *(("dorefa", b, s, {}, {}) for b in (1, 2, 4) for s in (True, False)),
    ("dorefa", 3, True, {"restore": False}, {}),
    *(
        ("ewgs", b, s, {"delta": d}, {"lower": -1.1 if s else 0.05, "upper": 1.2, "gain": 0.9})
        for b in (1, 2, 4)
        for s in (True, False)
        for d in (0.0, 0.2)
    ),
    *(("dsq", b, s, {}, {"step": 0.23, "alpha": 0.25}) for b in (2, 4) for s in (True, False)),
    *(
        ("sigmoid", b, s, {}, {"step": 0.23, "temperature": 6.0})
        for b in (2, 4)
        for s in (True, False)
    ),
    ("binary", 1, True, {}, {}),
    ("binary", 1, True, {"static": True}, {"alpha": 0.6}),
    ("ternary", 2, True, {}, {}),
    ("ternary", 2, True, {"threshold": 0.5}, {}),
    *(
        ("lsq", b, s, {"learn_bits": True}, {"step": 0.21, "bits": b - 0.7})
        for b in (3, 4, 8)
        for s in (True, False)
    ),
    *(
        ("lsq", 3, s, {"backward": k, "strength": v}, {"step": 0.21})
        for k, v in (("ewgs", 0.3), ("dsq", 0.3), ("sigmoid", 7.0))
        for s in (True, False)
    ),
]
# With random numbers of their own, so that those above stay.
NON_UNIFORM = [
    *(("apot", b, True, {}, {"alpha": 1.3}) for b in (2, 3, 4, 5, 6)),
    *(("apot", b, False, {}, {"alpha": 1.3}) for b in (1, 2, 3, 4, 6)),
    ("apot", 4, True, {"normalize": True}, {"alpha": 1.1}),
    *(("codebook", b, True, {}, {"scale": 1.4}) for b in (2, 3, 4, 5)),
    ("apot", 5, False, {}, {"alpha": 1.3}),
]


def restated(cases, generator):
    """The arrays of each case's group."""
    out = {}
    for name, bits, signed, options, values in cases:
        x = torch.randn((6, 5), generator=generator).float().double()
        x = (x if signed or "offset" in values else x.abs()).requires_grad_()
        g = torch.randn((6, 5), generator=generator).float().double()
        params = {
            k: torch.tensor(np.float32(v)).double().requires_grad_() for k, v in values.items()
        }
        if "backward" in options:
            function = surrogate(options["backward"], options["strength"])
        elif options.get("learn_bits"):
            function = learn_bits
        else:
            function = globals()[name]
        y = function(x, params, bits, signed, options)
        y.backward(g)
        text = ",".join(f"{k}={v}" for k, v in options.items())
        group = f"{name}|{bits}|{int(signed)}|{text}"
        found = {"x": x, "g": g, "y": y, "dx": x.grad}
        for key, value in params.items():
            found[key] = value
            found["d" + key] = torch.zeros(()) if value.grad is None else value.grad
        out |= {f"{group}/{k}": np.asarray(v.detach()) for k, v in found.items()}
    return out


def main():
    generator = torch.Generator().manual_seed(0)
    out = restated(CASES, generator)
    out |= restated(NON_UNIFORM, torch.Generator().manual_seed(1))

    # The three conventions of a symmetric scale, and the affine one, as torchao chooses them.
    weights = torch.randn((6, 8), generator=generator) + 0.2
    for granularity, block in (("tensor", (6, 8)), ("channel", (1, 8)), ("group", (1, 4))):
        for kind in ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC"):
            for bits in (4, 8):
                n, p = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
                scale, zero_point = choose_qparams_affine(
                    weights, MappingType[kind], block, torch.int8, n, p, eps=1e-12
                )
                codes = quantize_affine(weights, block, scale, zero_point, torch.int8, n, p)
                group = f"torchao|{granularity}|{kind}|{bits}"
                out |= {
                    f"{group}/x": weights.numpy(),
                    f"{group}/scale": scale.numpy(),
                    f"{group}/zero_point": zero_point.numpy(),
                    f"{group}/codes": codes.numpy(),
                }
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size} bytes; torch {torch.__version__}")


if __name__ == "__main__":
    main()
