"""A student taught by any loss of the library, at its published weight, and its control.

    python launch.py --config=configs/feature_kd.py:loss=rkd --workdir=runs/rkd
    python launch.py --config=configs/feature_kd.py:loss=crd,bits=w2a2 --workdir=runs/crd_w2a2

Teacher and student may be of any families and sizes: taps are found and adaptors built by shape
(`--mode=inspect` lists taps; override `stages.distil.learn.student.<loss>.taps`). With `bits` the
student learns in float first, is calibrated, and learns again as a quantized net; `alone` takes the
same steps from labels. `loss=simkd` makes the student end in the teacher's classifier; losses of
several teachers get a second one, `second`; losses of labels (`tf_kd`, and over the class tree
`hxe`, `tree_soft_labels`, `lca_alignment`) train none, and show one only where `teacher_from` names
it.
"""

from configs import arguments, common, terms


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `teacher_from` and `init_from` take weights from runs or files instead of training them here.
    """
    args = arguments.parse(
        arg,
        loss="fitnet",
        data="digits",
        student="resnet8",
        teacher="resnet14",
        student_width=8,
        teacher_width=16,
        bits="float",
        teacher_from="",
        init_from="",
        seed=0,
        train_examples=-1,
        epochs=0.0,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    quantized, borrows = args.bits != "float", args.loss == "simkd"
    if borrows and args.init_from:
        raise ValueError("loss=simkd trains a net with the teacher's head; drop init_from.")
    sources = ("teacher", "second") if args.loss in terms.SEVERAL else "teacher"

    def taught():
        return terms.learn(args.loss, sources)

    def labels():
        return dict(ce=common.ce())

    def stage(net, rows, bits="float"):
        freeze = ("head",) if borrows and net.startswith("student") else ()
        return common.train(
            learn={net: rows},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
            **common.descent(net, bits=bits, freeze=freeze),
        )

    def net(**fields):
        return common.net(args.student, width=args.student_width, **fields)

    schedule = []

    def add(name, fields):
        config.stages[name] = fields
        schedule.append(name)

    methods = dict(alone="labels", student=args.loss)
    if args.teacher_from or args.loss not in terms.OF_LABELS:
        config.nets.teacher = common.net(
            args.teacher, width=args.teacher_width, init_from=args.teacher_from
        )
        methods = dict(teacher="labels", **methods)
        if not args.teacher_from:
            add("teach", stage("teacher", labels()))
    if "second" in sources:
        config.nets.second = common.net(args.teacher, width=args.teacher_width)
        add("teach_second", stage("second", labels()))
    head = dict(head_from="teacher") if borrows else {}
    if quantized:
        # The float student learns from labels; one with a borrowed head can only learn by its loss.
        config.nets.student_float = net(init_from=args.init_from, **head)
        config.nets.student = net(rules=args.bits, init_from="student_float", **head)
        if not args.init_from:
            add("start", stage("student_float", taught() if borrows else labels()))
        origin = "student_float"
        if borrows:
            config.nets.alone_float = net()
            add("start_alone", stage("alone_float", labels()))
            origin = "alone_float"
        config.nets.alone = net(rules=args.bits, init_from=origin)
        add("calibrate", common.calibrate("student", "alone"))
    else:
        config.nets.student = net(init_from=args.init_from, **head)
        # The control starts where the student starts, or would with a head of its own.
        config.nets.alone = net(init_from=args.init_from or ("" if borrows else "student"))
    add("alone", stage("alone", labels(), args.bits))
    add("distil", stage("student", taught(), args.bits))
    if quantized:
        add("reestimate_bn", common.reestimate_bn("student", "alone"))
    add("evaluate", common.evaluate("teacher" if "teacher" in methods else "alone", **methods))
    config.schedule = tuple(schedule)
    return config.lock()
