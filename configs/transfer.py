"""Transfer learning beside distillation: weights from another domain, or a teacher.

    python launch.py --config=configs/float.py:data=digits28,epochs=30 --workdir=runs/digits
    python launch.py --config=configs/transfer.py:source=runs/digits#net --workdir=runs/transfer

One student in four arms of equal steps on the target's images: from random weights; from the
source's weights with a new head, all of it tuned ("tuned") or the head alone ("frozen"); and from
random weights with a teacher that was trained on the target itself ("distilled"). The source must
be the student's model, trained on images of the target's shape, with any number of classes:
`digits28` are handwritten digits at the size of Fashion-MNIST. In the frozen arm BatchNorm's
statistics still follow the new images.

Expect, on 1,000 images of Fashion-MNIST, seed 0: teacher 74.54 % top-1, `scratch` 65.70, `tuned`
72.87, `frozen` 61.66, `distilled` 62.85 (docs/results.md). Time and the spread over seeds were not
measured.
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `source` is "<run folder>#<net>" or a file of weights; without one it is trained here on the
    target's own images, which shows the mechanism and no transfer.
    """
    args, config = common.begin(
        arg,
        data="fashion_mnist",
        source="",
        model="resnet8",
        width=8,
        teacher="resnet20",
        teacher_width=8,
        temperature=4.0,
        kd_weight=0.9,
        train_examples=1000,
    )
    source = args.source or "source"
    labels = dict(ce=common.ce())

    def net(**fields):
        return common.net(args.model, width=args.width, **fields)

    def train(name, rows, **fields):
        return common.train_by_recipe(args, {name: rows}, **fields)

    if not args.source:
        config.nets.source = net()
    config.nets.scratch = net()
    config.nets.tuned = net(init_from=source, fresh="head")
    config.nets.frozen = net(init_from=source, fresh="head")
    # The distilled arm starts from the very weights of `scratch`.
    config.nets.distilled = net(init_from="scratch_before")
    config.nets.scratch_before = net(init_from="scratch")
    config.nets.teacher = common.net(args.teacher, width=args.teacher_width)
    stages = {} if args.source else dict(source=train("source", labels))
    stages |= dict(
        start=common.evaluate(scratch_before="random weights"),
        scratch=train("scratch", labels),
        tuned=train("tuned", labels),
        frozen=train("frozen", labels, freeze=("(?!head).+",)),
        teach=train("teacher", labels),
        distilled=train("distilled", common.distil("teacher", args)),
        evaluate=common.evaluate(
            "teacher",
            teacher="labels",
            scratch="random weights",
            tuned="other domain, all tuned",
            frozen="other domain, new head",
            distilled="random weights, teacher",
        ),
    )
    return common.finish(config, stages)
