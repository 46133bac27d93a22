"""Patient and consistent teaching (Beyer et al. 2021, arXiv 2106.05237): function matching.

    python launch.py --config=configs/patient.py:patience=8 --workdir=runs/patient

No labels: the student's loss is KL(teacher || student) alone, on images that are mixed with one
another, the teacher seeing the very same mixtures, for `patience` times the usual schedule. The
controls take one of the three away each: the same length without mixtures (`plain`), the mixtures
at the usual length (`short`), and labels in place of the teacher (`labels`, without mixtures).
The rows differ in steps where the method is about them, and the run says so.

Expect, on the digits in float, seed 0: teacher 97.80 % top-1, `patient` 97.93, `plain` 97.86,
`short` 96.53, `labels` 97.66 (docs/results.md). Time and the spread over seeds were not measured.
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below. `bits` quantizes every student."""
    args, config = common.begin(
        arg,
        model="resnet8",
        width=8,
        teacher="resnet8",
        teacher_width=16,
        bits="float",
        temperature=1.0,
        patience=4.0,
        teacher_from="",
    )
    mixed = (*common.recipe(args.data).augment, "mixup")
    labels = dict(ce=common.ce())
    taught = dict(kd=common.kd("teacher", temperature=args.temperature))

    def train(name, rows, factor=1.0, bits=args.bits, **fields):
        return common.train_by_recipe(args, {name: rows}, share=factor, bits=bits, **fields)

    config.nets.teacher = common.net(
        args.teacher, width=args.teacher_width, init_from=args.teacher_from
    )
    config.nets.start = common.net(args.model, width=args.width, rules=args.bits)
    for name in ("patient", "plain", "short", "labels"):
        config.nets[name] = common.net(
            args.model, width=args.width, rules=args.bits, init_from="start"
        )
    stages = {} if args.teacher_from else dict(teach=train("teacher", labels, bits="float"))
    if args.bits != "float":
        stages["pretrain"] = train("start", labels, bits="float")
        stages["calibrate"] = common.calibrate("start")
    stages |= dict(
        patient=train("patient", taught, args.patience, augment=mixed),
        plain=train("plain", taught, args.patience),
        short=train("short", taught, augment=mixed),
        labels=train("labels", labels, args.patience),
        evaluate=common.evaluate(
            "teacher",
            teacher="labels",
            patient="teacher, mixtures, long",
            plain="teacher, long",
            short="teacher, mixtures, usual length",
            labels="labels, long",
        ),
    )
    return common.finish(config, stages)
