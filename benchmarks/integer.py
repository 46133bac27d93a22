"""Speed of products of codes on this machine: on integers, or on integers held in float32.

    python benchmarks/integer.py [--rounds 15] [--models=resnet20,mlp]

Both give the same bits where a layer's sums, or those of the pieces that it is cut into, stay below
2^24 (`convert` proves the bound from the codes). Times of `integer_apply` by formulation, and of
the float net, at batches 1 and 64, in turn; medians in milliseconds, and the ratio of medians to
the float net.
"""

import argparse
import functools
import os

import arms  # noqa: F401  (finds the project)
import jax
import numpy as np

import qkd_jax as qk
from qkd_jax.deploy import convert, integer_apply, latency
from qkd_jax.models import create
from qkd_jax.quantize import presets

NETS = {
    "resnet20": (dict(width=16), (32, 32, 3)),
    "mlp": (dict(hidden=(2048,) * 4), (32, 32, 2)),
    "vit_tiny": (dict(pool="mean", gelu="tanh"), (224, 224, 3)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", default="resnet20,mlp")
    parser.add_argument("--batches", default="1,64")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print("\n| net | batch | float | integers in float32 | int8, int32 sums | auto |")
    print("|---|---|---|---|---|---|")
    for name in args.models.split(","):
        fields, shape = NETS[name]
        model = create(name, 10, **fields)
        example = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
        net = qk.quantize(model, presets.rules("w8a8", model=model, images=example))
        floats = jax.jit(net.init)(jax.random.key(0), example)
        variables = qk.calibrate(net, floats, [example])
        integer = convert(net, variables, example)
        held = all(s.exact for s in integer.program.steps if hasattr(s, "exact"))
        for batch in map(int, args.batches.split(",")):
            x = np.random.default_rng(1).normal(size=(batch, *shape)).astype(np.float32)
            ways = ("float32", "int32", "auto") if held else ("int32", "auto")
            runs = {"float": functools.partial(jax.jit(model.apply), floats)}
            for way in ways:
                runs[way] = functools.partial(integer_apply, integer, formulation=way)
            times = latency(runs, x, rounds=args.rounds)
            medians = {way: found["median_ms"] for way, found in times.items()}
            cells = [f"{medians['float']:.2f}"]
            cells += [
                f"{medians[w]:.2f} ({medians[w] / medians['float']:.2f})" if w in medians else "-"
                for w in ("float32", "int32", "auto")
            ]
            print(f"| {name} | {batch} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
