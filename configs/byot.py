"""Be your own teacher (Zhang et al. 2019, arXiv 1905.08094): deep layers teach shallow ones.

    python launch.py --config=configs/byot.py --workdir=runs/byot
    python launch.py --config=configs/byot.py:bits=w2a2 --workdir=runs/byot_w2a2

A classifier on each stage but the last learns from the labels, from the net's own soft labels and
from the feature under its last classifier. They serve training alone: evaluation, size and
deployment are those of the net without them, and they have rows of their own (`student.stage1`,
..., `student.ensemble`). `alone` takes the same steps from labels. With `bits`
both learn in float first, from labels, and by their methods as quantized nets; the classifiers stay
in float.

Expect, on the digits in float, seed 0: 61 s on two cores of an AMD EPYC beside other work; `alone`
96.73 % top-1, student 96.86, its ensemble 96.39. The spread over seeds was not measured.
"""

from configs import common, experiments


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `alpha`, `temperature` and `hint` are the loss's; `deploy` exports the student.
    """
    args, config = common.begin(
        arg,
        model="resnet8",
        width=8,
        bits="float",
        alpha=0.1,
        temperature=3.0,
        hint=1.28e-4,
        deploy=False,
    )
    if args.deploy and args.bits == "float":
        raise ValueError("deploy exports integers; give bits too, such as bits=w4a4.")
    own = common.term("byot", alpha=args.alpha, temperature=args.temperature, hint=args.hint)
    return experiments.beside_labels(
        config, args, "be your own teacher", deployed=args.deploy, byot=own
    )
