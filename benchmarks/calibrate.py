"""The cost of calibration and coverage over the number of layers.

    python benchmarks/calibrate.py [--layers 50,200,500] [--nets dense,conv] [--rounds 3]
        [--tasks float,calibrate,coverage] [--against=<folder of another checkout of the project>]

Chains of equal layers with ReLU: `dense` of width 32 (16 examples), `conv` with 8 channels and
kernels of 3 x 3 (4 images of 8 x 8). Weights and inputs have 4 bits (LSQ, weights per channel) and
are calibrated on two batches. `float` is the first call of the float net, which is traced and
compiled as one program.

Each run is a process of its own, so that nothing is compiled before; imports do not count. The
clock is the processor time of all threads, which other work on the machine disturbs less than the
time on the wall. Printed are medians of seconds, and with `--against` the median of the rounds'
ratios to the other checkout, with the least and the largest; the order of the two alternates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import arms
import flax.linen as nn
import jax


class Chain(nn.Module):
    """Equal layers, one behind the other."""

    kind: str
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            # Without biases nothing would be left behind hundreds of layers.
            own = {"name": f"layer{i}", "bias_init": nn.initializers.ones}
            layer = nn.Dense(32, **own) if self.kind == "dense" else nn.Conv(8, (3, 3), **own)
            x = nn.relu(layer(x))
        return x


def measure(kind, layers, task):
    """Returns the processor seconds of one task."""
    import qkd_jax as qk

    spec = qk.Spec(4, quantizer="lsq", granularity="channel")
    rules = [qk.Rule(".*", weight=spec, input=qk.Spec(4, quantizer="lsq", signed=True))]
    x = jax.random.normal(jax.random.key(1), (16, 32) if kind == "dense" else (4, 8, 8, 8))
    model = Chain(kind, layers)
    net, one = (qk.quantize(m, rules) for m in (model, Chain(kind, 1)))
    single = one.init(jax.random.key(0), x)  # every layer gets its parameters
    variables, calibrated = (
        {name: {f"layer{i}": tree["layer0"] for i in range(layers)} for name, tree in v.items()}
        for v in (single, qk.calibrate(one, single, [x]))
    )
    runs = {
        "float": lambda: jax.block_until_ready(jax.jit(model.apply)(variables, x)),
        "calibrate": lambda: jax.block_until_ready(qk.calibrate(net, variables, [x, 2 * x])),
        "coverage": lambda: qk.coverage(net, calibrated, x),
    }
    begin = time.process_time()
    runs[task]()
    return time.process_time() - begin


def in_a_process(project, *what):
    """Returns what `measure` does in a process of its own, with a checkout of the project."""
    command = [sys.executable, __file__, f"--one={','.join(map(str, what))}"]
    out = subprocess.run(
        [*command, f"--against={project}"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def row(kind, layers, tasks, projects, rounds):
    """Returns {column: cell} of one net."""
    cells = {}
    for task in tasks:
        # The float net is the same in every checkout.
        seconds = {project: [] for project in projects[: 1 if task == "float" else None]}
        for turn in range(rounds):
            for project in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
                seconds[project].append(in_a_process(project, kind, layers, task))
        here, *other = seconds.values()
        cells[f"{task} s"] = f"{statistics.median(here):.2f}"
        if other:
            ratios = [a / b for a, b in zip(here, other[0], strict=True)]
            cells[f"{task} s, other"] = f"{statistics.median(other[0]):.2f}"
            middle = statistics.median(ratios)
            cells[f"{task} ratio"] = f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="50,200,500")
    parser.add_argument("--nets", default="dense,conv")
    parser.add_argument("--tasks", default="float,calibrate,coverage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", default="", help="another checkout of the project")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, args.against or sys.path[0])
        kind, layers, task = args.one.split(",")
        print(json.dumps(measure(kind, int(layers), task)))
        return
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {args.rounds} rounds\n", flush=True)
    projects = ["", args.against] if args.against else [""]
    head = True
    for kind in args.nets.split(","):
        for layers in args.layers.split(","):
            cells = row(kind, int(layers), args.tasks.split(","), projects, args.rounds)
            lines = list(arms.table_lines("net, layers", list(cells), {f"{kind}, {layers}": cells}))
            print("\n".join(lines if head else lines[2:]), flush=True)
            head = False


if __name__ == "__main__":
    main()
