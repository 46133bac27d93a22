"""Knowledge distillation in float (Hinton et al. 2015, arXiv 1503.02531), with its control.

    python launch.py --config=configs/kd.py:temperature=4,kd_weight=0.9 --workdir=runs/kd

The student and its control, `alone`, start from the same weights and see the same batches.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    With `views` both nets see so many fixed views of each image instead of fresh ones, and the
    teacher speaks of each view once (1: the images as they are).
    """
    args = arguments.parse(
        arg,
        data="digits",
        student="resnet8",
        teacher="resnet8",
        student_width=8,
        teacher_width=16,
        temperature=4.0,
        kd_weight=0.9,
        seed=0,
        train_examples=-1,
        epochs=0.0,
        views=0,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)

    def stage(net, views=0, **losses):
        return common.train(
            learn={net: losses},
            optim={net: common.sgd(0.1, weight_decay=5e-4)},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
            views=views,
        )

    config.nets.teacher = common.net(args.teacher, width=args.teacher_width)
    config.nets.student = common.net(args.student, width=args.student_width)
    config.nets.alone = common.net(args.student, width=args.student_width, init_from="student")
    config.stages.teach = stage("teacher", ce=common.ce())
    config.stages.alone = stage("alone", args.views, ce=common.ce())
    distil = stage(
        "student",
        args.views,
        ce=common.ce(1.0 - args.kd_weight),
        kd=common.kd("teacher", args.kd_weight, temperature=args.temperature),
    )
    if args.views:
        distil["cache"] = common.cache()
    config.stages.distil = distil
    config.stages.evaluate = common.evaluate(
        "teacher", teacher="labels", alone="labels", student="distilled"
    )
    config.schedule = ("teach", "alone", "distil", "evaluate")
    return config.lock()
