"""Weight-only quantization of a trained float net: a smaller file, the same float products.

    python launch.py --config=configs/weight_only.py --workdir=runs/int8
    python launch.py --config=configs/weight_only.py:model=mlp,width=0,rules=int4_weight_only:8

The file holds codes, and a scale for each channel or group. Products run on what the codes stand
for, in float.

Expect, on the digits, seed 0: 48 s on two cores of an AMD EPYC beside other work; int8 97.86 %
top-1, as the float net. The spread over seeds was not measured.
"""

from configs import common, experiments


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `rules` is int<k>_weight_only, int<k>_weight_only:<group size>, nf4, or another preset of
    `quantize.presets`; a layer whose contraction the groups do not divide has a scale a channel.
    `init_from` is a trained net (see `common.net`) in place of training one.
    """
    args, config = common.begin(
        arg, model="resnet8", width=8, rules="int8_weight_only", init_from=""
    )
    return experiments.without_training(
        config,
        args,
        args.rules,
        "weight only",
        # The weights' scales; of the images only the shape is used.
        calibration=common.calibrate("net", examples=1),
    )
