"""Data-free distillation and calibration: images are made from a trained net alone.

    python launch.py --config=configs/data_free.py --workdir=runs/data_free
    python launch.py --config=configs/data_free.py:makers=cmi --workdir=runs/cmi

The teacher learns from the data. From it alone images are made, on which a student learns from the
teacher, KL and no labels, a student for each maker: DeepInversion (Yin et al. 2019, arXiv
1912.08795), which descends to the statistics in its BatchNorms; DAFL (Chen et al. 2019, arXiv
1904.01186), a generator that learns from its answers; CMI (Fang et al. 2021, arXiv 2105.08584),
generators whose images differ from those before, adversary to a copy of the student. On images by
ZeroQ (Cai et al. 2020, arXiv 2001.00281) the teacher's quantized copy is calibrated. The controls
do the same with as many real images: `student_real` from the same weights for the same steps,
`quantized_real` from the same float net.

`SIZES` holds what fits the digits on a laptop. Other sets get what the papers' code takes for
CIFAR-10: batches of 256 with 2,000 steps (DeepInversion), 500 (ZeroQ) or 200 (CMI, beside 400 steps
of the student a batch). DAFL's code takes 240,000 steps for CIFAR-10 and 24,000 of 512 images for
MNIST, with the student beside it; its default here is 2,000.

Expect, on the digits, seed 0: nine minutes on two cores of an Intel Xeon beside other work; teacher
97.80 % top-1, students on real images 97.53, DeepInversion's 92.92, DAFL's 67.67, CMI's 92.65
(docs/results.md). The spread over seeds was not measured.
"""

from typing import Any

from configs import common

DIGITS = dict(
    deep_inversion=dict(steps=500),
    zeroq=dict(steps=200, lr=0.1),
    dafl=dict(steps=1000, batch_size=128, width=16),
    cmi=dict(steps=100, batch_size=100, lr=0.003, width=16, shift=1, student_steps=100),
)
SIZES = dict(digits=DIGITS, digits28=DIGITS, synthetic=DIGITS)
METHODS = dict(
    deep_inversion="teacher on DeepInversion's images",
    dafl="teacher on DAFL's images",
    cmi="teacher on CMI's images",
)


def synthesize(
    net: str, *, examples: int, method: str = "deep_inversion", **fields: Any
) -> dict[str, Any]:
    """Returns a `synthesize` stage: images made from a trained net with BatchNorm.

    `method` is "deep_inversion" or "zeroq"; `steps=0` and `lr=0.0` are the method's own.
    """
    defaults = dict(
        batch_size=256, steps=0, lr=0.0, bn_weight=10.0, tv_weight=2.5e-5, l2_weight=0.0, jitter=2
    )
    own = dict(kind="synthesize", nets=(net,), examples=examples, method=method)
    return {**own, **common.filled("synthesize", defaults, fields)}


def dafl(net: str, *, examples: int, **fields: Any) -> dict[str, Any]:
    """Returns a `dafl` stage: images of a generator that learns from a trained net's answers."""
    defaults = dict(
        batch_size=256,
        steps=2000,
        lr=0.02,
        latent=100,
        width=64,
        one_hot_weight=1.0,
        activation_weight=0.1,
        entropy_weight=5.0,
        tap="pooled",
    )
    own = dict(kind="dafl", nets=(net,), examples=examples)
    return {**own, **common.filled("dafl", defaults, fields)}


def cmi(net: str, student: str = "", *, examples: int, **fields: Any) -> dict[str, Any]:
    """Returns a `cmi` stage: images of generators that contrast each batch with those before it.

    `student` is the net whose copy is the generators' adversary; "" leaves that term out.
    """
    defaults = dict(
        batch_size=256,
        steps=200,
        lr=1e-3,
        latent=256,
        width=64,
        bn_weight=1.0,
        one_hot_weight=1.0,
        contrast_weight=0.8,
        adversarial_weight=0.5,
        temperature=0.1,
        embedding=256,
        memory=4096,
        shift=4,
        flip=False,
        smallest_crop=0.25,
        student_steps=400,
        student_lr=0.1,
        student_temperature=20.0,
    )
    nets = (net, student) if student else (net,)
    return {
        **dict(kind="cmi", nets=nets, examples=examples),
        **common.filled("cmi", defaults, fields),
    }


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `makers` has + between names. `train_examples` (-1: what the recipe says) is the number of real
    images and of made ones; `calibration` that of either for the quantized copy. `steps` above 0
    takes the place of all makers' steps.
    """
    args, config = common.begin(
        arg,
        makers="deep_inversion+dafl+cmi",
        model="resnet8",
        width=8,
        teacher="resnet8",
        teacher_width=16,
        bits="w4a8:static",
        calibration=64,
        steps=0,
        temperature=4.0,
        teacher_from="",
    )
    makers = args.makers.split("+")
    for maker in makers:
        if maker not in METHODS or makers.count(maker) > 1:
            raise ValueError(
                f"makers is {args.makers!r}; allowed, each once and with + between them: "
                f"{', '.join(METHODS)}."
            )
    examples = config.data.train_examples
    if examples < 1:
        raise ValueError(
            f"train_examples is {examples}, the whole of {args.data!r}; as many images are made as "
            "there are real ones, so say how many, such as train_examples=2000."
        )

    def train(name, rows, images=""):
        return common.train_by_recipe(args, {name: rows}, images=images)

    def make(maker):
        sizes: dict[str, Any] = dict(SIZES.get(args.data, {}).get(maker, {}))
        if args.steps:
            sizes["steps"] = args.steps
        if maker == "dafl":
            return dafl("teacher", examples=examples, **sizes)
        if maker == "cmi":
            flip = "flip" in common.recipe(args.data).augment
            return cmi("teacher", "student_cmi", examples=examples, flip=flip, **sizes)
        count = args.calibration if maker == "zeroq" else examples
        return synthesize("teacher", examples=count, method=maker, **sizes)

    nets, stages = config.nets, {}
    nets.teacher = common.net(args.teacher, width=args.teacher_width, init_from=args.teacher_from)
    nets.start = common.net(args.model, width=args.width)  # all students' first weights
    for name in ("real", *makers):
        nets[f"student_{name}"] = common.net(args.model, width=args.width, init_from="start")
    for name in ("quantized", "quantized_real"):
        nets[name] = common.net(
            args.teacher, width=args.teacher_width, rules=args.bits, init_from="teacher"
        )
    taught = dict(kd=common.kd("teacher", temperature=args.temperature))
    if not args.teacher_from:
        stages["teach"] = train("teacher", dict(ce=common.ce()))
    stages["student_real"] = train("student_real", taught)
    for maker in makers:
        stages[maker] = make(maker)
        stages[f"student_{maker}"] = train(f"student_{maker}", taught, images=maker)
    stages["zeroq"] = make("zeroq")
    count = min(args.calibration, examples)
    stages["calibrate"] = common.calibrate("quantized", images="zeroq", examples=count)
    stages["calibrate_real"] = common.calibrate("quantized_real", examples=count)
    methods = {f"student_{maker}": METHODS[maker] for maker in makers}
    stages["evaluate"] = common.evaluate(
        "teacher",
        teacher="labels",
        student_real="teacher on real images",
        **methods,
        quantized="calibrated on ZeroQ's images",
        quantized_real="calibrated on real images",
    )
    return common.finish(config, stages)
