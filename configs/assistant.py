"""Teacher assistants (Mirzadeh et al. 2019, arXiv 1902.03393): a chain from teacher to student.

    python launch.py --config=configs/assistant.py:widths=32+16+8 --workdir=runs/assistant

Each net of the chain learns from labels and from the one before it, (1 - l) CE + l T^2 KL; `direct`
is the control, the same student with the teacher itself. With `bits` the last one and the control
are quantized: they start from a float student and learn as quantized nets.
"""

import itertools

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `widths` from the teacher to the student, and `models` as many or one, with + between them.
    """
    args = arguments.parse(
        arg,
        data="digits",
        models="resnet8",
        widths="32+16+8",
        bits="float",
        temperature=4.0,
        kd_weight=0.9,
        seed=0,
        train_examples=-1,
        epochs=0.0,
    )
    widths = [int(w) for w in args.widths.split("+")]
    models = args.models.split("+")
    models = models * len(widths) if len(models) == 1 else models
    if len(widths) < 3 or len(models) != len(widths):
        raise ValueError(
            f"widths is {args.widths!r} and models {args.models!r}; a chain has a teacher, at "
            "least one assistant and a student, so give three widths or more, and one model or as "
            "many."
        )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    chain = ["teacher", *(f"assistant{k}" for k in range(1, len(widths) - 1)), "student"]
    for name, model, width in zip(chain, models, widths, strict=True):
        config.nets[name] = common.net(model, width=width)
    config.nets.student.rules = args.bits
    # The control starts where the student starts.
    config.nets.direct = common.net(
        models[-1], width=widths[-1], rules=args.bits, init_from="student"
    )

    def stage(net, learn, bits="float"):
        return common.train(
            learn={net: learn},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
            **common.descent(net, bits=bits),
        )

    def taught(source):
        kd = common.kd(source, args.kd_weight, temperature=args.temperature)
        return dict(ce=common.ce(1.0 - args.kd_weight), kd=kd)

    schedule = []

    def add(name, fields):
        config.stages[name] = fields
        schedule.append(name)

    add("teach", stage("teacher", dict(ce=common.ce())))
    if args.bits != "float":
        add("start", stage("student", dict(ce=common.ce())))
        add("calibrate", common.calibrate("student"))
    # First the control: it copies the student at the moment at which it takes part.
    add("direct", stage("direct", taught("teacher"), args.bits))
    for before, name in itertools.pairwise(chain):
        bits = args.bits if name == "student" else "float"
        add(f"teach_{name}", stage(name, taught(before), bits))
    methods = {name: "chain" for name in chain[1:]}
    add("evaluate", common.evaluate("teacher", teacher="labels", direct="teacher alone", **methods))
    config.schedule = tuple(schedule)
    return config.lock()
