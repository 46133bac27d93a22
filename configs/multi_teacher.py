"""Several teachers for one student, and each of them alone beside it.

    python launch.py --config=configs/multi_teacher.py:combine=confidence --workdir=runs/teachers

The student learns from labels and from all teachers: from the mean of their probabilities (Hinton
et al. 2015, arXiv 1503.02531), from the sum of its divergences to each (Beyer et al. 2021, arXiv
2106.05237; the gradient is n times as large), or from each as far as it knows an example's label
(Zhang et al. 2022, arXiv 2201.00007). The controls start from the same weights and see the same
batches: a student of each teacher alone, `single<k>`, of which the best is what several must beat,
and one with labels alone. The teachers together are a row too, the mean of their probabilities.
With `bits` every student is quantized, after a float start of its own.
"""

from configs import arguments, common

COMBINE = {"sum": "kd_sum", "mean": "kd_mean", "confidence": "ca_mkd"}


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `teachers` and `teacher_widths` have + between them; one of either serves all.
    """
    args = arguments.parse(
        arg,
        data="digits",
        teachers="resnet8+resnet14",
        teacher_widths="16",
        student="resnet8",
        width=8,
        combine="mean",
        bits="float",
        temperature=4.0,
        kd_weight=0.9,
        seed=0,
        train_examples=-1,
        epochs=0.0,
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
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    teachers = [f"teacher{k}" for k in range(count)]
    singles = [f"single{k}" for k in range(count)]
    for place, name in enumerate(teachers):
        config.nets[name] = common.net(
            models[place % len(models)], width=widths[place % len(widths)]
        )
    config.nets.student = common.net(args.student, width=args.width, rules=args.bits)
    for name in (*singles, "labels"):
        config.nets[name] = common.net(
            args.student, width=args.width, rules=args.bits, init_from="student"
        )

    def stage(learn, bits="float"):
        return common.train(
            learn=learn,
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
            **common.descent(*learn, bits=bits),
        )

    def taught(**kd):
        fields = dict(weight=args.kd_weight, temperature=args.temperature, **kd)
        return dict(ce=common.ce(1.0 - args.kd_weight), kd=fields)

    schedule = ["teach"]
    config.stages.teach = stage({name: dict(ce=common.ce()) for name in teachers})
    if args.bits != "float":
        config.stages.start = stage(dict(student=dict(ce=common.ce())))
        config.stages.calibrate = common.calibrate("student")
        schedule += ["start", "calibrate"]
    # All students in one stage: the teachers run once for all of them, and no student's gradient
    # sees another's loss.
    arms = dict(
        student=taught(loss=COMBINE[args.combine], source=tuple(teachers)),
        labels=dict(ce=common.ce()),
        **{one: taught(loss="kd", source=t) for one, t in zip(singles, teachers, strict=True)},
    )
    config.stages.distil = stage(arms, args.bits)
    config.stages.evaluate = common.evaluate(
        **dict.fromkeys(teachers, "labels"),
        student=f"{args.combine} of {count} teachers",
        **{one: f"{t} alone" for one, t in zip(singles, teachers, strict=True)},
        labels="labels",
    )
    config.stages.evaluate["ensembles"] = dict(teachers=tuple(teachers))
    config.schedule = (*schedule, "distil", "evaluate")
    return config.lock()
