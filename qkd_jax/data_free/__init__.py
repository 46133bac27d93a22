"""Training images made from a trained net: by inversion, or by a generator that learns.

inversion  images from the statistics that a net's BatchNorms hold
generator  what the generators share
dafl, cmi  the methods with a generator: GENERATORS
"""

from collections.abc import Callable

from qkd_jax.data_free import cmi, dafl
from qkd_jax.data_free.inversion import Synthesis, synthesize

__all__ = ["GENERATORS", "Synthesis", "synthesize"]

GENERATORS: dict[str, Callable[..., Synthesis]] = {"dafl": dafl.dafl, "cmi": cmi.cmi}
