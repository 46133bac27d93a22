"""Quantization-aware training of one float net by every quantizer, at equal budgets.

    for s in 0 1 2; do
      python launch.py --workdir=runs/float/resnet8_s$s \
        --config=configs/float.py:data=fashion_mnist,model=resnet8,width=8,train_examples=10000,epochs=10,seed=$s
    done
    python benchmarks/qat_table.py --floats='runs/float/resnet8_s{seed}' --out=runs/qat

Every arm is a run folder of its own under --out (`configs/qat.py` without its deploy stage), so an
interrupted table resumes arm by arm; finished arms are read, not run. Prints a markdown
table, mean +- standard deviation over seeds, and writes qat_table.json and qat_table.png.
"""

import argparse
import json
import pathlib
import statistics

import arms

from configs import qat

BITS = ("w4a4", "w3a3", "w2a2")
# The widths that their papers' weights have, and those of small floats.
FIXED = {"ternary": ("w2a4",), "binary": ("w1a4",), "float": ("w8a8", "w6a6", "w4a4")}


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
    return arms.config(
        qat,
        data=args.data,
        model=args.model,
        width=args.width,
        bits=f"{bits}:{quantizer}",
        seed=seed,
        train_examples=args.train_examples,
        epochs=args.epochs,
        init_from=args.floats.format(seed=seed) + "#net",
    )


def arms_of(args):
    """Yields (quantizer, bits, seed)."""
    from qkd_jax.quantizers import QUANTIZERS

    wanted = [q for q in args.quantizers.split(",") if q] or list(QUANTIZERS)
    for quantizer in wanted:
        for bits in FIXED.get(quantizer, tuple(args.bits.split(","))):
            for seed in map(int, args.seeds.split(",")):
                yield quantizer, bits, seed


def show(found, args):
    """Prints the markdown table and returns it as data."""
    table: dict[str, dict[str, list[float]]] = {}
    floats: dict[int, float] = {}
    for (quantizer, bits, seed), rows in found.items():
        top1 = {row["method"]: 100 * row["top1"] for row in rows}
        table.setdefault(quantizer, {}).setdefault(bits, []).append(top1.get("QAT", float("nan")))
        if "float" in top1:
            floats[seed] = top1["float"]
    columns = list(dict.fromkeys(b for row in table.values() for b in row))
    print(f"float {args.model}: {arms.spread(list(floats.values()))}\n")
    cells = {q: {b.upper(): arms.spread(v) for b, v in row.items()} for q, row in table.items()}
    print("\n".join(arms.table_lines("quantizer", [c.upper() for c in columns], cells)))
    return {"float": floats, "qat": table}


def main():
    args = parse()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for arm in arms_of(args):
        name = "_".join((args.model, *arm[:2], f"s{arm[2]}"))
        result = arms.run_arm(config_of(args, *arm), out / name, dry=args.dry)
        if result is not None:
            found[arm] = result[0]
    if not found:
        raise SystemExit(f"No arm is finished under {out}; run without --dry.")
    table = show(found, args)
    (out / "qat_table.json").write_text(json.dumps(table, indent=1))
    series: dict[str, dict[str, list[float]]] = {}
    for quantizer, row in table["qat"].items():
        for bits, values in row.items():
            series.setdefault(bits.upper(), {})[quantizer] = values
    mean = statistics.fmean(table["float"].values()) if table["float"] else None
    arms.plot(series, out / "qat_table.png", ylabel="top-1 %", line=mean, line_label="float")


if __name__ == "__main__":
    main()
