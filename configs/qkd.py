"""QKD (Kim et al. 2019, arXiv 1911.12491): quantization and distillation together, with controls.

    python launch.py --config=configs/qkd.py --workdir=runs/qkd_digits
    python launch.py --config=configs/qkd.py:data=fashion_mnist,student=resnet8,teacher=resnet20

A float teacher and a float student are trained; the student is quantized and goes through the three
phases: self-studying (labels alone), co-studying (teacher and student learn from each other),
tutoring (the teacher frozen). Two controls start from the same float student and take as many
student steps: QAT alone, and QAT with the fixed teacher. Agreement is counted with one net in every
row: the float teacher as it was before co-studying, which `teacher_before` keeps.

The recipe: SGD with one cosine over all three phases (15, 50 and 35 % of the steps), T = 2, unit
weights, the teacher at a tenth of the student's rate, first and last layer at 8 bits. `loss` takes
the place of the KL divergence in co-studying and tutoring, in both directions and at its published
weight: `loss=rkd`, say. Published courses are shares of all three phases and run once, from the
start of co-studying on: a loss that is a stage of its own (`fsp`, `ab`) leaves tutoring to the
labels, and `ft` goes on with its paraphraser.
"""

from configs import arguments, common, terms


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `bits` is w2a2, w4a4, ... or ternary; `teacher_from` and `init_from` take float weights from
    runs or files instead of training them here.
    """
    args = arguments.parse(
        arg,
        data="digits",
        student="resnet8",
        teacher="resnet8",
        student_width=8,
        teacher_width=16,
        bits="w2a2",
        loss="kd",
        teacher_from="",
        init_from="",
        seed=0,
        train_examples=-1,
        epochs=0.0,
        reduce_range=False,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    epochs = args.epochs or recipe["epochs"]
    batch_size = recipe["batch_size"]

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

    def stage(net, learn, *, share=1.0, bits=args.bits, continues=""):
        return common.train(
            learn={net: learn},
            epochs=share * epochs,
            batch_size=batch_size,
            **common.descent(net, bits=bits, continues=continues),
        )

    labels = dict(ce=common.ce())

    if args.loss in ("simkd", *terms.SEVERAL, *terms.OF_LABELS):
        raise ValueError(
            f"loss is {args.loss!r}, which needs another student, several teachers or none; use "
            "configs/feature_kd.py."
        )

    def taught(source="teacher", **part):
        if args.loss == "kd":
            return dict(ce=common.ce(), kd=common.kd(source, temperature=2.0))
        return terms.learn(args.loss, source, **part)

    stages = config.stages
    if not args.teacher_from:
        stages.pretrain_teacher = stage("teacher", labels, bits="float")
    if not args.init_from:
        stages.pretrain_student = stage("student", labels, bits="float")
    stages.evaluate_float = common.evaluate("teacher_before", teacher="float", student="float")
    stages.calibrate = common.calibrate("student")
    stages.qat_only = stage("qat_only", labels)
    stages.qat_fixed_teacher = stage("qat_fixed_teacher", taught())
    # The controls get what the student gets.
    stages.reestimate_bn_controls = common.reestimate_bn("qat_only", "qat_fixed_teacher")
    stages.evaluate_controls = common.evaluate(
        "teacher_before", qat_only="QAT alone", qat_fixed_teacher="QAT, fixed teacher"
    )
    stages.self_study = stage("student", labels, share=0.15)
    co_study = stage("student", taught(share=0.50), share=0.50, continues="self_study")
    co_study["learn"]["teacher"] = taught("student", share=0.50)
    co_study["optim"]["teacher"] = common.sgd(0.005, weight_decay=1e-4)
    co_study["hygiene"]["teacher"] = common.hygiene()
    stages.co_study = co_study
    tutored = taught(done=0.50, share=0.35)
    stages.tutor = stage("student", tutored, share=0.35, continues="co_study")
    stages.reestimate_bn = common.reestimate_bn("student")
    stages.evaluate = common.evaluate("teacher_before", student="QKD", teacher="after co-studying")
    stages.deploy = common.deploy("student")

    config.schedule = (
        *(name for name in ("pretrain_teacher", "pretrain_student") if name in stages),
        "evaluate_float",
        "calibrate",
        "qat_only",
        "qat_fixed_teacher",
        "reestimate_bn_controls",
        "evaluate_controls",
        "self_study",
        "co_study",
        "tutor",
        "reestimate_bn",
        "evaluate",
        "deploy",
    )
    return config.lock()
