"""On-the-fly native ensemble (Lan et al. 2018, arXiv 1806.04606): branches teach one another.

    python launch.py --config=configs/one.py:branches=3 --workdir=runs/one
    python launch.py --config=configs/one.py:bits=w2a2 --workdir=runs/one_w2a2

The net's last stage stands `branches` times on one trunk; a gate weighs the logits of all to an
ensemble, which learns from the labels and teaches every branch, and every branch learns from the
labels. The net itself is the first branch: evaluation, size and deployment are those of the net
without the others, which have rows of their own (`student.branch1`, ..., `student.ensemble`).
`alone` takes the same steps from labels. With `bits` both learn in float first, from labels, and by
their methods as quantized nets; the other branches stay in float.

Expect, on the digits in float, seed 0: 69 s on two cores of an AMD EPYC beside other work; `alone`
96.73 % top-1, student 97.13, its ensemble 97.19. The spread over seeds was not measured.
"""

from configs import common, experiments


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `blocks` is that of a stage of the model (1 for resnet8, 3 for resnet20). `ramp` is the share of
    the stage over which the weight of the ensemble's soft labels rises: 80 of 300 epochs in the
    authors' code.
    """
    args, config = common.begin(
        arg,
        model="resnet8",
        width=8,
        bits="float",
        branches=3,
        blocks=1,
        temperature=3.0,
        ramp=80 / 300,
    )
    rising = dict(begin=0.0, end=1.0, shape="gaussian", steps=args.ramp)
    one = common.term(
        "one",
        temperature=args.temperature,
        distil=rising if args.ramp else 1.0,
        adaptor=dict(branches=args.branches, blocks=args.blocks),
    )
    return experiments.beside_labels(config, args, "native ensemble", one=one)
