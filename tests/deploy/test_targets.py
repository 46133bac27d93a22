"""The table of engines against the engines, and rules against the table."""

import dataclasses

import jax
import numpy as np
import pytest
import small_nets

from qkd_jax import presets, ptq, quantize
from qkd_jax.deploy import openvino_model, placed, targets, to_onnx
from qkd_jax.deploy.targets import TARGETS
from qkd_jax.experiment.settings import build_net
from qkd_jax.models import create
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule
from qkd_jax.training.taps import DataShape

DATA = DataShape((4, 4, 1), examples=8)
W8, A8 = Spec(8, granularity="channel"), Spec(8, symmetric=False)


def test_every_target_names_what_it_was_read_from():
    for name, takes in TARGETS.items():
        assert takes.sources and all(
            s.startswith(("measured", "read", "http")) for s in takes.sources
        )
        # What nothing here can run was only read, and says what is missing.
        assert bool(takes.engine) == any(s.startswith("measured") for s in takes.sources), name
        assert bool(takes.engine) != bool(takes.not_made), name


def test_the_target_chooses_the_range():
    rules = (Rule("stem", weight=W8, input=A8), Rule(".*", weight=Spec(4), input=A8))
    fitted = targets.fit(rules, "onnxruntime-x86")
    assert [r.weight.bits for r in fitted] == [7, 4]
    assert targets.fit(rules, "onnxruntime-x86-vnni") == rules
    targets.check(fitted, "onnxruntime-x86")
    with pytest.raises(ValueError, match=r"rules\[0\] \('stem'\).weight has 8 bits, whose sums"):
        targets.check(rules, "openvino-cpu")
    alone = (Rule(".*", weight=W8),)  # products of weights alone are float: nothing saturates
    assert targets.fit(alone, "onnxruntime-x86") == alone
    targets.check(alone, "onnxruntime-x86")


@pytest.mark.parametrize(
    ("target", "rule", "message"),
    [
        ("tensorrt", Rule("a", weight=W8, input=A8), r"\('a'\).input is affine; tensorrt takes"),
        ("tensorrt", Rule("a", weight=W8, output=Spec(8, signed=False)), "output is unsigned"),
        ("tensorrt", Rule("a", weight=Spec(4), input=Spec(8)), "4 bits; tensorrt takes 8"),
        ("litert", Rule("a", weight=Spec(2), input=A8), "weight has 2 bits; litert takes 8"),
        ("litert", Rule("a", weight=Spec(8, symmetric=False), input=A8), "affine; litert takes"),
        ("litert", Rule("a", weight=Spec(8, narrow_range=False)), "narrow_range=False; litert"),
        ("xla", Rule("a", weight=Spec(8, granularity=32)), "granularity 32; xla takes"),
        ("onnxruntime-x86", Rule("a", weight=Spec(12)), "12 bits; onnxruntime-x86 takes"),
        (
            "openvino-cpu",
            Rule("a", weight=Spec(7), input=Spec(8, dynamic=True, granularity="token")),
            "input finds its range at run time",
        ),
        ("xla", Rule("a", weight=Spec(4, quantizer="float")), "grid is not uniform"),
        ("onnxruntime", Rule("a"), "target 'onnxruntime'.*onnxruntime-x86"),
    ],
)  # fmt: skip
def test_rules_that_an_engine_cannot_run_are_named(target, rule, message):
    with pytest.raises(ValueError, match=message):
        targets.check([rule], target)


@pytest.mark.parametrize(
    ("target", "rounded"),
    [("onnxruntime-x86-vnni", True), ("openvino-cpu-vnni", False), (None, False)],
)
def test_files_have_integer_biases_for_engines_that_add_integers(tmp_path, target, rounded):
    onnx = pytest.importorskip("onnx")
    net, variables, images = small_nets.case("w8a8")
    graph = onnx.load(
        to_onnx(net, variables, images, tmp_path / "m.onnx", target=target).path
    ).graph
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    farthest = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            scales = [stored[makers[name].input[1]].astype(np.float64) for name in node.input[:2]]
            units = stored[node.input[2]] / (scales[0] * scales[1])
            farthest.append(np.abs(units - np.round(units)).max())
    assert len(farthest) == 6
    # float32 holds biases of some 10,000 units to a thousandth of a unit
    assert max(farthest) < 2e-2 if rounded else min(farthest) > 0.1


def test_a_config_that_names_a_target_gets_rules_that_fit():
    fields = {"model": "mlp", "hidden": (8,), "rules": "w8a8"}
    net = build_net("student", fields, {}, DATA, 3, "openvino-cpu")
    assert {rule.weight.bits for rule in net.rules if rule.weight} == {7}
    with pytest.raises(ValueError, match=r"nets.student: rules\[0\].*tensorrt"):
        build_net("student", fields, {}, DATA, 3, "tensorrt")


@pytest.fixture(scope="module")
def integer_net():
    model = create("resnet8", 5, width=4)
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    rules = targets.fit(presets.rules("w8a8:integer", model=model, images=images), "openvino-cpu")
    return *small_nets.calibrated(model, rules, images), images


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-cpu"])
def test_every_product_of_a_requantizing_net_runs_on_integers(
    tmp_path, integer_net, target, monkeypatch
):
    import sys

    # OpenVINO's telemetry forks this process, which JAX's threads do not survive for sure.
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    engine = TARGETS[target].engine
    pytest.importorskip(engine)
    net, variables, images = integer_net
    written = to_onnx(net, variables, images, tmp_path / "m.onnx", target=target)
    found = placed(written.path, engine)
    assert found.share == 1 and len(found.integer) == 10 and not found.floating
    floats = {k: v for k, v in variables.items() if k != "quant"}
    plain = to_onnx(net, floats, images, tmp_path / "f.onnx")
    found = placed(plain.path, engine)
    assert found.share == 0 and len(found.floating) == 10


@pytest.mark.slow
def test_the_type_of_activations_changes_no_grid(tmp_path, integer_net):
    onnx = pytest.importorskip("onnx")
    from qkd_jax.deploy import onnx_session

    net, variables, images = integer_net
    given = np.moveaxis(np.asarray(images), -1, 1)
    results, types = [], []
    for stored in ("uint8", "int8", "own"):
        path = to_onnx(net, variables, images, tmp_path / "m.onnx", activations=stored).path
        results.append(onnx_session(path).run(None, {"images": given})[0])
        graph = onnx.load(path).graph
        stored = {i.name: i.data_type for i in graph.initializer}
        types.append({stored[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"})
    both = {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    assert types == [{onnx.TensorProto.UINT8}, {onnx.TensorProto.INT8}, both]
    step = float(np.abs(np.diff(np.unique(results[0]))).min())  # logits lie on a grid
    for other in results[1:]:
        assert np.abs(results[0] - other).max() <= 2.01 * step


def test_stablehlo_targets_take_no_onnx(tmp_path):
    net, variables, images = small_nets.case("w2a2")
    with pytest.raises(ValueError, match="target is 'xla', which takes stablehlo"):
        to_onnx(net, variables, images, tmp_path / "m.onnx", target="xla")
    assert dataclasses.asdict(TARGETS["xla"])["file"] == "stablehlo"


@pytest.mark.slow
def test_sums_of_grids_are_not_fused_for_an_engine_that_leaves_the_grid_out(
    tmp_path, integer_net, monkeypatch
):
    import sys

    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    net, variables, images = integer_net
    deployed = ptq.integer_bias(net, variables, images)
    wanted = np.asarray(jax.jit(net.apply)(deployed, images))
    given = np.moveaxis(np.asarray(images), -1, 1)
    shares = {}
    for stored in ("uint8", None):  # as the engine fuses sums, and as the target has it
        path = to_onnx(
            net, deployed, images, tmp_path / "m.onnx", target="openvino-cpu", activations=stored
        ).path
        found = openvino_model(path)(given)[0]
        shares[stored] = float(np.mean(np.abs(found - wanted) < 1e-4 * np.abs(wanted).max()))
        grids = {n.op_type: n for n in onnx.load(path).graph.node}
        assert "Clip" not in grids
    assert shares[None] > 0.9 and shares[None] >= shares["uint8"]


def test_the_fused_preset_leaves_what_only_goes_into_a_sum_without_a_grid():
    model = create("resnet8", 5, width=4)
    images = np.zeros((1, 8, 8, 3), np.float32)
    rules = {
        kind: presets.rules(f"w8a8:{kind}", model=model, images=images)
        for kind in ("integer", "fused")
    }
    outputs = {
        kind: {
            path
            for path in ("stem_relu", "stage1_block0", "stage2_block0/bn2", "head")
            if quantize(model, given).spec_of(path, "output")
        }
        for kind, given in rules.items()
    }
    assert outputs["integer"] == {"stem_relu", "stage1_block0", "stage2_block0/bn2", "head"}
    assert outputs["fused"] == {"stem_relu", "stage1_block0"}
    with pytest.raises(ValueError, match="'w8a8:fused' depends on the model's sums"):
        presets.rules("w8a8:fused")
