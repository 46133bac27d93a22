"""The precision in which the nets of a stage compute.

With "bfloat16" every net of a stage runs with its model's `dtype` set to bfloat16: activations and
the products of float layers are bfloat16. What is trained stays float32 (parameters, optimizers,
parameters of quantizers), and so do statistics of norms, softmax and losses. A quantizer reads the
float32 master of its weight, in float32: codes are those of a float32 stage and of `convert`, and
a product of codes is summed in float32, in which it is exact.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.quantize import QuantizedModel

COMPUTE = ("", "bfloat16")


def computing_in(compute: str, name: str, net: QuantizedModel) -> QuantizedModel:
    """Returns a net whose model computes in a precision, on the same variables.

    Args:
        compute: one of COMPUTE; "" leaves the model as it is.
        name: of the net, for messages.
        net: the net.

    Raises:
        ValueError: an unknown precision, or a model without a field `dtype`.
    """
    checks.one_of("compute", compute, COMPUTE)
    if not compute:
        return net
    if "dtype" not in _fields(net.model):
        raise ValueError(
            f"compute is {compute!r}, but the model of net {name!r}, {type(net.model).__name__}, "
            "has no field `dtype` by which its layers are told. Give it one and pass it on to them "
            "(dtype=self.dtype), or use compute=''."
        )
    return dataclasses.replace(net, model=_with_dtype(net.model, jnp.dtype(compute)))


def _with_dtype(model: nn.Module, dtype: Any) -> nn.Module:
    """A model, and the modules among its fields, with another `dtype`."""
    fields: dict[str, Any] = {
        name: _with_dtype(value, dtype)
        for name, value in _fields(model).items()
        if isinstance(value, nn.Module)
    }
    if "dtype" in _fields(model):
        fields["dtype"] = dtype
    return model.clone(**fields) if fields else model


def _fields(model: nn.Module) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(model) if field.name not in ("parent",))
    return {name: getattr(model, name) for name in names}
