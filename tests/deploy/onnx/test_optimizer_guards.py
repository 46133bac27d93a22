"""What ONNX Runtime's optimizer would round in a file: biases, float weights, grids in a row."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import kernel_report, onnx_session, to_onnx
from qkd_jax.numerics import Spec
from qkd_jax.ptq import integer_bias
from qkd_jax.quantize import Rule

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

WEIGHT = Spec(8, granularity="channel")


class Biased(nn.Module):
    """Convolutions, stretched and not, and dense layers of two ranks: with biases and no norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.silu(nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="up")(x))
        x = nn.silu(nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="grouped")(x))
        x = nn.silu(nn.Dense(8, name="pixels")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


RULES = (
    Rule("conv", weight=WEIGHT, input=Spec(8), output=Spec(8, symmetric=False)),
    Rule(".*", weight=WEIGHT, input=Spec(8, symmetric=False)),
)


@pytest.fixture(scope="module")
def biased():
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    return *small_nets.calibrated(Biased(), RULES, x), x


def fed(x):
    return {"images": np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))}


def plain_session(path):
    """A session as other programs open it: every optimization on, and no sums of 16 bits."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def gaps(found, wanted):
    """Differences between logits, as shares of the largest one."""
    return np.abs(found - np.asarray(wanted)) / np.abs(wanted).max()


@pytest.mark.parametrize("session", [onnx_session, plain_session])
def test_the_file_of_no_target_is_the_trained_net(biased, tmp_path, session):
    net, variables, x = biased
    path = to_onnx(net, variables, x, tmp_path / "m.onnx").path
    found = session(path).run(None, fed(x))[0]
    # A value between two codes may fall to the other side: of 80 logits a few move, by little.
    assert np.median(gaps(found, jax.jit(net.apply)(variables, x))) < 1e-6


@pytest.mark.parametrize("session", [onnx_session, plain_session])
def test_the_file_of_a_target_is_the_net_of_integer_biases(biased, tmp_path, session):
    net, variables, x = biased
    path = to_onnx(net, variables, x, tmp_path / "m.onnx", target="onnxruntime-x86-vnni").path
    found = session(path).run(None, fed(x))[0]
    wanted = jax.jit(net.apply)(integer_bias(net, variables, x), x)
    assert np.median(gaps(found, wanted)) < 1e-6


def test_a_bias_on_the_grid_of_the_sums_stays_inside_the_integer_kernel(biased, tmp_path):
    net, variables, x = biased
    rounded = integer_bias(net, variables, x)
    names = {}
    for case, given in (("trained", variables), ("rounded", rounded)):
        path = to_onnx(net, given, x, tmp_path / f"{case}.onnx").path
        nodes = onnx.load(path).graph.node
        inside = [n for n in nodes if n.op_type in ("Conv", "ConvTranspose", "Gemm")]
        assert {len(n.input) for n in inside} == {2 if case == "trained" else 3}
        names[case] = kernel_report(path, "onnxruntime").integer
    # ONNX Runtime has no convolution of integers with a float bias; dense layers need none inside.
    assert [name.partition("/")[0] for name in names["trained"]] == ["pixels", "head"]
    assert any(name.startswith("conv/") for name in names["rounded"])


def test_openvino_files_keep_their_biases_inside(biased, tmp_path):
    net, variables, x = biased
    path = to_onnx(net, variables, x, tmp_path / "m.onnx", target="openvino-cpu-vnni").path
    inside = [n for n in onnx.load(path).graph.node if n.op_type in ("Conv", "ConvTranspose")]
    assert {len(n.input) for n in inside} == {3}


def test_unquantized_products_keep_their_biases_inside(biased, tmp_path):
    net, variables, x = biased
    floats = {k: v for k, v in variables.items() if k != "quant"}
    written = to_onnx(net, floats, x, tmp_path / "m.onnx")
    assert "Add" not in written.operations or written.operations["Add"] == 1  # of "pixels"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rules", [(), (Rule(".*", weight=WEIGHT, input=Spec(8)),)])
def test_nets_of_half_precision_are_refused_before_a_file_is_written(tmp_path, dtype, rules):
    x = jax.random.normal(jax.random.key(1), (4, 6))
    model = nn.Dense(5, dtype=dtype)
    net, variables = small_nets.float_net(model, x, rules)
    if rules:
        net, variables = small_nets.calibrated(model, rules, x)
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match=f"{dtype}.*dtype=jnp.float32.*same variables"):
        to_onnx(net, variables, x, path)
    assert not path.exists()
    with pytest.raises(ValueError, match=f"images.*{dtype}"):
        to_onnx(small_nets.float_net(nn.Dense(5), x)[0], variables, x.astype(dtype), path)


class FloatBetweenGrids(nn.Module):
    """Float weights whose inputs and outputs lie on grids, pooled and not, with biases and none."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.max_pool(nn.Conv(6, (3, 3), use_bias=False, name="bare")(x), (2, 2), (2, 2))
        x = nn.ConvTranspose(6, (2, 2), name="up")(x)
        x = nn.relu(nn.Dense(8, name="wide")(x.reshape(x.shape[0], -1)))
        return nn.Dense(5, name="head")(x)


@pytest.mark.parametrize("target", [None, "onnxruntime-x86-vnni"])
def test_float_weights_between_grids_stay_float(tmp_path, target):
    x = jax.random.normal(jax.random.key(1), (16, 6, 6, 3))
    net, variables = small_nets.calibrated(
        FloatBetweenGrids(), (Rule(".*", input=Spec(8), output=Spec(8)),), x
    )
    path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
    wanted = np.asarray(jax.jit(net.apply)(variables, x))
    for session in (onnx_session, plain_session):
        found = session(path).run(None, fed(x))[0]
        assert (np.abs(found - wanted) > 1e-6).mean() < 0.05  # logits on a grid, few one code off


class GridsInARow(nn.Module):
    """A grid behind a layer and another one before the next, a pool between them or nothing."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.Conv(6, (3, 3), name="first")(x), (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), name="second")(x)
        return nn.Conv(5, (3, 3), name="third")(x).mean((1, 2))


@pytest.mark.parametrize("session", [onnx_session, plain_session])
def test_each_of_two_grids_in_a_row_rounds(tmp_path, session):
    x = jax.random.normal(jax.random.key(1), (16, 6, 6, 3))
    rules = (Rule(".*", weight=WEIGHT, input=Spec(8), output=Spec(8, symmetric=False)),)
    net, variables = small_nets.calibrated(GridsInARow(), rules, x)
    # A coarse grid behind the first layer, a fine one before the next: the first one decides.
    coarse = variables["quant"]["first"]["output_quantizer"]
    coarse["scale"] = coarse["scale"] * 8
    path = to_onnx(net, variables, x, tmp_path / "m.onnx").path
    found = session(path).run(None, fed(x))[0]
    assert np.median(gaps(found, jax.jit(net.apply)(variables, x))) < 1e-6


@pytest.mark.parametrize("target", [None, "tensorrt"])
def test_a_weight_of_codes_before_float_inputs_is_a_product_too(tmp_path, target):
    """ONNX Runtime has an operator of its own for it, MatMulNBits."""
    x = jax.random.normal(jax.random.key(1), (4, 64))
    rules = (Rule(".*", weight=WEIGHT),)
    net, variables = small_nets.calibrated(nn.Dense(10), rules, x)
    path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
    report = kernel_report(path, "onnxruntime")
    assert (len(report.integer), len(report.floating) + len(report.packed)) == (0, 1)
