"""The table of engines against the engines, and rules against the table."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax import ptq, quantize
from qkd_jax.deploy import kernel_report, onnx_session, openvino_model, to_onnx
from qkd_jax.distillation.taps import DataShape
from qkd_jax.experiment.settings import build_net
from qkd_jax.models import create
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets, targets
from qkd_jax.quantize.targets import TARGETS

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
    wide = (Rule(".*", weight=Spec(8, narrow_range=False), input=A8),)
    (fitted,) = targets.fit(wide, "litert")
    assert fitted.weight.format.narrow_range and fitted.input == A8
    signed = (Rule(".*", input=Spec(8)), Rule(".*", input=Spec(16, signed=False, symmetric=False)))
    fitted = [rule.input for rule in targets.fit(signed, "litert")]
    assert [(s.signed, s.symmetric, s.format.narrow_range) for s in fitted] == [
        (True, True, False)
    ] * 2
    targets.check([Rule(".*", input=s) for s in fitted], "litert")


@pytest.mark.parametrize("preset", ["w8a8", "w8a8:integer", "w8a8:fused", "w8a8:static"])
def test_presets_fit_an_engine_of_symmetric_activations(preset):
    model = create("resnet8", 5, width=4)
    images = np.zeros((1, 8, 8, 3), np.float32)
    rules = presets.rules(preset, model=model, images=images)
    with pytest.raises(ValueError, match=r"affine|unsigned"):
        targets.check(rules, "tensorrt")
    fitted = targets.fit(rules, "tensorrt")
    targets.check(fitted, "tensorrt")
    assert [rule.pattern for rule in fitted] == [rule.pattern for rule in rules]
    assert [rule.weight for rule in fitted] == [rule.weight for rule in rules]


@pytest.mark.parametrize(
    ("target", "rule", "message"),
    [
        ("tensorrt", Rule("a", weight=W8, input=A8), r"\('a'\).input is affine; tensorrt takes"),
        ("tensorrt", Rule("a", weight=W8, output=Spec(8, signed=False)), "output is unsigned"),
        ("tensorrt", Rule("a", weight=Spec(4), input=Spec(8)), "4 bits; tensorrt takes 8"),
        ("litert", Rule("a", weight=Spec(9), input=A8), "weight has 9 bits; litert takes 2, 3"),
        ("litert", Rule("a", input=Spec(12)), "input has 12 bits; litert takes 2, 3"),
        (
            "litert",
            Rule("a", input=Spec(16, symmetric=False)),
            "affine; litert takes signed activations of 16 bits",
        ),
        ("litert", Rule("a", weight=Spec(8, symmetric=False), input=A8), "affine; litert takes"),
        ("litert", Rule("a", weight=Spec(8, narrow_range=False)), "narrow_range=False; litert"),
        ("tensorrt", Rule("a", weight=Spec(8, granularity=32)), "granularity 32; tensorrt takes"),
        ("onnxruntime-x86", Rule("a", weight=Spec(12)), "12 bits; onnxruntime-x86 takes"),
        (
            "openvino-cpu",
            Rule("a", weight=Spec(7), input=Spec(8, dynamic=True, granularity="token")),
            "input finds its range at run time",
        ),
        ("litert", Rule("a", weight=Spec(4, quantizer="codebook")), "'uniform' with 4 bits"),
        (
            "openvino-cpu",
            Rule("a", input=Spec(8, quantizer="float", dynamic=True, granularity="token")),
            "grid is not uniform",
        ),
        ("onnxruntime-x86", Rule("a", weight=Spec(9, granularity=32)), "The nearest is 8"),
        ("onnxruntime", Rule("a"), "target 'onnxruntime'.*onnxruntime-x86"),
    ],
)  # fmt: skip
def test_rules_that_an_engine_cannot_run_are_named(target, rule, message):
    with pytest.raises(ValueError, match=message):
        targets.check([rule], target)


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-cpu-vnni"])
def test_engines_take_groups_and_codes_of_no_uniform_grid(target):
    weights = (
        Spec(4, granularity=32),
        Spec(4, granularity=32, signed=False, symmetric=False),
        Spec(4, quantizer="codebook", granularity=64),
        Spec(8, quantizer="float", granularity="channel"),
    )
    rules = [Rule(".*", weight=weight) for weight in weights]
    targets.check([*rules, Rule("a", input=Spec(8, quantizer="float"))], target)


@pytest.mark.parametrize(
    ("target", "refused"),
    [("onnxruntime-x86", "blocks of 32"), ("openvino-cpu", "finds its range at run time")],
)
def test_engines_take_inputs_in_blocks_of_rounded_scales(target, refused):
    mx = Spec(8, granularity=32, dynamic=True, options={"scale_format": "e8m0"})
    nv = Spec(
        4, quantizer="float", granularity=16, dynamic=True, options={"scale_format": "e4m3fn"}
    )
    targets.check([Rule("a", input=mx), Rule("b", input=nv)], target)
    plain = dataclasses.replace(mx, options={})
    with pytest.raises(ValueError, match=refused):
        targets.check([Rule("a", input=plain)], target)


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
    sums = [node.input for node in graph.node if node.op_type in ("Add", "Sub")]
    added = {a: stored[b] for pair in sums for a, b in (pair, pair[::-1]) if b in stored}
    farthest = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            scales = [stored[makers[name].input[1]].astype(np.float64) for name in node.input[:2]]
            # Without a target biases stand behind their products, where no engine rounds them.
            assert len(node.input) == (2 if target is None else 3)
            bias = added[node.output[0]] if target is None else stored[node.input[2]]
            units = bias.reshape(-1) / (scales[0] * scales[1])
            farthest.append(np.abs(units - np.round(units)).max())
    assert len(farthest) == 6
    # float32 holds biases of some 10,000 units to a thousandth of a unit
    assert max(farthest) < 2e-2 if rounded else min(farthest) > 0.1


def test_a_config_that_names_a_target_gets_rules_that_fit():
    fields = {"model": "mlp", "hidden": (8,), "rules": "w8a8"}
    net = build_net("student", fields, {}, DATA, 3, "openvino-cpu")
    assert {rule.weight.bits for rule in net.rules if rule.weight} == {7}
    net = build_net("student", fields, {}, DATA, 3, "tensorrt")
    assert all(rule.input.signed and rule.input.symmetric for rule in net.rules if rule.input)
    fields["rules"] = "w4a4"
    with pytest.raises(ValueError, match=r"nets.student: rules\[.*4 bits; tensorrt takes 8"):
        build_net("student", fields, {}, DATA, 3, "tensorrt")


@pytest.fixture(scope="module")
def integer_net():
    model = create("resnet8", 5, width=4)
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    rules = targets.fit(presets.rules("w8a8:integer", model=model, images=images), "openvino-cpu")
    return *small_nets.calibrated(model, rules, images), images


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-cpu"])
def test_every_product_of_a_requantizing_net_runs_on_integers(tmp_path, integer_net, target):
    engine = TARGETS[target].engine
    pytest.importorskip(engine)
    net, variables, images = integer_net
    written = to_onnx(net, variables, images, tmp_path / "m.onnx", target=target)
    found = kernel_report(written.path, engine)
    assert found.share == 1 and len(found.integer) == 10 and not found.floating
    floats = {k: v for k, v in variables.items() if k != "quant"}
    plain = to_onnx(net, floats, images, tmp_path / "f.onnx")
    found = kernel_report(plain.path, engine)
    assert found.share == 0 and len(found.floating) == 10


@pytest.mark.slow
def test_the_type_of_activations_changes_no_grid(tmp_path, integer_net):
    onnx = pytest.importorskip("onnx")
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


class One(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, name="one")(x)


@pytest.mark.parametrize("zero_point", [None, 37])
def test_openvino_rounds_the_number_that_the_net_rounds(tmp_path, zero_point):
    """Values a last bit from the middle of two codes: with the lowest code added it is lost."""
    pytest.importorskip("openvino")
    spec = Spec(8) if zero_point is None else Spec(8, signed=False, symmetric=False)
    rules = [Rule("one", weight=Spec(8), input=spec)]
    codes = np.arange(-30, 60)
    towards_zero = np.nextafter(np.float32(codes + 0.5), np.float32(0))
    x = np.concatenate([towards_zero, np.nextafter(np.float32(codes + 0.5), np.float32(99))])
    x = np.float32(x[:, None]) / 32
    net, variables = small_nets.calibrated(One(), rules, x)
    variables["params"]["one"]["kernel"] = jnp.ones((1, 1))
    variables["quant"]["one"]["weight_quantizer"]["scale"] = jnp.asarray(1 / 64)
    quantizer = variables["quant"]["one"]["input_quantizer"]
    quantizer["scale"] = jnp.asarray(1 / 32)
    if zero_point is not None:
        quantizer["zero_point"] = jnp.asarray(float(zero_point))
    wanted = np.rint(x.astype(np.float64) * 32)
    right = {}
    for target in ("openvino-cpu-vnni", None):
        path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
        right[target] = np.mean(np.rint(openvino_model(path)(x)[0] * 32) == wanted)
    # Where the second is 1 too, the engine rounds as ONNX says, and the column can go.
    assert right["openvino-cpu-vnni"] == 1 and right[None] < 1


@pytest.fixture(scope="module")
def transformer():
    model = create("vit", 5, depth=1, width=16, heads=2)
    images = jax.random.normal(jax.random.key(1), (32, 8, 8, 1))
    rules = presets.rules("w8a8:integer", model=model, images=images)
    net, variables = small_nets.calibrated(model, rules, images)
    return net, variables, images, np.asarray(jax.jit(net.apply)(variables, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"target": "onnxruntime-x86-vnni"},
        {"target": "openvino-cpu-vnni"},
        {"target": "tensorrt"},
        {"target": "openvino-cpu-vnni", "activations": "int8"},
        {"target": "onnxruntime-x86-vnni", "activations": "own"},
    ],
)
def test_both_engines_open_the_transformer_of_every_target(tmp_path, transformer, options):
    pytest.importorskip("openvino")
    net, variables, images, wanted = transformer
    path = to_onnx(net, variables, images, tmp_path / "m.onnx", **options).path
    given = np.moveaxis(np.asarray(images), -1, 1)
    for found in (
        onnx_session(path).run(None, {"images": given})[0],
        openvino_model(path)(given)[0],
    ):
        assert np.mean(np.abs(found - wanted)) < 0.01 * np.abs(wanted).max()


def test_the_opset_of_a_target_is_raised_where_a_type_needs_it(tmp_path):
    onnx = pytest.importorskip("onnx")
    x = np.ones((2, 1), np.float32)
    opset = {}
    for bits in (8, 12):
        net, variables = small_nets.calibrated(
            One(), [Rule("one", weight=Spec(4), input=Spec(bits))], x
        )
        for int4 in (False, True):
            target = "onnxruntime-x86-vnni"
            written = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target, int4=int4)
            opset[bits, int4] = onnx.load(written.path).opset_import[0].version
    assert opset == {(8, False): 20, (8, True): 21, (12, False): 20, (12, True): 21}


def test_stablehlo_targets_take_no_onnx(tmp_path):
    net, variables, images = small_nets.case("w2a2")
    with pytest.raises(ValueError, match="target is 'xla', which takes stablehlo"):
        to_onnx(net, variables, images, tmp_path / "m.onnx", target="xla")
    assert dataclasses.asdict(TARGETS["xla"])["file"] == "stablehlo"


@pytest.mark.slow
def test_sums_of_grids_are_not_fused_for_an_engine_that_leaves_the_grid_out(tmp_path, integer_net):
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
        nodes = {name: node for node in onnx.load(path).graph.node for name in node.output}
        clips = [node for node in nodes.values() if node.op_type == "Clip"]
        assert all(nodes[node.input[0]].op_type == "Round" for node in clips)
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
