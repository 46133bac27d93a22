"""Post-training quantization, rung by rung, of one float net.

    python launch.py --config=configs/ptq.py:bits=w4a8 --workdir=runs/ptq
    python launch.py --config=configs/ptq.py:widths=w8a8+w4a8,seeds=3 --sweep \
        --workdir=runs/ptq_widths

Every rung is a net of its own that starts from the float net, so the rows compare methods alone:
dynamic ranges; static ones by five observers; cross-layer equalization, then bias correction on
top; GPTQ; learned rounding by layer (AdaRound) and by block (BRECQ, QDrop); and quantization-aware
training, which sees labels. All but `dynamic` and `qat` have their BatchNorms folded first.

Expect, on the digits at W4A8, seed 0: 557 s on two cores of an AMD EPYC beside other work; float
97.86 % top-1, dynamic 96.99, minmax 97.19, mse 97.60, adaround 97.86, brecq 97.73, QAT 98.00. A
ResNet-20 on Fashion-MNIST, 3 seeds: float 88.73 +- 0.24, minmax 82.83 +- 3.95, mse 84.61 +- 2.86,
adaround 88.66 +- 0.29, brecq 88.60 +- 0.29 (docs/results.md).
"""

from configs import common, sweeps

# `widths` is "+"-separated. The float net is trained once a seed.
SWEEP = dict(seeds=3, widths="w8a8+w4a8+w4a4")


def get_sweep(arg=""):
    """Returns a run, with all its rungs, for each width and seed."""
    args, others = sweeps.split(arg, SWEEP)
    runs = [dict(bits=width) for width in sweeps.chosen(args.widths)]
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


OBSERVERS = ("minmax", "percentile", "mse", "entropy", "rms")
# Rung -> stages between folding and the row, in order. `calibrate` takes the mse observer.
LADDER = {
    "equalize": ("equalize", "calibrate"),
    "correct_bias": ("equalize", "calibrate", "correct_bias"),
    "gptq": ("calibrate", "gptq"),
    "adaround": ("calibrate", "adaround"),
    "brecq": ("calibrate", "brecq"),
    "qdrop": ("calibrate", "qdrop"),
}


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `granularity` is that of the weights; `steps` counts Adam steps of a layer's or block's rounding
    at the learning rate `lr` (the papers take 10,000 and more at 0.001); `examples` the images that
    are shown to the methods; `rungs` a "+"-separated choice, empty for all.
    """
    args, config = common.begin(
        arg,
        model="resnet8",
        width=8,
        bits="w4a8",
        granularity="tensor",
        qat_epochs=0.0,
        examples=256,
        steps=300,
        lr=0.01,
        init_from="",
        rungs="",
    )
    wanted = [r for r in args.rungs.split("+") if r]
    known = ["dynamic", *OBSERVERS, *LADDER, "qat"]
    for rung in wanted:
        if rung not in known:
            raise ValueError(f"unknown rung {rung!r} in rungs; allowed: {', '.join(known)}.")
    rungs = [r for r in known if not wanted or r in wanted]

    def net(rules, **fields):
        return common.net(args.model, width=args.width, rules=rules, **fields)

    labels, stages = dict(ce=common.ce()), {}
    config.nets.float = net("float", init_from=args.init_from)
    if not args.init_from:
        stages["pretrain"] = common.train_by_recipe(args, dict(float=labels))
    for rung in rungs:
        kind = {"dynamic": ":dynamic", "qat": ""}.get(rung, ":static")
        text = args.bits + kind + (f":{args.granularity}" if kind else "")
        config.nets[rung] = net(text, init_from="float")
    folded = tuple(r for r in rungs if r not in ("dynamic", "qat"))
    if folded:
        stages["fold"] = common.post_training("fold_bn", *folded)
    for rung in rungs:
        if rung in ("dynamic", "qat"):
            stages[f"{rung}_calibrate"] = common.calibrate(rung)
        for kind in LADDER.get(rung, ("calibrate",) if rung in OBSERVERS else ()):
            if kind == "calibrate":
                observer = rung if rung in OBSERVERS else "mse"
                stage = common.calibrate(rung, observer=observer, examples=args.examples)
            else:
                learned = kind in ("adaround", "brecq", "qdrop")
                options = dict(steps=args.steps, lr=args.lr) if learned else {}
                stage = common.post_training(kind, rung, examples=args.examples, **options)
            stages[f"{rung}_{kind}"] = stage
    if "qat" in rungs:
        recipe = common.recipe(args.data)
        stages["qat_train"] = common.train(
            learn=dict(qat=labels),
            epochs=args.qat_epochs or recipe.epochs,
            batch_size=recipe.batch_size,
            **common.descent("qat", bits=args.bits),
        )
        stages["qat_reestimate"] = common.reestimate_bn("qat")
    methods = {r: f"static {r}" if r in OBSERVERS else r for r in rungs}
    stages["evaluate"] = common.evaluate(reference="float", float="float", **methods)
    return common.finish(config, stages)
