"""Margins of a teacher's pre-activations, from the BatchNorms that make them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.distillation.forward import CARRIED_NEVER, mode_arguments, pick_taps
from qkd_jax.losses import ofd_margin
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.interceptors import intercepting


def batch_norms_into(
    net: QuantizedModel, variables: Mapping[str, Any], taps: tuple[str, ...], image: tuple[int, ...]
) -> list[list[str]]:
    """Returns, for each tap, the paths of the BatchNorms whose outputs it is or is the sum of.

    The net's jaxpr is followed from the tap back through additions alone. Of a residual sum these
    are the last BatchNorm of the branch and that of a projection; an identity's input is behind an
    activation and counts as none.
    """
    paths: list[str] = []

    def run(images: jax.Array) -> Any:
        norms: list[jax.Array] = []

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
                paths.append("/".join(context.module.path))
                norms.append(out)
            return out

        with intercepting(watch):
            _, collections = net.apply(
                variables,
                images,
                mutable=list(CARRIED_NEVER),
                capture_intermediates=lambda module, method: (
                    method == "__call__" and "/".join(module.path) in taps
                ),
                **mode_arguments(net, False),
            )
        return norms, [pick_taps(collections, taps)[tap] for tap in taps]

    images = jax.ShapeDtypeStruct((1, *image), np.float32)
    program = jax.make_jaxpr(run)(images).jaxpr
    ends, starts = (
        program.outvars[len(paths) :],
        dict(zip(program.outvars[: len(paths)], paths, strict=True)),
    )
    made_by = {out: eqn for eqn in program.eqns for out in eqn.outvars}

    def back(var: Any) -> list[str]:
        if var in starts:
            return [starts[var]]
        made = made_by.get(var) if not hasattr(var, "val") else None
        if made is None or made.primitive.name not in ("add", "add_any"):
            return []
        return [
            path for operand in made.invars if not hasattr(operand, "val") for path in back(operand)
        ]

    return [back(end) for end in ends]


def teacher_margins(
    margins: Mapping[str, jax.Array],
    net: QuantizedModel,
    variables: Mapping[str, Any],
    taps: tuple[str, ...],
    image: tuple[int, ...],
    *,
    fixed: bool = False,
) -> dict[str, jax.Array]:
    """Returns {"margin0": [channels], ...}: `ofd_margin` of each tap.

    The outputs of several BatchNorms that are added count as independent: means and variances add.
    The authors' code takes the one of the branch alone.

    Args:
        margins: of the same form, for taps into which no BatchNorm leads.
        net: the teacher.
        variables: its variables.
        taps: of the teacher.
        image: (height, width, channels).
        fixed: whether a tap may keep its entry of `margins`.

    Raises:
        ValueError: no BatchNorm leads into a tap, and it may not keep its entry of `margins`.
    """
    updated = dict(margins)
    for index, norms in enumerate(batch_norms_into(net, variables, taps, image)):
        if not norms and not fixed:
            raise ValueError(
                f"no BatchNorm leads into tap {taps[index]!r} of the teacher, so its channels have "
                "no margin; name taps that BatchNorms make (teacher_taps, which may be modules), "
                "or give one margin for all: adaptor=dict(margin=-0.5)."
            )
        mean = variance = jnp.zeros_like(margins[f"margin{index}"])
        for path in norms:
            params = variables["params"]
            for part in path.split("/"):
                params = params[part]
            mean = mean + params.get("bias", jnp.zeros_like(mean))
            variance = variance + jnp.square(params.get("scale", jnp.ones_like(mean)))
        if norms:
            updated[f"margin{index}"] = ofd_margin(mean, jnp.sqrt(variance))
    return updated
