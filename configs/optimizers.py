"""Optimizers beside SGD for the nets of a `train` stage, with the numbers of their authors."""

from typing import Any

from configs import common


def adamw(lr: float, *, weight_decay: float, **fields: Any) -> dict[str, Any]:
    """Returns AdamW; fields are those of `common.sgd`."""
    return {**common.sgd(lr, weight_decay=weight_decay, **fields), "name": "adamw"}


def lion(
    lr: float, *, weight_decay: float, b1: float = 0.9, b2: float = 0.99, **fields: Any
) -> dict[str, Any]:
    """Returns Lion. Its rates are 3 to 10 times smaller than AdamW's, its decay as much larger."""
    return {**common.sgd(lr, weight_decay=weight_decay, b1=b1, b2=b2, **fields), "name": "lion"}


def muon(
    lr: float, *, weight_decay: float, momentum: float = 0.95, **fields: Any
) -> dict[str, Any]:
    """Returns Muon for matrices and convolutions, with Adam for the rest of the net.

    Adam trains biases, norms, embeddings, quantizers and the layers that `adam_layers` names: the
    output head, ("head",). Updates are of AdamW's size (`rms=0.2`), so that AdamW's rates fit;
    `rms=0` scales them by sqrt(max(1, out / in)), as its authors do, whose rates are about 0.02.
    """
    own = common.sgd(lr, weight_decay=weight_decay, momentum=momentum, **fields)
    return {**own, "name": "muon"}
