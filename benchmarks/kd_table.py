"""One student by every loss with a published recipe, at equal budgets, beside labels alone.

    for s in 0 1 2; do
      python launch.py --workdir=runs/float/resnet20_s$s \
        --config=configs/float.py:data=fashion_mnist,model=resnet20,width=8,train_examples=10000,epochs=10,seed=$s
    done
    python benchmarks/kd_table.py --teachers='runs/float/resnet20_s{seed}' --out=runs/kd

Every arm is a run folder of its own under --out, the student's part of `configs/feature_kd.py`, so
an interrupted table resumes; finished arms are read, not run. Seeds come one after another,
so that an unfinished table has equal seeds in most rows. Losses of several teachers are left out.
With `--bits=w2a2` the students of --students are quantized and learn again. `QKD` (the three
phases, the teacher learning in the second) and `QKD's terms with a fixed teacher`, its control with
the same terms and steps, are rows like the losses.
Prints a markdown table (mean +- standard deviation over seeds) and writes kd_table.json and
kd_table.png. `mistake severity` is the mean height of the lowest common ancestor of the predicted
and the true class in the data set's class tree, over the mistakes; `s/step` is wall time on the
machine as it was, whose other work is in it.
"""

import argparse
import json
import pathlib
import re
import statistics

import arms

from configs import feature_kd, qkd
from qkd_jax.losses import TABLE

ALONE, QKD, FIXED = "labels alone", "QKD", "QKD's terms with a fixed teacher"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", default="runs/float/resnet20_s{seed}")
    parser.add_argument("--students", default="", help="float students to start from (for --bits)")
    parser.add_argument("--out", default="runs/kd")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--teacher_width", type=int, default=8)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--student_width", type=int, default=8)
    parser.add_argument("--bits", default="float")
    parser.add_argument("--train_examples", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--losses", default="", help="comma-separated; empty means all")
    parser.add_argument("--dry", action="store_true", help="read what is finished, run nothing")
    return parser.parse_args()


def arguments(args, seed):
    """Arguments of an arm's config, whichever it is."""
    return dict(
        data=args.data,
        teacher=args.teacher,
        teacher_width=args.teacher_width,
        student=args.student,
        student_width=args.student_width,
        bits=args.bits,
        teacher_from=args.teachers.format(seed=seed) + "#net",
        seed=seed,
        train_examples=args.train_examples,
        epochs=args.epochs,
    )


def student_of(args, seed):
    """The float student of a seed."""
    return args.students.format(seed=seed) + "#net"


def config_of(args, loss, seed):
    """`configs/feature_kd.py` with a trained teacher, and the one of its arms that is wanted."""
    if loss in (QKD, FIXED):
        return qkd_config(args, seed, fixed=loss == FIXED)
    given = arguments(args, seed) | dict(loss="kd" if loss == ALONE else loss)
    if args.students and loss != "simkd":
        given["init_from"] = student_of(args, seed)
    config = arms.config(feature_kd, **given).unlock()
    if loss == ALONE:
        # Its weights are drawn as the students' of the other arms are: by the net's name.
        row = {"ce": dict(loss="ce", weight=1.0, label_smoothing=0.0)}
        config.stages.distil.learn = {"student": row}
        config.stages.evaluate.methods["student"] = ALONE
    config.schedule = tuple(s for s in config.schedule if s not in ("alone", "teach"))
    # The teacher of a seed is looked at in one of its arms.
    left_out = ("alone",) if loss == ALONE else ("alone", "teacher")
    for stage in config.stages.values():
        if "nets" in stage and stage.kind in ("evaluate", "calibrate", "reestimate_bn"):
            stage.nets = tuple(n for n in stage.nets if n not in left_out)
        if stage.kind == "evaluate":
            stage.methods = {n: m for n, m in stage.methods.items() if n not in left_out}
            if "teacher" in left_out:
                stage.reference = ""
    return config.lock()


def qkd_config(args, seed, *, fixed):
    """`configs/qkd.py` from the same nets: the student, or its control with a fixed teacher."""
    given = arguments(args, seed) | dict(init_from=student_of(args, seed))
    config = arms.config(qkd, **given).unlock()
    controls = ("qat_only", "qat_fixed_teacher", "reestimate_bn_controls", "evaluate_controls")
    if fixed:
        kept = ("evaluate_float", "calibrate", *controls[1:])
        config.stages.reestimate_bn_controls.nets = ("qat_fixed_teacher",)
        config.stages.evaluate_controls.nets = ("qat_fixed_teacher",)
        config.stages.evaluate_controls.methods = {"qat_fixed_teacher": FIXED}
    else:
        kept = tuple(s for s in config.schedule if s not in controls)
    config.schedule = kept
    return config.lock()


def show(found, teachers):
    """Prints the markdown table and returns it as data."""
    table = {}
    for (loss, _), (rows, timings) in found.items():
        cells = table.setdefault(loss, {"top1": [], "loss": [], "severity": [], "step": []})
        # QKD's teacher and student have rows of the float nets before.
        net = "qat_fixed_teacher" if loss == FIXED else "student"
        row = next((r for r in reversed(rows) if r["net"] == net), {})
        stage = {QKD: "co_study", FIXED: "qat_fixed_teacher"}.get(loss, "distil")
        times = timings.get("stages", {}).get(stage, {})
        cells["top1"].append(100 * row.get("top1", float("nan")))
        cells["loss"].append(row.get("loss", float("nan")))
        cells["severity"].append(row.get("severity") or float("nan"))
        cells["step"].append(times.get("train_seconds", float("nan")) / times.get("steps", 1))
    for loss in table:
        table[loss] = {key: arms.floats_of(values) for key, values in table[loss].items()}
    order = sorted(table, key=lambda n: -statistics.fmean(table[n]["top1"] or [0.0]))
    heads = {"top1": "top-1 %", "loss": "cross-entropy", "severity": "mistake severity"}
    lines = {}
    for loss in order:
        cells = {h: arms.spread(table[loss][k], 2 + (k != "top1")) for k, h in heads.items()}
        cells["s/step"] = f"{statistics.median(table[loss]['step'] or [float('nan')]):.2f}"
        cells["seeds"] = str(len(table[loss]["top1"]))
        lines[loss] = cells
    print(f"teachers: {arms.spread(teachers)}\n")
    print("\n".join(arms.table_lines("loss", [*heads.values(), "s/step", "seeds"], lines)))
    return table


def main():
    args = parse()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    losses = [n for n in args.losses.split(",") if n] or [
        ALONE,
        *(n for n, row in TABLE.items() if row.recipe is not None and not row.has_several_teachers),
    ]
    found, teachers = {}, {}
    for seed in map(int, args.seeds.split(",")):
        for loss in losses:
            word = re.sub(r"\W+", "_", loss)
            name = f"{args.student}_{args.bits}_{word}_s{seed}"
            result = arms.run_arm(config_of(args, loss, seed), out / name, dry=args.dry)
            if result is None:
                continue
            found[loss, seed] = result
            for row in result[0]:
                if row["net"] == "teacher" and row["method"] == "labels":
                    teachers[seed] = 100 * row["top1"]
    if not found:
        raise SystemExit(f"No arm is finished under {out}; run without --dry.")
    table = show(found, list(teachers.values()))
    (out / "kd_table.json").write_text(json.dumps({"teacher": teachers, "losses": table}, indent=1))
    order = sorted(table, key=lambda loss: statistics.fmean(table[loss]["top1"] or [0.0]))
    series = {"top-1": {loss: table[loss]["top1"] for loss in order}}
    alone = table.get(ALONE, {}).get("top1")
    line = statistics.fmean(alone) if alone else None
    arms.plot(series, out / "kd_table.png", ylabel="top-1 %", line=line, line_label=ALONE)


if __name__ == "__main__":
    main()
