"""One float net, quantized and trained by every quantizer at equal budgets: a table of results.md.

    python launch.py --sweep --workdir=runs/resnet8 --config=configs/float.py:seeds=3,\
data=fashion_mnist,model=resnet8,width=8,train_examples=10000,epochs=10
    python launch.py --sweep --workdir=runs/qat \
        --config=configs/qat_table.py:floats=runs/resnet8/seed-{seed}

A run is `configs/qat.py` from a trained float net, evaluated and not deployed. Without `floats` it
trains the float net itself, once for all quantizers of a seed.
"""

from configs import common, experiments, qat, sweeps

# As those of `configs/qat.py`.
SWEEP = dict(seeds=3, quantizers="all", widths="all")


def get_sweep(arg=""):
    """Returns a run for each quantizer, width and seed."""
    args, others = sweeps.split(arg, SWEEP)
    runs = qat.by_quantizer(args.quantizers, args.widths)
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `floats` is the folder of the float net's run; `{seed}` in it stands for the seed.
    """
    args, _ = common.begin(
        arg,
        data="fashion_mnist",
        train_examples=10_000,
        epochs=3.0,
        model="resnet8",
        width=8,
        bits="w2a2:lsq",
        floats="",
    )
    given = dict(args.items())
    floats = given.pop("floats")
    if floats:
        given["init_from"] = experiments.net_of_seed(floats, args.seed)
    return experiments.for_table(qat, given)
