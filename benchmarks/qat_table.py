"""Quantization-aware training of one float net by every quantizer, at equal budgets.

    for s in 0 1 2; do
      python launch.py --workdir=runs/float/resnet8_s$s \
        --config=configs/float.py:data=fashion_mnist,model=resnet8,width=8,train_examples=10000,epochs=10,seed=$s
    done
    python benchmarks/qat_table.py --floats='runs/float/resnet8_s{seed}' --out=runs/qat

Every arm is a run folder of its own under --out (`configs/qat.py` without its deploy stage), so a
stopped table goes on where it was, arm by arm; finished arms are read, not run. Prints a markdown
table, mean +- standard deviation over seeds, and writes qat_table.json and qat_table.png.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from configs import qat

BITS = ("w4a4", "w3a3", "w2a2")
FIXED = {"ternary": ("w2a4",), "binary": ("w1a4",)}  # the widths their papers' weights have


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floats", default="runs/float/resnet8_s{seed}")
    parser.add_argument("--out", default="runs/qat")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--train_examples", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quantizers", default="", help="comma-separated; empty means all")
    parser.add_argument("--bits", default=",".join(BITS))
    parser.add_argument("--dry", action="store_true", help="read what is finished, run nothing")
    return parser.parse_args()


def config_of(args, quantizer, bits, seed):
    """The arm's config: `configs/qat.py` from a trained float net, evaluated and not deployed."""
    source = args.floats.format(seed=seed) + "#net"
    text = ",".join(
        f"{k}={v}"
        for k, v in dict(
            data=args.data,
            model=args.model,
            width=args.width,
            bits=f"{bits}:{quantizer}",
            seed=seed,
            train_examples=args.train_examples,
            epochs=args.epochs,
            init_from=source,
        ).items()
    )
    config = qat.get_config(text).unlock()
    config.schedule = tuple(s for s in config.schedule if s != "deploy")
    config.log.eval_every_steps = 0
    config.log.quant_every_steps = 0
    return config.lock()


def arms(args):
    from qkd_jax.presets import PAIRS

    wanted = [q for q in args.quantizers.split(",") if q] or list(PAIRS)
    for quantizer in wanted:
        for bits in FIXED.get(quantizer, tuple(args.bits.split(","))):
            for seed in map(int, args.seeds.split(",")):
                yield quantizer, bits, seed


def run_arm(args, quantizer, bits, seed):
    """Runs or reads one arm: {"float", "calibrated", "QAT"} top-1 in percent."""
    from qkd_jax import experiment

    folder = pathlib.Path(args.out) / f"{args.model}_{quantizer}_{bits}_s{seed}"
    results = folder / "results.json"
    if not results.exists():
        if args.dry:
            return None
        begin = time.perf_counter()
        try:
            experiment.run(
                config_of(args, quantizer, bits, seed), folder, report=False, verbose=False
            )
        except experiment.NonFiniteError as error:
            print(f"{folder.name}: {error}", file=sys.stderr)
            return {"QAT": float("nan")}
        print(f"{folder.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    rows = json.loads(results.read_text())["rows"]
    return {row["method"]: 100 * row["top1"] for row in rows}


def spread(values):
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def show(found, args):
    """Prints the markdown table and returns it as data."""
    table: dict[str, dict[str, list[float]]] = {}
    floats: dict[int, float] = {}
    for (quantizer, bits, seed), result in found.items():
        table.setdefault(quantizer, {}).setdefault(bits, []).append(result["QAT"])
        if "float" in result:
            floats[seed] = result["float"]
    columns = list(dict.fromkeys(b for row in table.values() for b in row))
    print(f"float {args.model}: {spread(list(floats.values()))}\n")
    print("| quantizer | " + " | ".join(c.upper() for c in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for quantizer, row in table.items():
        cells = [spread(row[c]) if c in row else "" for c in columns]
        print(f"| {quantizer} | " + " | ".join(cells) + " |")
    return {"float": floats, "qat": table}


def plot(table, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    columns = list(dict.fromkeys(b for row in table["qat"].values() for b in row))
    names = list(table["qat"])
    for place, bits in enumerate(columns):
        at = [i + 0.8 * (place - (len(columns) - 1) / 2) / len(columns) for i in range(len(names))]
        means = [statistics.fmean(table["qat"][n].get(bits, [float("nan")])) for n in names]
        errors = [
            statistics.stdev(v) if len(v := table["qat"][n].get(bits, [0.0])) > 1 else 0
            for n in names
        ]
        axes.errorbar(at, means, errors, fmt="o", capsize=2, label=bits.upper())
    if table["float"]:
        axes.axhline(statistics.fmean(table["float"].values()), ls="--", c="gray", label="float")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("top-1 %")
    axes.legend(ncols=3, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    args = parse()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for arm in arms(args):
        result = run_arm(args, *arm)
        if result is not None:
            found[arm] = result
    table = show(found, args)
    (out / "qat_table.json").write_text(json.dumps(table, indent=1))
    plot(table, out / "qat_table.png")


if __name__ == "__main__":
    main()
