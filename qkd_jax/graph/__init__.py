"""A model's forward pass as a small labelled graph, read from its jaxpr.

Coverage, BatchNorm folding, conversion to integers and the ONNX export all read this graph, so they
see what a model computes and not how its code is written: calls (jit, remat, custom derivatives)
are inlined, a `scan` of known length is unrolled, leaves carry their path in the variables, and
everything that depends on the variables alone is a constant. An evaluated BatchNorm is therefore
"subtract, multiply, add" by constants however the model spelled it.

Two kinds of call stay whole, because a pass wants to see them as one operation: the markers of
`families`, a quantizer and an operand that a rule leaves in float.

`Segments` is for functions that run a few times only: it runs a jaxpr piece by piece, and of equal
pieces it compiles one.

To support another call-like primitive, add its name to `INLINED`.
"""

from qkd_jax.graph.dataflow import Graph
from qkd_jax.graph.execution import INLINED, NUMPY, Node, execute
from qkd_jax.graph.families import (
    CONTRACTIONS,
    IDENTITY,
    LAYOUT,
    MARKERS,
    Axes,
    marker_name,
    output_axes,
    scale_in_output,
)
from qkd_jax.graph.segments import Segments
from qkd_jax.graph.tracing import bodies, shape_of, trace

__all__ = [
    "CONTRACTIONS",
    "IDENTITY",
    "INLINED",
    "LAYOUT",
    "MARKERS",
    "NUMPY",
    "Axes",
    "Graph",
    "Node",
    "Segments",
    "bodies",
    "execute",
    "marker_name",
    "output_axes",
    "scale_in_output",
    "shape_of",
    "trace",
]
