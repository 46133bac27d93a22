"""Our int8 exports beside float on every engine: does quantization make a net faster here?

    python benchmarks/inference.py [--models=resnet20,mlp,vit_tiny] [--batches=1,64] [--rounds=21]

ResNet-20 (32x32x3, width 16), an MLP of four 2048-wide layers and ViT-Tiny at 224, with random
weights (speed does not depend on them), quantized at W8A8 where each engine rounds (`RULES`) and
written by `to_onnx` for ONNX Runtime and OpenVINO; the float nets run on XLA, ONNX Runtime,
OpenVINO and, where it is installed, torch (the same layers with BatchNorm folded, not the same
weights). Engines run in turns, the order alternating, each with `--threads` threads; quoted are
milliseconds a batch, and ratios of medians with those of minima behind them. The share of products
on integers is read from the engines' optimized graphs.
"""

import argparse
import importlib.util
import os
import pathlib
import platform
import sys
import tempfile

# Calibration would otherwise fold the statistics of 16 million constant weights while it compiles.
os.environ.setdefault("XLA_FLAGS", "--xla_disable_hlo_passes=constant_folding")

import arms  # noqa: F401  (finds the project)
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import calibrate, quantize
from qkd_jax.deploy import (
    has_vnni,
    kernel_report,
    latency,
    open_onnx,
    openvino_model,
    to_onnx,
)
from qkd_jax.deploy.onnx.engines import channels_first
from qkd_jax.models import create
from qkd_jax.quantize import presets
from qkd_jax.quantize.targets import TARGETS, fit

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it forks the process

RULES = {"ONNX Runtime": "w8a8:integer", "OpenVINO": "w8a8:fused"}
MODELS = {
    "resnet20": (lambda: create("resnet20", 10, width=16), (32, 32, 3)),
    "mlp": (lambda: create("mlp", 2048, hidden=(2048,) * 3), (1, 1, 2048)),
    "vit_tiny": (lambda: create("vit_tiny", 1000, pool="mean", gelu="tanh"), (224, 224, 3)),
}


def random_variables(net, images):
    """Variables of a trained net's sizes: gains near 1, kernels scaled by their fan-in."""
    rng = np.random.default_rng(0)

    def value(path, leaf):
        kind, shape = path[-1].key, leaf.shape
        if kind in ("scale", "var"):
            array = rng.uniform(0.5, 1.5, shape)
        elif kind in ("bias", "mean", "positions", "token"):
            array = rng.normal(0, 0.1, shape)
        else:
            array = rng.normal(0, 1, shape) / np.sqrt(max(np.prod(shape[:-1]), 1))
        return jnp.asarray(array, leaf.dtype)

    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(value, shapes)


def engines(name, threads, folder):
    """Returns {label: function of images}, and the shares of products on integers."""
    build, shape = MODELS[name]
    model = build()
    images = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    net, found, shares = quantize(model), {}, {}
    floats = random_variables(net, images)
    compiled = jax.jit(net.apply)
    found["XLA float32"] = lambda x: jax.block_until_ready(compiled(floats, x))
    vnni = "-vnni" if has_vnni() else ""
    targets = {"ONNX Runtime": f"onnxruntime-x86{vnni}", "OpenVINO": f"openvino-cpu{vnni}"}
    for engine, target in targets.items():
        rules = presets.rules(RULES[engine], model=model, images=images)
        quantized = quantize(model, fit(rules, target))
        calibrated = calibrate(quantized, floats, [images], observer="minmax")
        for kind, shipped, variables in (
            ("float32", net, floats),
            ("int8", quantized, calibrated),
        ):
            path = folder / f"{name}_{kind}_{TARGETS[target].engine}.onnx"
            written = to_onnx(shipped, variables, images, path, target=target)
            found[f"{engine} {kind}"] = _call(engine, path, threads)
            shares[f"{engine} {kind}"] = f"{written.bytes:,} bytes"
            if kind == "int8":
                on = kernel_report(path, TARGETS[target].engine)
                shares[f"{engine} {kind}"] += f" ({on.share:.0%} of products on integers)"
    if importlib.util.find_spec("torch"):
        found["torch float32"] = torch_net(name, threads)
    return found, shares


def _call(engine, path, threads):
    """images -> result, on an engine; OpenVINO compiles the file for each batch size."""
    if engine == "ONNX Runtime":
        return open_onnx(path, "onnxruntime", threads=threads)
    requests = {}

    def call(x):
        if len(x) not in requests:
            compiled = openvino_model(path, threads=threads, batch=len(x))
            requests[len(x)] = compiled.create_infer_request()
        return requests[len(x)].infer([channels_first(x)])

    return call


def torch_net(name, threads):
    """The same layers in torch, convolutions channels last."""
    import torch  # pyrefly: ignore[missing-import]  # optional peer
    from torch import nn  # pyrefly: ignore[missing-import]

    torch.set_num_threads(threads)

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
            self.shortcut = nn.Identity()
            if stride != 1:
                self.shortcut = nn.Conv2d(inputs, width, 1, stride)

        def forward(self, x):
            return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 192, 16, 16)
            layer = nn.TransformerEncoderLayer(
                192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 1000)

        def forward(self, x):
            tokens = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks(tokens)).mean(1))

    if name == "mlp":
        layers = [nn.Linear(2048, 2048) for _ in range(4)]
        net = nn.Sequential(nn.Flatten(), *[m for x in layers for m in (x, nn.ReLU())][:-1])
    elif name == "resnet20":
        blocks, inputs = [], 16
        for stage in range(3):
            for block in range(3):
                width = 16 * 2**stage
                blocks.append(Block(inputs, width, 2 if stage and not block else 1))
                inputs = width
        stem, pool = nn.Conv2d(3, 16, 3, 1, 1), nn.AdaptiveAvgPool2d(1)
        net = nn.Sequential(stem, nn.ReLU(), *blocks, pool, nn.Flatten(), nn.Linear(64, 10))
        net = net.to(memory_format=torch.channels_last)
    else:
        net = ViT()
    net = net.eval()

    def run(x):
        with torch.inference_mode():
            given = torch.from_numpy(channels_first(x))
            return net(given.contiguous(memory_format=torch.channels_last)).numpy()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet20,mlp,vit_tiny")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    versions = {"jax": jax.__version__}
    for module in ("onnxruntime", "openvino", "torch"):
        if importlib.util.find_spec(module):
            versions[module] = importlib.import_module(module).__version__
    print(", ".join(f"{k} {v}" for k, v in versions.items()))
    vnni = "with" if has_vnni() else "without"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {vnni} VNNI; {args.threads} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            calls, shares = engines(name, args.threads, pathlib.Path(folder))
            print(f"{name}: {', '.join(f'{k} {v}' for k, v in shares.items())}")
            print("| batch | engine | median ms | min ms | over own float | over fastest float |")
            print("|---|---|---|---|---|---|")
            for batch in map(int, args.batches.split(",")):
                shape = (batch, *MODELS[name][1])
                images = np.random.default_rng(2).normal(size=shape).astype(np.float32)
                times = latency(calls, images, rounds=args.rounds)
                for label in times:
                    print(f"| {batch} | {label} | {_row(times, label)} |", flush=True)
            print()


def _row(times, label):
    kinds = ("median_ms", "min_ms")
    cells = [f"{times[label][kind]:.2f}" for kind in kinds]
    if not label.endswith("int8"):
        return " | ".join([*cells, "", ""])
    own = times[label.replace("int8", "float32")]
    floats = [v for k, v in times.items() if k.endswith("float32")]
    fastest = {kind: min(v[kind] for v in floats) for kind in kinds}
    for base in (own, fastest):
        median, least = (times[label][kind] / base[kind] for kind in kinds)
        cells.append(f"{median:.2f} ({least:.2f})")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
