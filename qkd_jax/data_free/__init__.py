"""Training images made from a trained net: by inversion, or by a generator that learns.

batch_norm  what a net's BatchNorms normalise, and its distance to their statistics
inversion   images by descent to those statistics
generator   the convolutional generator; `windows` has random views of images
dafl, cmi   the methods with a generator: GENERATORS; `contrast` has CMI's losses
synthesis   what all makers of images share
"""

from collections.abc import Callable

from qkd_jax.data_free import cmi, dafl
from qkd_jax.data_free.inversion import synthesize
from qkd_jax.data_free.synthesis import Synthesis

__all__ = ["GENERATORS", "Synthesis", "synthesize"]

GENERATORS: dict[str, Callable[..., Synthesis]] = {"dafl": dafl.dafl, "cmi": cmi.cmi}
