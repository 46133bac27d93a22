"""Dynamic quantization of a trained float net: weights ahead of time, input ranges at run time.

    python launch.py --config=configs/dynamic.py --workdir=runs/dynamic

Every row of an input (every image, for a convolution) has its own range, so no calibration data
decide anything. The integer model and the ONNX file compute the same ranges.

Expect, on the digits, seed 0: 42 s on two cores of an AMD EPYC beside other work; W8A8 97.86 %
top-1, as the float net. The spread over seeds was not measured.
"""

from configs import common, experiments


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `granularity` is that of the weights: "channel", "tensor" or a group size;
    `init_from` a trained net (see `common.net`) in place of training one.
    """
    args, config = common.begin(
        arg, model="resnet8", width=8, bits="w8a8", granularity="channel", init_from=""
    )
    return experiments.without_training(
        config,
        args,
        f"{args.bits}:dynamic:{args.granularity}",
        "dynamic",
        # The weights' scales; of the images only the shape is used.
        calibration=common.calibrate("net", examples=1),
    )
