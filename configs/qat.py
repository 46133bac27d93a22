"""Quantization-aware training from labels alone: float, calibrate, fine-tune, diagnose, deploy.

    python launch.py --config=configs/qat.py:bits=w4a4 --workdir=runs/qat
    python launch.py --config=configs/qat.py:progressive=8+4+2 --workdir=runs/progressive
    python launch.py --config=configs/qat.py:delay=0.3 --workdir=runs/delayed
    python launch.py --config=configs/qat.py --config.stages.qat.hygiene.net.freeze=0.04 \
        --config.stages.qat.hygiene.net.freeze_end=0.01 --workdir=runs/frozen
    python launch.py --config=configs/qat.py:quantizers=lsq+dsq,widths=w4a4+w2a2,seeds=3 --sweep \
        --workdir=runs/quantizers

`progressive` lowers the bits in rungs that share the epochs of `qat` equally. Each rung starts from
the trained weights and BatchNorm of the one before, and its quantizers are calibrated again: the
best step of b bits depends on b (fewer codes pay for a range that clips more), so one that was
learned at other bits is a worse start than one from the data.

`delay` is the share of those epochs for which the weights alone are quantized. The inputs get their
ranges then, on the activations behind quantized weights, and training continues with its momentum
and its position in the schedule.

Expect, on the digits at W2A2, seed 0: 111 s on two cores of an AMD EPYC beside other work; float
97.60 % top-1, calibrated 17.23, trained 96.06. docs/results.md has every quantizer on Fashion-MNIST
over 3 seeds, LSQ at W2A2 82.65 +- 1.18 %.
"""

from configs import common, sweeps

WIDTHS = ("w4a4", "w3a3", "w2a2")
# The widths that their papers' weights have, and those of small floats.
FIXED = {"ternary": ("w2a4",), "binary": ("w1a4",), "float": ("w8a8", "w6a6", "w4a4")}
# `quantizers` and `widths` are "+"-separated, or "all"; quantizers of `FIXED` have those of their
# widths that are named, or all. The float net is trained once for all runs of a seed.
SWEEP = dict(seeds=3, quantizers="lsq", widths="all")


def get_sweep(arg=""):
    """Returns a run for each quantizer, width and seed."""
    args, others = sweeps.split(arg, SWEEP)
    runs = by_quantizer(args.quantizers, args.widths)
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


def by_quantizer(quantizers, widths):
    """Overrides of `bits` for each of some quantizers at each of some widths."""
    from qkd_jax.quantizers import QUANTIZERS

    found = []
    for quantizer in sweeps.chosen(quantizers, QUANTIZERS):
        own = FIXED.get(quantizer, ())
        wanted = sweeps.chosen(widths, own or WIDTHS)
        for width in [w for w in own if w in wanted] or own or wanted:
            found.append(dict(bits=f"{width}:{quantizer}"))
    return found


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `progressive` is a "+"-separated list of bits, the last in place of `bits`: 4 is short for w4a4
    with the quantizer of `bits`.
    """
    args, config = common.begin(
        arg,
        model="resnet8",
        width=8,
        bits="w2a2",
        progressive="",
        delay=0.0,
        reduce_range=False,
        init_from="",
    )
    if not 0 <= args.delay < 1:
        raise ValueError(
            f"config argument delay is {args.delay}; it must be a share of the epochs, in [0, 1)."
        )
    rungs = _rungs(args.progressive, args.bits)
    names = [*("net_" + rules.partition(":")[0] for rules in rungs[:-1]), "net"]
    if len(set(names)) < len(names):
        raise ValueError(f"config argument progressive is {args.progressive!r}; name bits once.")

    def train(name, share, bits, **fields):
        learn = {name: dict(ce=common.ce())}
        return common.train_by_recipe(args, learn, share=share, bits=bits, **fields)

    stages = {}
    first = names[0]
    if not args.init_from:  # a net from elsewhere is trained already
        stages["pretrain"] = train(first, 1.0, "float")
    stages["evaluate_float"] = common.evaluate(**{first: "float"})
    source = args.init_from
    for net, rules in zip(names, rungs, strict=True):
        config.nets[net] = common.net(
            args.model,
            width=args.width,
            rules=rules,
            reduce_range=args.reduce_range,
            init_from=source,
        )
        source = net
        rung = net.removeprefix("net")  # "" for the last one
        share = 1 / len(rungs)
        if args.delay:
            stages[f"calibrate_weights{rung}"] = common.calibrate(net, operands=("weight",))
            stages[f"qat_weights{rung}"] = train(net, share * args.delay, rules)
            inputs = common.calibrate(net, operands=("input", "other", "output"))
            stages[f"calibrate_inputs{rung}"] = inputs
            rest = train(net, share * (1 - args.delay), rules, continues=f"qat_weights{rung}")
            stages[f"qat{rung}"] = rest
        else:
            stages[f"calibrate{rung}"] = common.calibrate(net)
            stages[f"evaluate_calibrated{rung}"] = common.evaluate(**{net: "calibrated"})
            stages[f"qat{rung}"] = train(net, share, rules)
        if net != "net":
            stages[f"evaluate{rung}"] = common.evaluate(**{net: "QAT"})
    stages["reestimate_bn"] = common.reestimate_bn("net")
    stages["evaluate"] = common.evaluate(net="QAT")
    stages["diagnose"] = common.diagnose("net")
    stages["deploy"] = common.deploy("net")
    return common.finish(config, stages)


def _rungs(progressive, bits):
    """Rules of each rung: "8+4" and "w2a2:dsq" give w8a8:dsq and w4a4:dsq; "" gives `bits`."""
    _, colon, quantizer = bits.partition(":")
    given = [f"w{b}a{b}" if b.isdigit() else b for b in progressive.split("+") if b]
    return [b if ":" in b else b + colon + quantizer for b in given] or [bits]
