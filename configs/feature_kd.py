"""A student that learns by any loss of the library, at its published weight, and its control.

    python launch.py --config=configs/feature_kd.py:loss=rkd --workdir=runs/rkd
    python launch.py --config=configs/feature_kd.py:loss=crd,bits=w2a2 --workdir=runs/crd_w2a2
    python launch.py --config=configs/feature_kd.py:losses=kd+rkd+crd,seeds=3 --sweep \
        --workdir=runs/losses

Teacher and student may be of any families and sizes: taps and adaptors follow from their shapes
(`--mode=inspect` lists taps; override `stages.distil.learn.student.<loss>.taps`). With `bits` the
student learns in float first, is calibrated, and learns again as a quantized net; `alone` takes the
same steps from labels. `loss=simkd` makes the student end in the teacher's classifier; losses of
several teachers get a second one, `second`; losses of labels (`tf_kd`, and over the class tree
`hxe`, `tree_soft_labels`, `lca_alignment`) train none, and show one only where `teacher_from` names
it.

Expect, on the digits in float with `fitnet`, seed 0: 173 s on two cores of an AMD EPYC beside other
work; teacher 98.13 % top-1, `alone` 96.39, student 96.13. docs/results.md has every loss on
Fashion-MNIST over 3 seeds.
"""

from configs import common, sweeps, terms

# `losses` is "+"-separated; "all" is all with a published recipe. Losses share the teacher and
# `alone` of a seed, which are trained once.
SWEEP = dict(seeds=3, losses="all")


def get_sweep(arg=""):
    """Returns a run for each loss and seed."""
    args, others = sweeps.split(arg, SWEEP)
    runs = [dict(loss=loss) for loss in sweeps.chosen(args.losses, terms.published())]
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `teacher_from` and `init_from` take weights from runs or files instead of training them here.
    """
    args, config = common.begin(
        arg,
        loss="fitnet",
        student="resnet8",
        teacher="resnet14",
        student_width=8,
        teacher_width=16,
        bits="float",
        teacher_from="",
        init_from="",
    )
    loss = terms.entry(args.loss)
    quantized, borrows = args.bits != "float", loss.borrows_classifier
    if borrows and args.init_from:
        raise ValueError(f"loss={args.loss} trains a net with the teacher's head; drop init_from.")
    sources = ("teacher", "second") if loss.has_several_teachers else "teacher"

    taught, labels = terms.learn(args.loss, sources), dict(ce=common.ce())

    def train(name, rows, bits="float"):
        freeze = ("head",) if borrows and name.startswith("student") else ()
        return common.train_by_recipe(args, {name: rows}, bits=bits, freeze=freeze)

    def net(**fields):
        return common.net(args.student, width=args.student_width, **fields)

    stages = {}
    methods = dict(alone="labels", student=args.loss)
    if args.teacher_from or loss.has_teacher:
        config.nets.teacher = common.net(
            args.teacher, width=args.teacher_width, init_from=args.teacher_from
        )
        methods = dict(teacher="labels", **methods)
        if not args.teacher_from:
            stages["teach"] = train("teacher", labels)
    if "second" in sources:
        config.nets.second = common.net(args.teacher, width=args.teacher_width)
        stages["teach_second"] = train("second", labels)
    head = dict(head_from="teacher") if borrows else {}
    if quantized:
        # The float student learns from labels; one with a borrowed head can only learn by its loss.
        config.nets.student_float = net(init_from=args.init_from, **head)
        config.nets.student = net(rules=args.bits, init_from="student_float", **head)
        if not args.init_from:
            stages["start"] = train("student_float", taught if borrows else labels)
        origin = "student_float"
        if borrows:
            config.nets.alone_float = net()
            stages["start_alone"] = train("alone_float", labels)
            origin = "alone_float"
        config.nets.alone = net(rules=args.bits, init_from=origin)
        stages["calibrate"] = common.calibrate("student", "alone")
    else:
        config.nets.student = net(init_from=args.init_from, **head)
        # The control starts where the student starts, or would with a head of its own.
        config.nets.alone = net(init_from=args.init_from or ("" if borrows else "student"))
    stages["alone"] = train("alone", labels, args.bits)
    stages["distil"] = train("student", taught, args.bits)
    if quantized:
        stages["reestimate_bn"] = common.reestimate_bn("student", "alone")
    reference = "teacher" if "teacher" in methods else "alone"
    stages["evaluate"] = common.evaluate(reference, **methods)
    return common.finish(config, stages)
