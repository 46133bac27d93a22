"""Post-training quantization, rung by rung, of one float net.

python launch.py --config=configs/ptq.py:bits=w4a8 --workdir=runs/ptq

Every rung is a net of its own that starts from the float net, so the rows compare methods alone:
dynamic ranges; static ones by five observers; cross-layer equalization, then bias correction on
top; GPTQ; learned rounding by layer (AdaRound) and by block (BRECQ, QDrop); and quantization-aware
training, which sees labels. All but `dynamic` and `qat` have their BatchNorms folded first.
"""

from configs import arguments, common

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
    args = arguments.parse(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        bits="w4a8",
        granularity="tensor",
        seed=0,
        train_examples=-1,
        epochs=0.0,
        qat_epochs=0.0,
        examples=256,
        steps=300,
        lr=0.01,
        init_from="",
        rungs="",
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    wanted = [r for r in args.rungs.split("+") if r]
    known = ["dynamic", *OBSERVERS, *LADDER, "qat"]
    for rung in wanted:
        if rung not in known:
            raise ValueError(f"unknown rung {rung!r} in rungs; allowed: {', '.join(known)}.")
    rungs = [r for r in known if not wanted or r in wanted]

    def train(net, bits, epochs):
        return common.train(
            learn={net: dict(ce=common.ce())},
            epochs=epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
            **common.descent(net, bits=bits),
        )

    def net(rules, **fields):
        return common.net(args.model, width=args.width, rules=rules, **fields)

    schedule = []

    def add(name, stage):
        config.stages[name] = stage
        schedule.append(name)

    config.nets.float = net("float", init_from=args.init_from)
    if not args.init_from:
        add("pretrain", train("float", "float", args.epochs))
    for rung in rungs:
        kind = {"dynamic": ":dynamic", "qat": ""}.get(rung, ":static")
        text = args.bits + kind + (f":{args.granularity}" if kind else "")
        config.nets[rung] = net(text, init_from="float")
    folded = tuple(r for r in rungs if r not in ("dynamic", "qat"))
    if folded:
        add("fold", dict(kind="fold_bn", nets=folded))
    for rung in rungs:
        if rung in ("dynamic", "qat"):
            add(f"{rung}_calibrate", common.calibrate(rung))
        elif rung in OBSERVERS:
            stage = dict(common.calibrate(rung), observer=rung, examples=args.examples)
            add(f"{rung}_calibrate", stage)
        for kind in LADDER.get(rung, ()):
            if kind == "calibrate":
                stage = dict(common.calibrate(rung), observer="mse", examples=args.examples)
            else:
                stage = dict(kind=kind, nets=(rung,), examples=args.examples)
            if kind in ("adaround", "brecq", "qdrop"):
                stage.update(steps=args.steps, lr=args.lr)
            add(f"{rung}_{kind}", stage)
    if "qat" in rungs:
        add("qat_train", train("qat", args.bits, args.qat_epochs))
        add("qat_reestimate", common.reestimate_bn("qat"))
    methods = {r: f"static {r}" if r in OBSERVERS else r for r in rungs}
    add("evaluate", common.evaluate(reference="float", float="float", **methods))
    config.schedule = tuple(schedule)
    return config.lock()
