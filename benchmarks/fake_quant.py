"""The cost of every quantizer in passes over memory, forward and backward.

    python benchmarks/fake_quant.py [--elements 4194304] [--channels 64] [--rounds 25]

A pass reads an array and writes one of the same size (y = 2 x). Forward that is all there is to do,
but for weight quantizers whose grid is a function of the weights: they read them once (binary) or
twice (ternary) more. Backward the input and the gradient are read and a gradient is written, one
pass and a half; then both are read again, one pass, for the sums of the parameters' gradients,
since XLA:CPU has no kernel with results of both kinds. Two and a half passes are the floor for a
quantizer that learns.

Every run follows a pass at once, and the ratio is to that pass. The clock is the processor time of
all threads, which other work on the machine disturbs less than the time on the wall. Printed are
the medians of the ratios, and in brackets their first quartiles.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import arms  # noqa: F401  (finds the project)
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import numerics, quantizers
from qkd_jax.numerics import Spec
from qkd_jax.quantizers import QUANTIZERS


def specs():
    """Each quantizer once: for activations where it takes them, else for weights."""
    for name in QUANTIZERS:
        for bits, signed in ((4, False), (4, True), (8, True), (2, True), (1, True)):
            spec = Spec(bits, quantizer=name, signed=signed)
            try:
                quantizers.check(spec)
            except ValueError:
                continue
            yield spec
            break


def compiled(spec, x):
    module = QUANTIZERS[spec.quantizer]
    params = module.init(numerics.finish(numerics.measure(x)), spec)

    def forward(x, params):
        return module.fake_quant(x, params, spec, batch_axes=(0,))

    def backward(x, params, g):
        return jax.vjp(forward, x, params)[1](g)

    return params, jax.jit(forward), jax.jit(backward)


def clock(run):
    begin = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=4_194_304)
    parser.add_argument("--channels", type=int, default=64, help="of the innermost axis")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    shape = (64, args.elements // (64 * 16 * args.channels), 16, args.channels)
    x = jnp.abs(jax.random.normal(jax.random.key(0), shape))
    g = jax.random.normal(jax.random.key(1), shape)
    double = jax.jit(lambda x: 2 * x)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for spec in specs():
        signed = x * jnp.sign(g) if spec.signed else x
        params, forward, backward = compiled(spec, signed)
        runs[spec.label, "forward"] = lambda f=forward, v=signed, p=params: f(v, p)
        runs[spec.label, "backward"] = lambda f=backward, v=signed, p=params: f(v, p, g)
    passes: list[float] = []
    ratios: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 2):
        for name, run in runs.items():
            unit, taken = clock(lambda: double(x)), clock(run)
            if turn >= 2:
                passes.append(unit)
                ratios[name].append(taken / unit)
    size = 4 * np.prod(shape) / 1e6
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print(
        f"{size:.0f} MB an array, one pass {1000 * statistics.median(passes):.2f} ms of processor "
        f"time, {args.rounds} rounds\n"
    )
    print("| quantizer | forward, passes | backward, passes |\n|---|---|---|")
    for label in dict.fromkeys(name for name, _ in runs):
        cells = [
            f"{statistics.median(ratios[label, kind]):.2f} "
            f"({statistics.quantiles(ratios[label, kind])[0]:.2f})"
            for kind in ("forward", "backward")
        ]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
