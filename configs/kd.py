"""Knowledge distillation in float (Hinton et al. 2015, arXiv 1503.02531), with its control.

    python launch.py --config=configs/kd.py:temperature=4,kd_weight=0.9 --workdir=runs/kd

The student and its control, `alone`, start from the same weights and see the same batches.

Expect, on the digits, seed 0: 89 s on two cores of an AMD EPYC beside other work; teacher 98.13 %
top-1, `alone` 96.39, student 98.00. The spread over seeds was not measured.
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    With `views` both nets see so many fixed views of each image instead of newly augmented ones,
    and the teacher's logits are cached, computed once per view (1: the images as they are).
    """
    args, config = common.begin(
        arg,
        student="resnet8",
        teacher="resnet8",
        student_width=8,
        teacher_width=16,
        temperature=4.0,
        kd_weight=0.9,
        views=0,
    )
    config.nets.teacher = common.net(args.teacher, width=args.teacher_width)
    config.nets.student = common.net(args.student, width=args.student_width)
    config.nets.alone = common.net(args.student, width=args.student_width, init_from="student")
    labels = dict(ce=common.ce())
    taught = dict(student=common.distil("teacher", args))
    distil = common.train_by_recipe(args, taught, views=args.views)
    if args.views:
        distil["cache"] = common.cache()
    stages = dict(
        teach=common.train_by_recipe(args, dict(teacher=labels)),
        alone=common.train_by_recipe(args, dict(alone=labels), views=args.views),
        distil=distil,
        evaluate=common.evaluate("teacher", teacher="labels", alone="labels", student="distilled"),
    )
    return common.finish(config, stages)
