"""A stack of transformer blocks on ONNX Runtime and OpenVINO: float, W4 in groups, NF4, W8A8.

    python benchmarks/transformer_engines.py [--tokens=1,128] [--layers=12] [--threads=1]

Blocks are 512 wide (8 heads, a perceptron of 4 times the width), batch 1, with random weights, on
which speed does not depend. "W4" is one scale for 32 weights ("int4_weight_only"), float arithmetic
and the net's logits; with "rounded inputs" the engine rounds the inputs of these products to 8
bits, block by block, which is faster and moves the results ("moved by": of the largest one). W8A8
is static, with the rules of each engine. Engines run in turns, the order alternating; quoted are
medians and minima of all rounds, and ratios to the same engine's float (of medians, those of minima
in brackets).
"""

import argparse
import importlib
import os
import pathlib
import platform
import sys
import tempfile

import arms  # noqa: F401  (finds the project)
import flax.linen as nn
import numpy as np
from inference import random_variables

from qkd_jax import calibrate, quantize
from qkd_jax.deploy import (
    has_vnni,
    kernel_report,
    latency,
    onnx_session,
    openvino_model,
    to_onnx,
    to_openvino,
)
from qkd_jax.models.vit import TransformerBlock
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets
from qkd_jax.quantize.targets import fit

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it forks the process

WIDTH, HEADS = 512, 8
ROUNDED = ", rounded inputs"
NF4 = (Rule(".*", weight=Spec(4, quantizer="codebook", granularity=32)),)
VNNI = "-vnni" if has_vnni() else ""
TARGETS = {"ONNX Runtime": f"onnxruntime-x86{VNNI}", "OpenVINO": f"openvino-cpu{VNNI}"}
# Label, rules, and the form of the weights that are no static W8A8.
ARMS = {
    "ONNX Runtime": (
        ("float32", "float", ""),
        ("W4 g32", "int4_weight_only", ""),
        ("W4 g32" + ROUNDED, "int4_weight_only", "nbits_int8"),
        ("W8A8", "w8a8:integer", ""),
    ),
    "OpenVINO": (
        ("float32", "float", "nbits"),
        ("W4 g32", "int4_weight_only", "nbits"),
        ("W4 g32" + ROUNDED, "int4_weight_only", "nbits_int8"),
        ("NF4 g32", NF4, "nbits"),
        ("W8A8", "w8a8:fused", "nbits"),
    ),
}


class Stack(nn.Module):
    """Transformer blocks, [batch, tokens, width] to the same shape."""

    layers: int

    @nn.compact
    def __call__(self, x):
        for layer in range(self.layers):
            x = TransformerBlock(HEADS, 4 * WIDTH, name=f"block{layer}")(x)
        return x


def _call(engine, path, threads):
    """images -> results, on an engine; OpenVINO compiles the file for batch 1 alone."""
    if engine == "ONNX Runtime":
        session = onnx_session(path, threads=threads)
        return lambda x: session.run(None, {"images": np.asarray(x)})[0]
    request = openvino_model(path, threads=threads, batch=1).create_infer_request()
    return lambda x: request.infer([np.asarray(x)])[0]


def engines(model, floats, x, threads, folder):
    """Returns {label: function of x}, and {label: a few words about its file}."""
    calls, words = {}, {}
    for engine, arms_of_engine in ARMS.items():
        target = TARGETS[engine]
        for label, rules, weights in arms_of_engine:
            if isinstance(rules, str):
                rules = presets.rules(rules, model=model, images=x)
            net = quantize(model, fit(rules, target))
            variables = calibrate(net, floats, [x], observer="minmax") if rules else floats
            if engine == "ONNX Runtime":
                path = folder / "net.onnx"
                written = to_onnx(net, variables, x, path, target=target, weights=weights or None)
            else:
                path = folder / "net.xml"
                written = to_openvino(net, variables, x, path, target=target, weights=weights)
            name = f"{engine} {label}"
            calls[name] = _call(engine, path, threads)
            report = kernel_report(path, TARGETS[engine].partition("-")[0])
            kinds = {"integer": report.integer, "packed": report.packed, "float": report.floating}
            counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
            words[name] = f"{written.bytes / 1e6:.1f} MB, {counts}"
    return calls, words


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,128")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    names = ("jax", "onnxruntime", "openvino")
    print(", ".join(f"{name} {importlib.import_module(name).__version__}" for name in names))
    vnni = "with" if VNNI else "without"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {vnni} VNNI; {args.threads} threads\n")
    model = Stack(args.layers)
    for tokens in map(int, args.tokens.split(",")):
        x = np.random.default_rng(1).normal(size=(1, tokens, WIDTH)).astype(np.float32)
        floats = random_variables(quantize(model), x)
        with tempfile.TemporaryDirectory() as folder:
            calls, words = engines(model, floats, x, args.threads, pathlib.Path(folder))
            times = latency(calls, x, rounds=args.rounds)
            results = {name: call(x) for name, call in calls.items()}
        print(f"{tokens} tokens, {args.layers} layers")
        print("| engine | median ms | min ms | over its float | moved by | file, products |")
        print("|---|---|---|---|---|---|")
        for name, time in times.items():
            base = next(n for n in times if n.endswith("float32") and name.startswith(n[:-7]))
            cells = [f"{time[kind]:.2f}" for kind in ("median_ms", "min_ms")]
            ratios = [time[kind] / times[base][kind] for kind in ("median_ms", "min_ms")]
            cells += [f"{ratios[0]:.2f} ({ratios[1]:.2f})", "", words[name]]
            if name.endswith(ROUNDED):
                exact = results[name.removesuffix(ROUNDED)]
                cells[-2] = f"{np.abs(results[name] - exact).max() / np.abs(exact).max():.1g}"
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
