"""Teacher assistants (Mirzadeh et al. 2019, arXiv 1902.03393): a chain from teacher to student.

    python launch.py --config=configs/assistant.py:widths=32+16+8 --workdir=runs/assistant

Each net of the chain learns from labels and from the one before it, (1 - l) CE + l T^2 KL; `direct`
is the control, the same student taught by the teacher itself. With `bits` student and control are
quantized: they start from a float student and learn as quantized nets.

Expect, on the digits in float, seed 0: 310 s on two cores of an AMD EPYC beside other work; teacher
98.26 % top-1, `direct` 97.86, assistant 98.00, student 97.66. The spread over seeds was not
measured.
"""

import itertools

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `widths` from the teacher to the student, and `models` as many or one, with + between them.
    """
    args, config = common.begin(
        arg,
        models="resnet8",
        widths="32+16+8",
        bits="float",
        temperature=4.0,
        kd_weight=0.9,
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
    chain = ["teacher", *(f"assistant{k}" for k in range(1, len(widths) - 1)), "student"]
    for name, model, width in zip(chain, models, widths, strict=True):
        config.nets[name] = common.net(model, width=width)
    config.nets.student.rules = args.bits
    # The control starts where the student starts.
    config.nets.direct = common.net(
        models[-1], width=widths[-1], rules=args.bits, init_from="student"
    )

    labels = dict(ce=common.ce())
    stages = dict(teach=common.train_by_recipe(args, dict(teacher=labels)))
    if args.bits != "float":
        stages["start"] = common.train_by_recipe(args, dict(student=labels))
        stages["calibrate"] = common.calibrate("student")
    # First the control: it copies the student at the moment at which it takes part.
    taught = dict(direct=common.distil("teacher", args))
    stages["direct"] = common.train_by_recipe(args, taught, bits=args.bits)
    for before, name in itertools.pairwise(chain):
        stages[f"teach_{name}"] = common.train_by_recipe(
            args,
            {name: common.distil(before, args)},
            bits=args.bits if name == "student" else "float",
        )
    methods = {name: "chain" for name in chain[1:]}
    stages["evaluate"] = common.evaluate(
        "teacher", teacher="labels", direct="teacher alone", **methods
    )
    return common.finish(config, stages)
