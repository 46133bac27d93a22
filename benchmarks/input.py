"""Throughput of the input pipeline, beside what a training step consumes.

    python benchmarks/input.py [--data_dir DIR] [--rounds 7]
    python benchmarks/input.py --jpegs [--tensorflow PYTHON] [--torchvision PYTHON] [--rounds 7]

The consumer is the float step of ResNet-8 of width 8 on batches that are on the device already: a
quantized student and any teacher are slower, so this is the hungriest net of the main job. Input
and step run in turn, so that machine drift affects both alike; quoted are medians. The
bar is ten times. Fashion-MNIST is read where it is prepared; else synthetic images of its shape
stand in.

`--jpegs` measures what one core decodes, crops, flips and normalises of photographs' size, beside
tf.data and torchvision; see `jpegs.py`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from typing import Any

import arms  # noqa: F401  (finds the project)
import flax
import grain
import jax
import jpegs
import numpy as np

from qkd_jax import data
from qkd_jax.data.batches import Batch
from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.training.parallel import compile_step
from qkd_jax.training.plan import plan_step
from qkd_jax.training.state import start_state
from qkd_jax.training.step import make_step

BAR = 10.0
INPUT_STEPS, TRAIN_STEPS = 200, 10  # a round


def consumer(dataset: data.Dataset, batch: Batch) -> Any:
    """Returns a function that runs n training steps of ResNet-8 of width 8 on one batch."""
    net = quantize(create("resnet8", num_classes=dataset.num_classes, width=8), ())
    on_device = {key: jax.device_put(batch[key]) for key in ("image", "label")}
    variables = net.init(jax.random.key(0), on_device["image"])
    optim = {"net": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4}}
    plan = plan_step({"net": net}, {"net": {"ce": {}}}, optim, horizon=10_000)
    step = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
    held = [start_state(plan, {"net": variables}, step=0, seed=0)]

    def run(count: int) -> None:
        for _ in range(count):
            held[0], _ = step(held[0], on_device, {})
        jax.block_until_ready(held[0])

    return run


def measure(label: str, dataset: data.Dataset, *, batch_size: int, augment: Any, rounds: int):
    """Prints one row and returns input over step, in examples a second."""
    batches = data.train_batches(dataset, batch_size=batch_size, seed=0, augment=augment)
    run = consumer(dataset, batches[0])
    run(2)
    iterator = batches.iter()
    next(iterator)
    made, used = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in itertools.islice(iterator, INPUT_STEPS):
            pass
        made.append(INPUT_STEPS * batch_size / (time.perf_counter() - start))
        start = time.perf_counter()
        run(TRAIN_STEPS)
        used.append(TRAIN_STEPS * batch_size / (time.perf_counter() - start))
    produced, consumed = statistics.median(made), statistics.median(used)
    ratio = statistics.median(m / u for m, u in zip(made, used, strict=True))
    print(
        f"{label:<28} {batch_size:>5} {produced:>12,.0f} {consumed:>12,.0f} {ratio:>8.1f} "
        f"{min(made):>10,.0f}..{max(made):<10,.0f}"
    )
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="default: TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jpegs", action="store_true", help="photographs beside the peers")
    jpegs.add_arguments(parser)
    options = parser.parse_args()
    if options.jpegs:
        return jpegs.compare(options)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}, grain {grain.__version__}, jax {jax.__version__}, "
        f"flax {flax.__version__}"
    )
    print(f"medians of {options.rounds} interleaved rounds, examples a second")
    print(f"{'data':<28} {'batch':>5} {'input':>12} {'step uses':>12} {'ratio':>8} input's spread")
    ratios = [
        measure(
            "digits, shift 1",
            data.load("digits"),
            batch_size=64,
            augment=("shift:1",),
            rounds=options.rounds,
        )
    ]
    try:
        label, clothes = "fashion_mnist", data.load("fashion_mnist", data_dir=options.data_dir)
    except data.NotPreparedError as error:
        print(f"({error})")
        label = "synthetic 28x28x1"
        clothes = data.load(
            "synthetic", image_shape=(28, 28, 1), train_examples=60_000, test_examples=1
        )
    ratios.append(
        measure(
            f"{label}, shift 2, flip",
            clothes,
            batch_size=128,
            augment=("shift:2", "flip"),
            rounds=options.rounds,
        )
    )
    held = min(ratios) >= BAR
    verdict = "holds" if held else "FAILS"
    print(f"the smallest ratio is {min(ratios):.1f}; the bar of {BAR:g} {verdict}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
