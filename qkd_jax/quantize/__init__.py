"""Rules, how they reach a model, and what can be read from a quantized net.

student = quantize(model, [Rule("stem", weight=Spec(bits=8)), Rule(".*", weight=Spec(bits=2))])
variables = student.init(key, images)                 # float
variables = calibrate(student, variables, batches)    # adds the `quant` collection
"""

from qkd_jax.numerics import Spec
from qkd_jax.quantize.model import QuantizedModel, quantize
from qkd_jax.quantize.rules import Rule
from qkd_jax.quantize.variables import load_float

__all__ = ["QuantizedModel", "Rule", "Spec", "load_float", "quantize"]
