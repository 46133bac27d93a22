"""Be your own teacher (Zhang et al. 2019, arXiv 1905.08094): a net's end teaches its beginning.

    python launch.py --config=configs/byot.py --workdir=runs/byot
    python launch.py --config=configs/byot.py:bits=w2a2 --workdir=runs/byot_w2a2

A classifier on each stage but the last learns from the labels, from the net's own soft labels and
from the feature under its last classifier. They serve training alone: evaluation, size and
deployment are those of the net without them, and rows of their own (`student.stage1`, ...,
`student.ensemble`) tell how good they were. `alone` takes the same steps from labels. With `bits`
both learn in float first, from labels, and by their methods as quantized nets; the classifiers stay
in float.
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `alpha`, `temperature` and `hint` are the loss's; `deploy` exports the student.
    """
    args = common.parse_arg(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        bits="float",
        alpha=0.1,
        temperature=3.0,
        hint=1.28e-4,
        deploy=False,
        seed=0,
        train_examples=-1,
        epochs=0.0,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    quantized = args.bits != "float"
    if args.deploy and not quantized:
        raise ValueError("deploy exports integers; give bits too, such as bits=w4a4.")

    def stage(net, lr=0.1, weight_decay=5e-4, **more):
        return common.train(
            learn={net: dict(ce=common.ce(), **more)},
            optim={net: common.sgd(lr, weight_decay=weight_decay)},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
        )

    own = common.term("byot", alpha=args.alpha, temperature=args.temperature, hint=args.hint)
    config.nets.alone = common.net(args.model, width=args.width, rules=args.bits)
    config.nets.student = common.net(
        args.model, width=args.width, rules=args.bits, init_from="alone"
    )
    schedule, rates = [], {}
    if quantized:
        config.stages.start = stage("alone")
        config.stages.calibrate = common.calibrate("alone", "student")
        schedule += ["start", "calibrate"]
        rates = dict(lr=0.05, weight_decay=1e-4)
    # The student first: it copies `alone` at the moment at which it first takes part.
    config.stages.distil = stage("student", **rates, byot=own)
    config.stages.alone = stage("alone", **rates)
    config.stages.evaluate = common.evaluate(alone="labels", student="be your own teacher")
    schedule += ["distil", "alone", "evaluate"]
    if args.deploy:
        config.stages.deploy = common.deploy("student")
        schedule.append("deploy")
    config.schedule = tuple(schedule)
    return config.lock()
