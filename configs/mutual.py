"""Deep mutual learning (Zhang et al. 2017, arXiv 1706.00384): students without a teacher.

    python launch.py --config=configs/mutual.py:students=2 --workdir=runs/mutual
    python launch.py --config=configs/mutual.py:stale=50,burn_in=0.1 --workdir=runs/codistillation

Every student learns from the labels and from each of the others, all updated at once: student k's
loss is CE + 1/(n - 1) sum_l KL(p_l || p_k) at temperature 1. The paper updates the students in
turn, on fresh predictions; here a step sees one set of predictions, so all gradients are of one
moment.
With `stale` it is co-distillation (Anil et al. 2018, arXiv 1804.03235): each learns from copies of
the others, in evaluation mode, that are refreshed every `stale` steps, as if they came over a slow
network; with `burn_in` (steps, or below 1 a fraction of the stage) only from then on. The paper
compares with the mean of the others' predictions, which gives the same gradient as the mean of the
divergences; its nets see different parts of the data, these the same batches.

`alone` is the control: the same net, batches and steps with the labels only. With `bits` the
students, and the control, are quantized after a float start and learn from one another as such.

Expect, on the digits in float, seed 0: 55 s on two cores of an AMD EPYC beside other work; `alone`
96.73 % top-1, students 98.26 and 97.19, both together 98.33. The spread over seeds was not
measured.
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below. `widths` may differ: "8+16"."""
    args, config = common.begin(
        arg, model="resnet8", students=2, stale=0, burn_in=0.0, widths="8", bits="float"
    )
    if args.students < 2:
        raise ValueError(f"students is {args.students}; mutual learning needs at least 2.")
    widths = [int(w) for w in args.widths.split("+")]
    if len(widths) not in (1, args.students):
        raise ValueError(
            f"widths is {args.widths!r} for {args.students} students; give one width, or one each "
            "with + between them."
        )
    widths = widths * (1 if len(widths) == args.students else args.students)
    peers = [f"student{k}" for k in range(args.students)]
    # The control starts from the first student's weights.
    config.nets.alone = common.net(args.model, width=widths[0], rules=args.bits)
    for name, width in zip(peers, widths, strict=True):
        config.nets[name] = common.net(args.model, width=width, rules=args.bits)
    config.nets[peers[0]].init_from = "alone"

    def from_others(name):
        share = 1.0 / (args.students - 1)
        others = [other for other in peers if other != name]
        return {
            f"from_{other}": common.term("dml", other, share, start=args.burn_in)
            for other in others
        }

    labels = dict(ce=common.ce())
    mutual = {name: labels | from_others(name) for name in peers}
    stages = {}
    if args.bits != "float":
        learners = dict.fromkeys(["alone", *peers[1:]], labels)
        stages["start"] = common.train_by_recipe(args, learners)
        stages["calibrate"] = common.calibrate("alone", *peers)
    # The peers first: `student0` copies `alone` at the moment at which it first takes part.
    stages["mutual"] = common.train_by_recipe(args, mutual, bits=args.bits, stale=args.stale)
    stages["alone"] = common.train_by_recipe(args, dict(alone=labels), bits=args.bits)
    method = "co-distillation" if args.stale else "mutual learning"
    rows = common.evaluate(alone="labels alone", **dict.fromkeys(peers, method))
    stages["evaluate"] = rows | dict(ensembles=dict(peers=tuple(peers)))
    return common.finish(config, stages)
