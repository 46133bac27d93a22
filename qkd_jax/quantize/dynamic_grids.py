"""Grids of activations whose ranges are found at run time, for what reads codes."""

import math

import jax.numpy as jnp
import numpy as np

from qkd_jax.graph import Node
from qkd_jax.numerics import IntFormat
from qkd_jax.quantize.traced import Operand, TracedNet, named, not_uniform, own_axes, refuse_groups
from qkd_jax.quantizers import QUANTIZERS, dynamic_params, facts


def dynamic_grid(traced: TracedNet, marker: Node) -> tuple[IntFormat, tuple[int, ...]]:
    """Returns (format, axes with ranges of their own) of a quantizer with a dynamic range.

    Raises:
        ValueError: its values are not integer codes times one scale for each of the
            contraction's sums, or their zero points have no bound.
    """
    spec, where = traced.spec(marker), named(traced, marker)
    refuse_groups(where, spec)
    axes = own_axes(marker)
    params = dynamic_params(jnp.ones((1,) * len(marker.params["dynamic_axes"])), spec, axes)
    found = QUANTIZERS[spec.quantizer].integer_view(params, spec)
    if found is None:
        raise not_uniform(where)
    if not spec.symmetric and not facts(spec.quantizer).range_grid:
        raise ValueError(
            f"{where} finds an affine range at run time whose zero points have no bound, so the "
            "sums of its codes have none. Use quantizer='uniform', or symmetric=True."
        )
    return found.format, axes


def takes_out_dynamic_scales(traced: TracedNet, operand: Operand) -> bool:
    """Whether the dynamic scales of an operand are constant along each of its product's sums."""
    assert operand.marker is not None
    _, axes = dynamic_grid(traced, operand.marker)
    shape = [n if i in axes else 1 for i, n in enumerate(operand.marker_shape)]
    # Numbers that all differ stand for the scales: equal ones must meet along each sum.
    probe = np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), operand.marker_shape)
    probe = operand.moved(probe)
    summed = tuple(i for i, out in enumerate(operand.output_axes) if out is None)
    return not summed or bool(np.all(probe.max(summed) == probe.min(summed)))
