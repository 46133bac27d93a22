"""The tables of LiteRT's operations against the kernels that the interpreter has."""

import pytest

from qkd_jax.deploy.litert import real_elementwise as elementwise
from qkd_jax.deploy.litert.flat_file import FileTensor, Operation, Program, flat_bytes
from qkd_jax.deploy.litert.op_table import OPTIONS, VERSIONS

package = pytest.importorskip("ai_edge_litert.interpreter", reason="needs ai-edge-litert")

PRODUCTS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}
NAMED = {*elementwise.UNARY.values(), *elementwise.BINARY.values(), *elementwise.CLAMPS.values()}
WRITTEN = sorted(NAMED.union(OPTIONS, VERSIONS) - PRODUCTS)


@pytest.mark.parametrize("op", WRITTEN)
def test_an_operation_has_a_kernel_of_its_version(op):
    """An interpreter that lacks a version says so before it looks at anything else."""
    for dtype in ("float32", *VERSIONS.get(op, {})):
        x, y = FileTensor("x", (2, 2), dtype), FileTensor("y", (2, 2), dtype)
        data = flat_bytes(Program([x], [y], [Operation(op, [x], [y])]), {})
        try:
            package.Interpreter(model_content=data)
        except (ValueError, RuntimeError) as error:
            assert "Didn't find op" not in str(error)
