"""QKD (Kim et al. 2019, arXiv 1911.12491): quantization and distillation together, with controls.

    python launch.py --config=configs/qkd.py --workdir=runs/qkd_digits
    python launch.py --config=configs/qkd.py:data=fashion_mnist,student=resnet8,teacher=resnet20
    python launch.py --config=configs/qkd.py:seeds=8 --sweep --jobs=2 --workdir=runs/qkd_seeds

A float teacher and a float student are trained; the student is quantized and goes through the three
phases: self-studying (labels alone), co-studying (teacher and student learn from each other),
tutoring (the teacher frozen). Two controls start from the same float student and take as many
student steps: QAT alone, and QAT with the fixed teacher. Agreement is counted with one net in every
row: the float teacher as it was before co-studying, which `teacher_before` keeps.

The recipe: SGD with one cosine over all three phases (15, 50 and 35 % of the steps), T = 2, unit
weights, the teacher at a tenth of the student's rate, first and last layer at 8 bits. `loss` takes
the place of the KL divergence in co-studying and tutoring, in both directions and at its published
weight: `loss=rkd`, say. Published schedules are shares of all three phases and run once, from the
start of co-studying on: a loss that is a stage of its own (`fsp`, `ab`) leaves tutoring to the
labels, and `ft` keeps its paraphraser.

Expect, on the digits at W2A2, 8 seeds: 43 to 59 s on two cores of an AMD EPYC; top-1 of the teacher
97.66 +- 0.50 %, float student 96.18 +- 0.27, QAT alone 95.78 +- 0.89, QAT with the fixed teacher
96.39 +- 0.80, QKD 96.39 +- 0.74 (docs/results.md).
"""

from configs import common, sweeps, terms

# `seeds`: how many, from `seed` on.
SWEEP = dict(seeds=3)


def get_sweep(arg=""):
    """Returns a run for each seed; the controls are in every run."""
    args, others = sweeps.split(arg, SWEEP)
    return sweeps.grid(seed=sweeps.seeds(args.seeds, others))


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `bits` is w2a2, w4a4, ... or ternary; `teacher_from` and `init_from` take float weights from
    runs or files instead of training them here.
    """
    args, config = common.begin(
        arg,
        student="resnet8",
        teacher="resnet8",
        student_width=8,
        teacher_width=16,
        bits="w2a2",
        loss="kd",
        teacher_from="",
        init_from="",
        reduce_range=False,
    )
    quantized = dict(
        model=args.student,
        width=args.student_width,
        rules=args.bits,
        reduce_range=args.reduce_range,
    )
    config.nets.teacher = common.net(
        args.teacher, width=args.teacher_width, init_from=args.teacher_from
    )
    # A copy of the moment at which it first takes part: `evaluate_float`.
    config.nets.teacher_before = common.net(
        args.teacher, width=args.teacher_width, init_from="teacher"
    )
    config.nets.student = common.net(**quantized, init_from=args.init_from)
    config.nets.qat_only = common.net(**quantized, init_from="student")
    config.nets.qat_fixed_teacher = common.net(**quantized, init_from="student")

    def train(name, rows, bits=args.bits, **fields):
        return common.train_by_recipe(args, {name: rows}, bits=bits, **fields)

    labels = dict(ce=common.ce())

    if args.loss != "kd":
        loss = terms.entry(args.loss)
        if loss.borrows_classifier or loss.has_several_teachers or not loss.has_teacher:
            raise ValueError(
                f"loss is {args.loss!r}, which needs another student, several teachers or none; "
                "use configs/feature_kd.py."
            )

    def taught(source="teacher", **part):
        if args.loss == "kd":
            return dict(ce=common.ce(), kd=common.kd(source, temperature=2.0))
        return terms.learn(args.loss, source, **part)

    stages = {}
    if not args.teacher_from:
        stages["pretrain_teacher"] = train("teacher", labels, bits="float")
    if not args.init_from:
        stages["pretrain_student"] = train("student", labels, bits="float")
    co_study = train("student", taught(share=0.50), share=0.50, continues="self_study")
    co_study["learn"]["teacher"] = taught("student", share=0.50)
    co_study["optim"]["teacher"] = common.sgd(0.005, weight_decay=1e-4)
    co_study["hygiene"]["teacher"] = common.hygiene()
    tutored = taught(done=0.50, share=0.35)
    stages |= dict(
        evaluate_float=common.evaluate("teacher_before", teacher="float", student="float"),
        calibrate=common.calibrate("student"),
        qat_only=train("qat_only", labels),
        qat_fixed_teacher=train("qat_fixed_teacher", taught()),
        # The controls get what the student gets.
        reestimate_bn_controls=common.reestimate_bn("qat_only", "qat_fixed_teacher"),
        evaluate_controls=common.evaluate(
            "teacher_before", qat_only="QAT alone", qat_fixed_teacher="QAT, fixed teacher"
        ),
        self_study=train("student", labels, share=0.15),
        co_study=co_study,
        tutor=train("student", tutored, share=0.35, continues="co_study"),
        reestimate_bn=common.reestimate_bn("student"),
        evaluate=common.evaluate("teacher_before", student="QKD", teacher="after co-studying"),
        deploy=common.deploy("student"),
    )
    return common.finish(config, stages)
