"""Agreement of a converted net with the trained one: codes, logits, accuracy and bytes.

    python benchmarks/fidelity.py [--models=resnet20,vit] [--rules=w8a8:integer,w2a2]

For every model and set of rules a net is trained (`configs/qat.py`: float, where `--float` has no
run of `configs/float.py` named <model>_s<seed>, then quantized; a run folder is reused) and
compared on the whole test split with what `convert` makes of it:

- fake: the trained net with its BatchNorms folded, as it is evaluated, beside the net as trained;
- integer: products on integers, the rest in float32;
- integer only: no float between the codes of the input and those of the logits, where the net's
  rules allow it; and its NumPy twin, on the first images.

Printed are differing codes of all quantized activations, the largest difference of the logits
relative to the largest logit, agreement of the argmax, top-1, and the bytes of the packed weights
beside the bits that the rules say.
"""

import argparse
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import arms
import jax
import numpy as np

from configs import qat
from qkd_jax import experiment, ptq
from qkd_jax.deploy import convert, integer_apply
from qkd_jax.deploy.integer import reference
from qkd_jax.numerics import codes_of
from qkd_jax.quantizers import QUANTIZERS

BATCH = 500
WIDTHS = {"resnet20": 8, "vit": 64}


def trained(model, rules, args):
    """Returns (net, variables, test images, labels) of a run that is made if it is not there."""
    given = dict(
        data=args.data,
        model=model,
        width=WIDTHS[model],
        bits=rules,
        train_examples=args.train_examples,
        epochs=args.epochs,
        seed=args.seed,
    )
    source = pathlib.Path(args.float) / f"{model}_s{args.seed}"
    if args.float and source.exists():
        given["init_from"] = f"{source}#net"
    config = arms.config(qat, **given).unlock()
    kinds = ("train", "calibrate", "reestimate_bn")
    config.schedule = tuple(s for s in config.schedule if config.stages[s].kind in kinds)
    if model == "vit":  # transformers are trained by Adam, and have no BatchNorm
        config.schedule = tuple(s for s in config.schedule if s != "reestimate_bn")
        for stage, lr in (("pretrain", 1e-3), ("qat", 5e-4)):
            if stage in config.stages:
                config.stages[stage].optim.net.update(name="adamw", lr=lr, weight_decay=0.0)
    config.lock()
    folder = pathlib.Path(args.runs) / f"{model}_{rules.replace(':', '_')}"
    arms.run_arm(config, folder)
    state = experiment.restore(folder)
    dataset = state.dataset
    images = dataset.normalize(dataset.test_images[: args.images or None])
    return state.nets["net"], state.variables["net"], images, dataset.test_labels[: len(images)]


def fake_quantized(net, variables):
    """images -> (logits, centred codes by operand) of the net as it is trained."""

    def run(variables, images):
        found = {}

        def watch(path, operand, x, x_hat, spec, params):
            if operand == "weight":
                return
            scale, zero_point, _ = QUANTIZERS[spec.quantizer].integer_view(params, spec)
            found[f"{path}/{operand}"] = (codes_of(x_hat, scale) + zero_point).astype(int)

        return net.apply(variables, images, watch=watch), found

    compiled = jax.jit(run)
    return lambda images: compiled(variables, images)


class Count:
    """Sums of differences over batches."""

    def __init__(self):
        self.codes = self.differing = self.same = self.right = self.images = 0
        self.gap = self.largest = 0.0

    def add(self, wanted, found, labels):
        (logits, codes), (mine, my_codes) = wanted, found
        for name, array in codes.items():
            other = np.asarray(my_codes[name])
            self.codes += other.size
            self.differing += int((np.asarray(array) != other).sum())
        logits, mine = np.asarray(logits), np.asarray(mine)
        self.gap = max(self.gap, float(np.abs(logits - mine).max()))
        self.largest = max(self.largest, float(np.abs(logits).max()))
        self.same += int((logits.argmax(-1) == mine.argmax(-1)).sum())
        self.right += int((mine.argmax(-1) == labels).sum())
        self.images += len(labels)

    def cells(self):
        return [
            f"{self.differing:,} of {self.codes:,}",
            f"{self.gap / max(self.largest, 1e-30):.1e}",
            f"{100 * self.same / self.images:.2f}",
            f"{100 * self.right / self.images:.2f}",
        ]


def compare(net, variables, images, labels):
    """Yields (name, Count) of everything that is compared with the folded fake-quantized net."""
    example = images[:2]
    fake = fake_quantized(net, ptq.fold_bn(net, variables, example))
    integer = convert(net, variables, example)
    ways: dict[str, Callable[[Any], Any]] = {
        "fake-quantized, as trained": fake_quantized(net, variables),
        "integer": functools.partial(integer_apply, integer, capture=True),
    }
    few: dict[str, Callable[[Any], Any]] = {}
    try:
        only = convert(net, variables, example, integer_only=True)
    except ValueError as error:
        print(f"no integer-only form: {str(error).partition('.')[0]}\n")
    else:
        ways["integer only"] = functools.partial(integer_apply, only, capture=True)
        few["integer only, NumPy (100 images)"] = functools.partial(
            reference.run, only.program, only.arrays
        )
    counts = {name: Count() for name in [*ways, *few]}
    for begin in range(0, len(images), BATCH):
        x, y = images[begin : begin + BATCH], labels[begin : begin + BATCH]
        wanted = fake(x)
        for name, run in ways.items():
            counts[name].add(wanted, run(x), y)
        for name, run in few.items() if begin == 0 else ():
            part = jax.tree.map(lambda a: a[:100], wanted)
            counts[name].add(part, run(x[:100]), y[:100])
    return integer, counts


def bytes_of(net, integer):
    """(bytes of the packed weights, bytes that the rules say) of a converted net."""
    implied = 0.0
    for layer in integer.program.layers:
        spec = net.spec_of(layer.path, "weight")
        implied += np.prod(layer.shape) * spec.bits / 8
    return integer.weight_bytes, implied


def arguments(description, rules):
    """The command line of a benchmark of trained nets; `rules` are those that it takes unasked."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--runs", default="runs/fidelity")
    parser.add_argument("--float", default="runs/float", help="folder of float runs")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--models", default="resnet20,vit")
    parser.add_argument("--rules", default=rules)
    parser.add_argument("--train_examples", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=0, help="test images; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments(__doc__, "w8a8:integer,w4a4:integer,w2a2")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores\n")
    columns = ["codes that differ", "logits", "argmax %", "top-1 %"]
    rows, sizes = {}, []
    for model in args.models.split(","):
        for rules in args.rules.split(","):
            net, variables, images, labels = trained(model, rules, args)
            integer, counts = compare(net, variables, images, labels)
            for name, count in counts.items():
                rows[f"{model} {rules}: {name}"] = dict(zip(columns, count.cells(), strict=True))
            packed, implied = bytes_of(net, integer)
            sizes.append(
                f"{model} {rules}: packed weights {packed:,} bytes, {packed / implied:.3f} of the "
                f"{implied:,.0f} that the rules say; with scales, biases and steps "
                f"{integer.nbytes:,}"
            )
            print("\n".join(arms.table_lines("net", columns, rows)), *sizes, sep="\n", flush=True)


if __name__ == "__main__":
    main()
