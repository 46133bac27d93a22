"""Patient and consistent teaching (Beyer et al. 2021, arXiv 2106.05237): a function is matched.

    python launch.py --config=configs/patient.py:patience=8 --workdir=runs/patient

No labels: the student's loss is KL(teacher || student) alone, on images that are mixed with one
another, the teacher seeing the very same mixtures, for `patience` times the usual schedule. The
controls take one of the three away each: the same length without mixtures (`plain`), the mixtures
at the usual length (`short`), and labels in place of the teacher (`labels`, without mixtures).
The rows differ in steps where the method is about them, and the run says so.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below. `bits` quantizes every student."""
    args = arguments.parse(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        teacher="resnet8",
        teacher_width=16,
        bits="float",
        temperature=1.0,
        patience=4.0,
        teacher_from="",
        seed=0,
        train_examples=-1,
        epochs=0.0,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    epochs = args.epochs or recipe["epochs"]
    mixed = (*recipe["augment"], "mixup")
    arms = ("patient", "plain", "short", "labels")

    def stage(net, learn, factor=1.0, augment=(), bits=args.bits):
        return common.train(
            learn={net: learn},
            epochs=factor * epochs,
            batch_size=recipe["batch_size"],
            augment=augment,
            **common.descent(net, bits=bits),
        )

    schedule = []

    def add(name, fields):
        config.stages[name] = fields
        schedule.append(name)

    labels = dict(ce=common.ce())
    config.nets.teacher = common.net(
        args.teacher, width=args.teacher_width, init_from=args.teacher_from
    )
    config.nets.start = common.net(args.model, width=args.width, rules=args.bits)
    for name in arms:
        config.nets[name] = common.net(
            args.model, width=args.width, rules=args.bits, init_from="start"
        )
    if not args.teacher_from:
        add("teach", stage("teacher", labels, bits="float"))
    if args.bits != "float":
        add("pretrain", stage("start", labels, bits="float"))
        add("calibrate", common.calibrate("start"))
    taught = dict(kd=common.kd("teacher", temperature=args.temperature))
    add("patient", stage("patient", taught, args.patience, mixed))
    add("plain", stage("plain", taught, args.patience))
    add("short", stage("short", taught, augment=mixed))
    add("labels", stage("labels", labels, args.patience))
    add(
        "evaluate",
        common.evaluate(
            "teacher",
            teacher="labels",
            patient="teacher, mixtures, long",
            plain="teacher, long",
            short="teacher, mixtures, usual length",
            labels="labels, long",
        ),
    )
    config.schedule = tuple(schedule)
    return config.lock()
