"""Without data: a student and a quantized net from images that a trained net remembers.

    python launch.py --config=configs/data_free.py --workdir=runs/data_free

The teacher learns from the data. From the statistics in its BatchNorms images are made: by
DeepInversion (Yin et al. 2019, arXiv 1912.08795), on which a student learns from the teacher alone,
KL and no labels; by ZeroQ (Cai et al. 2020, arXiv 2001.00281), on which the teacher's quantized
copy is calibrated. The controls do the same with as many real images: `student_real` from the same
weights for the same steps, `quantized_real` from the same float net.
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `train_examples` (-1: what the recipe says) is the number of real images and of made ones;
    `calibration` that of either for the quantized copy. `steps=0` optimises images for as long as
    each method says.
    """
    args = common.parse_arg(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        teacher="resnet8",
        teacher_width=16,
        bits="w4a8:static",
        calibration=64,
        steps=0,
        temperature=4.0,
        teacher_from="",
        seed=0,
        train_examples=-1,
        epochs=0.0,
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    examples = config.data.train_examples
    if examples < 1:
        raise ValueError(
            f"train_examples is {examples}, the whole of {args.data!r}; as many images are made as "
            "there are real ones, so say how many, such as train_examples=2000."
        )

    def stage(net, learn, images=""):
        return common.train(
            learn={net: learn},
            optim={net: common.sgd(0.1, weight_decay=5e-4)},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
            images=images,
        )

    nets, stages = config.nets, config.stages
    nets.teacher = common.net(args.teacher, width=args.teacher_width, init_from=args.teacher_from)
    nets.student = common.net(args.model, width=args.width)
    nets.student_real = common.net(args.model, width=args.width, init_from="student")
    for name in ("quantized", "quantized_real"):
        nets[name] = common.net(
            args.teacher, width=args.teacher_width, rules=args.bits, init_from="teacher"
        )
    taught = dict(kd=common.kd("teacher", temperature=args.temperature))
    stages.teach = stage("teacher", dict(ce=common.ce()))
    stages.deep_inversion = common.synthesize("teacher", examples=examples, steps=args.steps)
    # First the control: it copies the student at the moment at which it takes part.
    stages.student_real = stage("student_real", taught)
    stages.student = stage("student", taught, images="deep_inversion")
    stages.zeroq = common.synthesize(
        "teacher", examples=args.calibration, method="zeroq", steps=args.steps
    )
    count = min(args.calibration, examples)
    stages.calibrate = common.calibrate("quantized", images="zeroq", examples=count)
    stages.calibrate_real = common.calibrate("quantized_real", examples=count)
    stages.evaluate = common.evaluate(
        "teacher",
        teacher="labels",
        student="teacher on DeepInversion's images",
        student_real="teacher on real images",
        quantized="calibrated on ZeroQ's images",
        quantized_real="calibrated on real images",
    )
    config.schedule = (
        *(() if args.teacher_from else ("teach",)),
        "deep_inversion",
        "student_real",
        "student",
        "zeroq",
        "calibrate",
        "calibrate_real",
        "evaluate",
    )
    return config.lock()
