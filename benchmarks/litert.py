"""W8A8 on LiteRT against fake quantization and LiteRT's own float: accuracy, codes and time.

    python benchmarks/litert.py [--model=resnet20] [--steps=120] [--images=2000] [--rounds=40]

A net is trained for a few steps on Fashion-MNIST (found through TFDS_DATA_DIR), calibrated and
written as two files, integers and float, by the same writer. Printed: top-1 of fake quantization
and of the file on test images of our split, the share of equal argmaxes, and milliseconds at batch
1 on one thread: medians and minima of rounds that take turns.
"""

import argparse
import importlib.metadata
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax
import tensorflow_datasets as tfds

from qkd_jax.deploy import litert_report, open_tflite, tflite_interpreter, to_tflite
from qkd_jax.losses import ce
from qkd_jax.models import create
from qkd_jax.ptq import integer_bias
from qkd_jax.quantize import load_float, presets, quantize, targets
from qkd_jax.quantize.calibration import calibrate


def examples(split, count):
    """Normalised images [count, 28, 28, 1] and labels of the first examples of a split."""
    source: Any = tfds.data_source("fashion_mnist", split=split)
    order = np.random.default_rng(0).permutation(len(source))[:count]
    rows = [source[int(i)] for i in order]
    images = np.stack([r["image"] for r in rows]).astype(np.float32)
    return (images / 255 - 0.286) / 0.353, np.asarray([r["label"] for r in rows])


def trained(model, images, labels, steps, batch=64):
    """Variables after some steps of Adam."""
    net = quantize(model, [])
    variables = net.init(jax.random.key(0), images[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state, x, y):
        def loss(params):
            logits, new = net.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return ce(logits, y).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    rng = np.random.default_rng(1)
    for _ in range(steps):
        index = rng.integers(len(images), size=batch)
        variables, state = step(variables, state, images[index], labels[index])
    return variables


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet20")
    for name, value in (("steps", 120), ("images", 2000), ("rounds", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    images, labels = examples("train", 8000)
    test, wanted = examples("test", given.images)
    model = create(given.model, 10)
    floats = trained(model, images, labels, given.steps)
    rules = presets.rules("w8a8:integer", model=model, images=images[:1])
    net = quantize(model, targets.fit(rules, "litert"))
    variables = load_float(net.init(jax.random.key(0), images[:1]), floats)
    variables = calibrate(net, variables, [images[:256]])
    deployed = integer_bias(net, variables, images[:1])
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: pathlib.Path(folder, f"{kind}.tflite") for kind in ("int8", "float")}
        written = to_tflite(net, variables, images[:1], paths["int8"])
        to_tflite(quantize(model, []), floats, images[:1], paths["float"])
        run, apply = open_tflite(paths["int8"]), jax.jit(net.apply)
        parts = [test[i : i + 250] for i in range(0, len(test), 250)]
        ours = np.concatenate([np.asarray(apply(variables, p)) for p in parts])
        rounded = np.concatenate([np.asarray(apply(deployed, p)) for p in parts])
        theirs = np.concatenate([run(p)[0] for p in parts])
        top1 = lambda logits: 100 * np.mean(logits.argmax(-1) == wanted)
        version = importlib.metadata.version("ai-edge-litert")
        print(f"{given.model}, {given.images} images, ai-edge-litert {version}")
        print(f"on {platform.processor() or platform.machine()}")
        print(f"top-1 %: fake quantization {top1(ours):.2f}, with integer biases "
              f"{top1(rounded):.2f}, LiteRT {top1(theirs):.2f}")  # fmt: skip
        same = 100 * np.mean(rounded.argmax(-1) == theirs.argmax(-1))
        equal = 100 * np.mean(rounded == theirs)
        print(f"equal argmax {same:.2f} %, equal logits {equal:.3f} %")
        report = litert_report(paths["int8"])
        print(f"operations on integers {report.share:.3f}, by LiteRT's own kernels {report.own}, "
              f"bytes {written.bytes} and {paths['float'].stat().st_size}")  # fmt: skip
        engines = {kind: tflite_interpreter(path, threads=1) for kind, path in paths.items()}
    times = {kind: [] for kind in engines}
    for _ in range(given.rounds):
        for kind, engine in engines.items():
            engine.set_tensor(engine.get_input_details()[0]["index"], test[:1])
            engine.invoke()
            start = time.perf_counter()
            for _ in range(10):
                engine.invoke()
            times[kind].append((time.perf_counter() - start) * 100)
    for kind, values in times.items():
        print(f"{kind}: median {np.median(values):.3f} ms, minimum {min(values):.3f} ms")
    print("ratio of medians {:.2f}, of minima {:.2f}".format(
        *(f(times["int8"]) / f(times["float"]) for f in (np.median, min))))  # fmt: skip


if __name__ == "__main__":
    main()
