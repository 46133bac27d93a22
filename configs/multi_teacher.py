"""Several teachers for one student, and each of them alone beside it.

    python launch.py --config=configs/multi_teacher.py:combine=confidence --workdir=runs/teachers

The student learns from labels and from all teachers: from the mean of their probabilities (Hinton
et al. 2015, arXiv 1503.02531), from the sum of its divergences to each (Beyer et al. 2021, arXiv
2106.05237; the gradient is n times as large), or from each by its confidence in an example's label
(Zhang et al. 2022, arXiv 2201.00007). The controls start from the same weights and see the same
batches: a student of each teacher alone, `single<k>`, of which the best is what several must beat,
and one with labels alone. The teachers together are a row too, the mean of their probabilities.
With `bits` every student is quantized, after a float start of its own.

Expect, on the digits in float, seed 0: teachers 98.13 and 97.53 % top-1, student of both 98.00, of
one 98.26 and 97.80, of labels 96.99 (docs/results.md). Time and the spread over seeds were not
measured.
"""

from configs import common

COMBINE = {"sum": "kd_sum", "mean": "kd_mean", "confidence": "ca_mkd"}


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `teachers` and `teacher_widths` have + between them; one of either serves all.
    """
    args, config = common.begin(
        arg,
        teachers="resnet8+resnet14",
        teacher_widths="16",
        student="resnet8",
        width=8,
        combine="mean",
        bits="float",
        temperature=4.0,
        kd_weight=0.9,
    )
    models = args.teachers.split("+")
    widths = [int(w) for w in args.teacher_widths.split("+")]
    count = max(len(models), len(widths))
    if count < 2 or {len(models), len(widths)} - {1, count}:
        raise ValueError(
            f"teachers is {args.teachers!r} and teacher_widths {args.teacher_widths!r}; give two "
            "teachers or more with + between them, and as many of the other, or one for all."
        )
    if args.combine not in COMBINE:
        raise ValueError(f"combine is {args.combine!r}; allowed: {', '.join(COMBINE)}.")
    teachers = [f"teacher{k}" for k in range(count)]
    singles = [f"single{k}" for k in range(count)]
    for index, name in enumerate(teachers):
        config.nets[name] = common.net(
            models[index % len(models)], width=widths[index % len(widths)]
        )
    config.nets.student = common.net(args.student, width=args.width, rules=args.bits)
    for name in (*singles, "labels"):
        config.nets[name] = common.net(
            args.student, width=args.width, rules=args.bits, init_from="student"
        )

    labels = dict(ce=common.ce())
    stages = dict(teach=common.train_by_recipe(args, dict.fromkeys(teachers, labels)))
    if args.bits != "float":
        stages["start"] = common.train_by_recipe(args, dict(student=labels))
        stages["calibrate"] = common.calibrate("student")
    # All students in one stage: the teachers run once for all of them, and no student's gradient
    # sees another's loss.
    taught = common.distil("", args)
    together = dict(loss=COMBINE[args.combine], source=tuple(teachers))
    arms = {net: common.distil(t, args) for net, t in zip(singles, teachers, strict=True)}
    arms |= dict(student=taught | dict(kd=taught["kd"] | together), labels=labels)
    stages["distil"] = common.train_by_recipe(args, arms, bits=args.bits)
    rows = common.evaluate(
        **dict.fromkeys(teachers, "labels"),
        student=f"{args.combine} of {count} teachers",
        **{one: f"{t} alone" for one, t in zip(singles, teachers, strict=True)},
        labels="labels",
    )
    stages["evaluate"] = rows | dict(ensembles=dict(teachers=tuple(teachers)))
    return common.finish(config, stages)
