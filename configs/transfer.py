"""Transfer learning beside distillation: what a net brings from another domain, or from a teacher.

    python launch.py --config=configs/float.py:data=digits28,epochs=30 --workdir=runs/digits
    python launch.py --config=configs/transfer.py:source=runs/digits#net --workdir=runs/transfer

One student in four arms of equal steps on the target's images: from random weights; from the
source's weights with a new head, all of it tuned ("tuned") or the head alone ("frozen"); and from
random weights with a teacher that was trained on the target itself ("distilled"). The source must
be the student's model, trained on images of the target's shape, with any number of classes:
`digits28` are handwritten digits at the size of Fashion-MNIST. In the frozen arm BatchNorm's
statistics still follow the new images.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `source` is "<run folder>#<net>" or a file of weights; without one it is trained here on the
    target's own images, which shows the mechanism and no transfer.
    """
    args = arguments.parse(
        arg,
        data="fashion_mnist",
        source="",
        model="resnet8",
        width=8,
        teacher="resnet20",
        teacher_width=8,
        temperature=4.0,
        kd_weight=0.9,
        seed=0,
        train_examples=1000,
        epochs=0.0,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)

    def net(**fields):
        return common.net(args.model, width=args.width, **fields)

    def stage(name, learn, **optim):
        return common.train(
            learn={name: learn},
            optim={name: common.sgd(0.1, weight_decay=5e-4, **optim)},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
        )

    labels = dict(ce=common.ce())
    config.nets.scratch = net()
    source = args.source
    if not source:
        source = "source"
        config.nets.source = net()
    config.nets.tuned = net(init_from=source, fresh="head")
    config.nets.frozen = net(init_from=source, fresh="head")
    # The distilled arm starts from the very weights of `scratch`.
    config.nets.distilled = net(init_from="scratch_before")
    config.nets.scratch_before = net(init_from="scratch")
    config.nets.teacher = common.net(args.teacher, width=args.teacher_width)
    kd = common.kd("teacher", args.kd_weight, temperature=args.temperature)
    stages = config.stages
    if not args.source:
        stages.source = stage("source", labels)
    stages.start = common.evaluate(scratch_before="random weights")
    stages.scratch = stage("scratch", labels)
    stages.tuned = stage("tuned", labels)
    stages.frozen = stage("frozen", labels, freeze=("(?!head).+",))
    stages.teach = stage("teacher", labels)
    stages.distilled = stage("distilled", dict(ce=common.ce(1.0 - args.kd_weight), kd=kd))
    stages.evaluate = common.evaluate(
        "teacher",
        teacher="labels",
        scratch="random weights",
        tuned="other domain, all tuned",
        frozen="other domain, new head",
        distilled="random weights, teacher",
    )
    config.schedule = (
        *(name for name in ("source",) if name in stages),
        "start",
        "scratch",
        "tuned",
        "frozen",
        "teach",
        "distilled",
        "evaluate",
    )
    return config.lock()
