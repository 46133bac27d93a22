"""Small, fast neural networks in JAX: quantization, distillation, and the two together.

The library's front door; runs start at `launch.py`.
"""

from qkd_jax import deploy, losses, ptq, weights
from qkd_jax.deploy import convert, integer_apply
from qkd_jax.losses import LOSSES
from qkd_jax.mixed_precision import allocate, sensitivity
from qkd_jax.models import MODELS
from qkd_jax.numerics import IntFormat, Spec
from qkd_jax.observers import OBSERVERS

# The function takes the place of its module in this namespace; `from qkd_jax.quantize import ...`
# still finds the module, and `presets` has a door of its own.
from qkd_jax.quantize import QuantizedModel, Rule, load_float, presets, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.diagnostics import diagnose
from qkd_jax.quantize.inspection import coverage, layers, size
from qkd_jax.quantize.presets import PRESETS
from qkd_jax.quantizers import QUANTIZERS

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "MODELS",
    "OBSERVERS",
    "PRESETS",
    "QUANTIZERS",
    "IntFormat",
    "QuantizedModel",
    "Rule",
    "Spec",
    "allocate",
    "calibrate",
    "convert",
    "coverage",
    "deploy",
    "diagnose",
    "integer_apply",
    "layers",
    "load_float",
    "losses",
    "presets",
    "ptq",
    "quantize",
    "sensitivity",
    "size",
    "weights",
]
