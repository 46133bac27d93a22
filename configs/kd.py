"""Knowledge distillation in float (Hinton et al. 2015, arXiv 1503.02531), with its control.

    python launch.py --config=configs/kd.py:temperature=4,kd_weight=0.9 --workdir=runs/kd
    python launch.py --config=configs/kd.py:seeds=3,temperatures=1+2+4 --sweep \
        --workdir=runs/kd_grid

The student and its control, `alone`, start from the same weights and see the same batches.

Expect, on the digits, seed 0: 89 s on two cores of an AMD EPYC beside other work; teacher 98.13 %
top-1, `alone` 96.39, student 98.00. The spread over seeds was not measured.
"""

from configs import common, sweeps

# `seeds`: how many, from `seed` on. `temperatures` and `weights` are "+"-separated; without them
# the argument of the config stays. The teacher and `alone` are trained once a seed.
SWEEP = dict(seeds=3, temperatures="", weights="")


def get_sweep(arg=""):
    """Returns a run for each temperature, weight and seed."""
    args, others = sweeps.split(arg, SWEEP)
    grid = dict(temperature=sweeps.chosen(args.temperatures))
    grid["kd_weight"] = sweeps.chosen(args.weights)
    runs = sweeps.grid(**{name: values for name, values in grid.items() if values})
    return sweeps.with_seeds((o for _, o in runs), sweeps.seeds(args.seeds, others))


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
