"""What is exact where: one net, compiled, one operation at a time, as integers, and on engines.

    python benchmarks/exactness.py [--images=1000] [--nets=conv,mlp,attention] [--rules=W8A8,...]

Each net is compared with itself as `jax.jit(net.apply)` runs it, on the same images. A cell reads

    codes that differ / logits: largest difference over the largest logit / argmax that differ

With `target=` ONNX Runtime is given the net `ptq.integer_bias`, and compared with it. Another
session is one that sets none of the options of `onnx_session`. Codes are those of all quantized
operands, in JAX alone: engines do not show theirs.
Nets are not trained: random weights and biases leave more values near the border of two codes, and
more logits near each other, than trained ones do. Prints a Markdown table.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import warnings
from typing import Any

import arms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qkd_jax as qk
from qkd_jax import deploy
from qkd_jax.deploy.onnx.engines import channels_first

assert arms
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it forks the process
IMAGES, BATCH = (10, 10, 3), 250


class Conv(nn.Module):
    """BatchNorm, a residual sum, and convolutions with biases that nothing normalizes."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        conv = lambda name, **options: nn.Conv(24, (3, 3), dtype=self.dtype, name=name, **options)
        norm = lambda name: nn.BatchNorm(use_running_average=True, dtype=self.dtype, name=name)
        x = nn.relu(norm("stem_norm")(conv("stem", use_bias=False)(x)))
        x = nn.relu(x + norm("inner_norm")(conv("inner", use_bias=False)(x)))
        x = nn.silu(conv("down", strides=2)(x))
        x = nn.relu(conv("grouped", feature_group_count=3)(x))
        return nn.Dense(10, dtype=self.dtype, name="head")(x.mean((1, 2)))


class Mlp(nn.Module):
    """Dense layers between ReLU and GELU."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        dense = lambda size, name: nn.Dense(size, dtype=self.dtype, name=name)
        x = nn.relu(dense(96, "first")(x.reshape(x.shape[0], -1)))
        x = nn.gelu(dense(64, "second")(x))
        return dense(10, "head")(x)


class Attention(nn.Module):
    """Two transformer blocks over the image's rows."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        dense = lambda size: nn.Dense(size, dtype=self.dtype)
        x = dense(32)(x.reshape(x.shape[0], 10, -1))
        for _ in range(2):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            attention: Any = nn.MultiHeadDotProductAttention(4, dtype=self.dtype)
            x = x + attention(y)
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + dense(32)(nn.gelu(dense(64)(y)))
        return nn.Dense(10, dtype=self.dtype, name="head")(x.mean(1))


NETS = {"conv": Conv, "mlp": Mlp, "attention": Attention}


def static(bits):
    """Rules of prepared ranges, for the products of activations too."""
    grid = qk.Spec(bits, symmetric=False)
    weight = qk.Spec(bits, granularity="channel")
    return (qk.Rule(".*", weight=weight, input=grid, other=qk.Spec(bits)),)


def dynamic():
    """Rules of ranges that are found at run time, one a token."""
    grid = qk.Spec(8, symmetric=False, dynamic=True, granularity="token")
    other = qk.Spec(8, dynamic=True, granularity="token")
    weight = qk.Spec(8, granularity="channel")
    return (qk.Rule(".*", weight=weight, input=grid, other=other),)


RULES = {
    "W8A8": (static(8), "float32"),
    "W4A4": (static(4), "float32"),
    "W2A2": (static(2), "float32"),
    "weight-only int8": ((qk.Rule(".*", weight=qk.Spec(8, granularity="channel")),), "float32"),
    "weight-only int4": ((qk.Rule(".*", weight=qk.Spec(4, granularity="channel")),), "float32"),
    "W8A8 dynamic": (dynamic(), "float32"),
    "W8A8 bfloat16": (static(8), "bfloat16"),
}


def made(name, rules, dtype, images):
    """Returns a calibrated net and its variables."""
    net = qk.quantize(NETS[name](dtype), rules)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def value(path, leaf):
        kind, fan_in = path[-1].key, max(int(np.prod(leaf.shape[:-1])), 1)
        if kind in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        spread = 0.3 if kind in ("bias", "mean") else 1.4 / np.sqrt(fan_in)
        return jnp.asarray(rng.normal(0, spread, leaf.shape), leaf.dtype)

    floats = jax.tree_util.tree_map_with_path(value, shapes)
    return net, qk.calibrate(net, floats, [images], observer="mse")


def watched(net):
    """Returns a function of variables and images: logits, and all codes by operand."""

    def run(variables, images):
        codes = {}

        def watch(path, operand, x, x_hat, spec, params):
            grid = qk.quantizers.QUANTIZERS[spec.quantizer].integer_view(params, spec)
            centred = jnp.round(x_hat * (1 / grid.scale))
            codes[f"{path}/{operand}"] = (centred + grid.zero_point).astype(jnp.int32)

        return net.apply(variables, images, watch=watch), codes

    return run


def by_batch(call, images):
    """Results of all images, batch by batch, as NumPy arrays."""
    starts = range(0, len(images), BATCH)
    return [jax.tree.map(np.asarray, call(images[i : i + BATCH])) for i in starts]


def ways(net, variables, images, folder):
    """Yields (way, call) of everything that runs this net; call gives logits, or with codes."""
    run = watched(net)
    yield "`jax.jit`", lambda x: jax.jit(run)(variables, x)
    yield "one operation at a time", lambda x: run(variables, x)
    integer = qk.convert(net, variables, images[:2])
    yield "`integer_apply`", lambda x: qk.integer_apply(integer, x, capture=True)
    deploy.save_stablehlo(integer, folder / "net.stablehlo", platforms=["cpu"])
    yield "StableHLO", jax.jit(deploy.load_stablehlo(folder / "net.stablehlo"))
    vnni = "-vnni" if deploy.has_vnni() else ""
    for way, engine, target in (
        ("ONNX Runtime", "onnxruntime", None),
        ("ONNX Runtime, another session", "plain", None),
        ("ONNX Runtime, `target=`", "onnxruntime", f"onnxruntime-x86{vnni}"),
        ("OpenVINO, `target=`", "openvino", f"openvino-cpu{vnni}"),
    ):
        path = folder / f"{target}.onnx"
        try:
            if not path.exists():
                deploy.to_onnx(net, variables, images[:2], path, target=target)
            yield way, opened(path, engine)
        except ValueError as error:
            yield way, str(error)


def opened(path, engine):
    """Opens a file as a function of images."""
    if engine != "plain":
        call = deploy.open_onnx(path, engine, threads=1)
        return lambda x: call(x)[0]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": channels_first(x)})[0]


def split(results):
    """Logits, and codes or None."""
    if not isinstance(results[0], tuple):
        return np.concatenate(results), None
    return np.concatenate([logits for logits, _ in results]), [codes for _, codes in results]


def differing(wanted, found):
    """The share of codes that differ, of those that both have."""
    if found is None:
        return "-"
    total = wrong = 0
    for one, two in zip(wanted, found, strict=True):
        for name in one.keys() & two.keys():
            total += one[name].size
            wrong += int((one[name] != two[name]).sum())
    if not total:
        return "-"
    return "0" if not wrong else f"{100 * wrong / total:.2g} %"


def cell(reference, results):
    """Codes / logits / argmax, against the compiled net."""
    (wanted, codes), (found, others) = split(reference), split(results)
    wanted, found = (np.asarray(a, np.float32) for a in (wanted, found))
    gap = np.abs(found - wanted).max() / np.abs(wanted).max()
    argmax = int((found.argmax(-1) != wanted.argmax(-1)).sum())
    return f"{differing(codes, others)} / {gap:.1g} / {argmax}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--rules", default=",".join(RULES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import onnxruntime
    import openvino

    images = np.asarray(jax.random.normal(jax.random.key(1), (args.images, *IMAGES)))
    print(
        f"jax {jax.__version__}, onnxruntime {onnxruntime.__version__}, openvino "
        f"{openvino.__version__.partition('-')[0]}, "
        f"{'with' if deploy.has_vnni() else 'without'} VNNI, {os.cpu_count()} cores; "
        f"`python benchmarks/{pathlib.Path(__file__).name} {' '.join(sys.argv[1:])}`\n"
    )
    labels = args.rules.split(",")
    for name in args.nets.split(","):
        table, refused = {}, {}
        for label in labels:
            rules, dtype = RULES[label]
            net, variables = made(name, rules, dtype, images[:64])
            with tempfile.TemporaryDirectory() as folder:
                reference = None
                for way, call in ways(net, variables, images, pathlib.Path(folder)):
                    if isinstance(call, str):
                        refused[call] = None
                        result = f"refused ({list(refused).index(call) + 1})"
                    else:
                        results = by_batch(call, images)
                        reference = results if reference is None else reference
                        result = cell(reference, results)
                        if way == "ONNX Runtime, `target=`":
                            given = qk.ptq.integer_bias(net, variables, images[:2])
                            run = jax.jit(net.apply)
                            rounded = by_batch(lambda x, r=run, v=given: r(v, x), images)
                            result = cell(rounded, results)
                    table.setdefault(way, []).append(result)
                    print(f"{name}, {label}, {way}: {result}", file=sys.stderr, flush=True)
        print(f"| {name} | " + " | ".join(labels) + " |")
        print("|---|" + "---|" * len(labels))
        for way, cells in table.items():
            print(f"| {way} | " + " | ".join(cells) + " |", flush=True)
        print()
        for index, reason in enumerate(refused, 1):
            print(f"({index}) {reason}")
        print(flush=True)


if __name__ == "__main__":
    main()
