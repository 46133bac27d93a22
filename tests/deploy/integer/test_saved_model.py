"""model.safetensors + model.json: the same logits in a fresh process, small, and never trusted."""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets
from mutation import COUNT, accepted

from qkd_jax import data, deploy, models
from qkd_jax.deploy import Description, convert, integer_apply
from qkd_jax.deploy.integer.operations import OPERATIONS, attributes, parameters, primitive
from qkd_jax.deploy.integer.serial import STRUCTURES, decode, encode
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, inspection, presets, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.weights.files import parse_safetensors, safetensors_bytes

FRESH = """
import sys
import numpy as np
from qkd_jax import deploy
assert not any(name.startswith("test_") or name == "small_nets" for name in sys.modules)
integer = deploy.load(sys.argv[1])
np.save(sys.argv[3], deploy.integer_apply(integer, np.load(sys.argv[2])))
"""


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        x = nn.relu(nn.Conv(4, (1, 1), name="body")(x)).reshape(x.shape[0], -1)
        return {"logits": nn.Dense(3, name="head")(x)}


DESCRIPTION = Description((4, 4, 1), (0.5,), (0.25,), ("a", "b", "c"))


def tiny():
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    rules = [
        Rule("stem|head", weight=Spec(8), input=Spec(8)),
        Rule("body", weight=Spec(2, granularity="channel"), input=Spec(2, signed=False)),
    ]
    net, variables = small_nets.calibrated(Tiny(), rules, images)
    return convert(net, variables, images), images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    integer, images = tiny()
    deploy.save(integer, folder, description=DESCRIPTION)
    return folder, integer, images


def files(folder):
    return (folder / "model.safetensors").read_bytes(), (folder / "model.json").read_text()


def sealed(folder, body, tensors):
    """Writes files whose hashes are right, whatever is in them."""
    body = {k: v for k, v in body.items() if k != "tensors"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    content = safetensors_bytes(tensors, {"json": hashlib.sha256(text.encode()).hexdigest()})
    body["tensors"] = {"sha256": hashlib.sha256(content).hexdigest()}
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "model.json").write_text(json.dumps(body))
    return folder


def test_a_fresh_process_computes_the_same_bits(saved, tmp_path):
    folder, integer, images = saved
    mixed = convert(*small_nets.case("w2a2"))
    deploy.save(mixed, tmp_path / "mixed")
    inputs = {folder: images[:5], tmp_path / "mixed": small_nets.images(5)}
    for where, model in ((folder, integer), (tmp_path / "mixed", mixed)):
        np.save(tmp_path / "images.npy", inputs[where])
        out = tmp_path / "logits.npy"
        if model is integer:  # its result is a dict
            loaded = deploy.load(where)
            found = integer_apply(loaded, images[:5])["logits"]
            np.testing.assert_array_equal(found, integer_apply(model, images[:5])["logits"])
            continue
        command = [sys.executable, "-c", FRESH, where, tmp_path / "images.npy", out]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        np.testing.assert_array_equal(np.load(out), integer_apply(model, inputs[where]))


def test_what_is_loaded_is_what_was_saved(saved, tmp_path):
    folder, integer, _ = saved
    loaded = deploy.load(folder)
    assert set(loaded.arrays) == set(integer.arrays)
    for name, array in integer.arrays.items():
        assert loaded.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[name], array)
    assert loaded.report() == integer.report()
    assert deploy.describe(folder) == DESCRIPTION
    sizes = deploy.save(loaded, tmp_path, description=DESCRIPTION)  # and again the same bytes
    assert files(tmp_path) == files(folder)
    assert sizes == {f.name: f.stat().st_size for f in tmp_path.iterdir()}
    deploy.save(loaded, tmp_path)
    assert deploy.describe(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 20])
def test_the_file_is_as_small_as_its_rules_imply(depth, tmp_path):
    """Counted: weights at their rule's bits, float32 multiplier and bias of every output channel,
    float32 parameters of every quantizer of an input; on the other side the whole file."""
    net = quantize(models.create(f"resnet{depth}", 10, width=16), presets.rules("w2a2"))
    images = np.random.default_rng(0).normal(size=(4, 12, 12, 1)).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    variables = calibrate(net, small_nets.trained_like(shapes), [images], observer="minmax")
    implied = 0
    layers = inspection.layers(net, variables, images, train=False)
    for layer in layers:
        ends = layer.path in ("stem", "head")
        assert layer.weight.bits == (8 if ends else 2)
        implied += layer.weight.bits * math.prod(layer.weight_shape)
        implied += 64 * layer.weight_shape[-1]
        implied += 32 * (2 if layer.input.quantizer == "uniform" else 1)
    sizes = deploy.save(convert(net, variables, images), tmp_path)
    ratio = sizes["model.safetensors"] / (implied / 8)
    print(f"\nresnet{depth}: {sizes}, implied {implied // 8:,} bytes, ratio {ratio:.4f}")
    assert len(layers) == (10 if depth == 8 else 22) and ratio <= 1.05


class Pooled(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_integer_only_nets_are_files_too(tmp_path):
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    rules = presets.rules("w8a8:integer", model=Pooled(), images=images)
    net, variables = small_nets.calibrated(Pooled(), rules, images)
    integer = convert(net, variables, images, integer_only=True)
    deploy.save(integer, tmp_path)
    loaded = deploy.load(tmp_path)
    kinds = [type(step) for step in loaded.program.steps]
    assert kinds == [type(step) for step in integer.program.steps]
    assert {"Encode", "Rescale", "Decode"} <= {kind.__name__ for kind in kinds}
    np.testing.assert_array_equal(integer_apply(loaded, images), integer_apply(integer, images))


def test_every_kind_of_step_can_be_saved():
    from qkd_jax.deploy.integer import program

    kinds = [k for k in vars(program).values() if dataclasses.is_dataclass(k)]
    ours = [k for k in kinds if k.__module__ == program.__name__ and k is not program.IntegerModel]
    assert len(ours) > 5 and set(ours) <= set(STRUCTURES.values())


def test_damage_is_named_with_its_file_and_repair(saved, tmp_path):
    folder, _, _ = saved
    tensors, text = files(folder)
    body = json.loads(text)

    def refused(match, *, content=tensors, json_text=text):
        (tmp_path / "model.safetensors").write_bytes(content)
        (tmp_path / "model.json").write_text(json_text)
        with pytest.raises(ValueError, match=match):
            deploy.load(tmp_path)

    refused(r"model\.safetensors is no file to rely on", content=tensors[:-3])
    refused(r"model\.json is no file to rely on.*export the model again", json_text=text[:-9])
    refused("not of one export, or one was changed", content=tensors[:-1] + b"\7")
    refused("not of one export", json_text=text.replace('"op":"max"', '"op":"min"', 1))
    refused("has version 9, and this qkd_jax reads", json_text=text.replace('n":2', 'n":9', 1))
    refused("its format is not", json_text="[]")
    refused("model.json is no file", json_text="[" * 100_000)
    refused("its fields are", json_text=json.dumps(body | {"more": 1}))
    (tmp_path / "model.json").write_text(text)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        deploy.load(tmp_path)
    with pytest.raises(ValueError, match="is no folder of a saved model"):
        deploy.load(tmp_path / "nowhere")
    # A file name in the JSON is no path that anything is read from.
    bad = body | {"tensors": body["tensors"] | {"file": "../../etc/passwd"}}
    refused("not of one export", json_text=json.dumps(bad))


def change(body, *keys, to):
    body = copy.deepcopy(body)
    at = body
    for key in keys[:-1]:
        at = at[key]
    assert at.get(keys[-1]) != to if isinstance(at, dict) else at[keys[-1]] != to
    at[keys[-1]] = to
    return body


@pytest.mark.parametrize(
    ("keys", "to", "match"),
    [
        (("outputs", 0, "shape"), ["batch", 4], "its results are"),
        (("arrays", "head/weight", "shape"), [12, 4], "the weight 'head/weight' is int8"),
        (("arrays", "head/weight", "shape"), [3, 16], "the weight 'head/weight' is int8"),
        (("arrays", "head/weight", "dtype"), "uint8", "array 'head/weight' is uint8"),
        (("arrays", "head/weight", "dtype"), "object", "dtype is 'object'"),
        (("arrays", "head/weight", "start"), -1, "array 'head/weight' is"),
        (("arrays", "head/weight", "tensor"), "../x", "which is not there"),
        (("arrays", "head/weight", "shape"), [10**9, 10**9], "array 'head/weight' is"),
        (("program", "steps", 1, "shape"), [10**6, 10**6], "the weight 'stem/weight' is"),
        (("program", "steps", 1, "key"), "nowhere", "does not fit together"),
        (("program", "steps", 0, "input"), 12345, "does not fit together"),
        (("program", "steps", 0, "input"), "5", "input of a quantize is '5'"),
        (("program", "steps", 0, "is"), "eval", "unknown kind of object 'eval'"),
        (("program", "steps", 0, "spec", "quantizer"), "__import__", "does not fit together"),
        (("program", "steps", 0, "spec", "bits"), 99, "bits is 99"),
        (("program", "steps", 3, "op"), "infeed", "unknown operation 'infeed'"),
        (("program", "steps", 10, "inputs"), [26], "reshapes"),
        (("program", "signature", 0, "shape"), [1009, 4, 4, 2], "does not fit together"),
        (("program", "signature", 0, "shape"), [1009, 10**7, 10**7, 1], "fit|elements"),
        (("program", "out_tree", "of"), {"logits": 1}, "leaves of a tree"),
        (("program", "is"), "map", "a map has the fields"),
        (("description",), None, ""),
    ],
)
def test_a_sealed_lie_is_found_out(keys, to, match, saved, tmp_path):
    content, text = files(saved[0])
    tensors, _ = parse_safetensors(content, "x")
    folder = sealed(tmp_path / "x", change(json.loads(text), *keys, to=to), tensors)
    if not match:
        assert deploy.load(folder).nbytes == saved[1].nbytes
        return
    with pytest.raises(ValueError, match=match) as caught:
        deploy.load(folder)
    assert "model.json is no file to rely on" in str(caught.value)


def leaves(tree, path=()):
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            yield from leaves(value, (*path, key))


def test_a_number_does_not_decide_how_much_memory_is_taken(saved, tmp_path):
    """A padding of a million in a small file: refused before anything is computed."""
    content, text = files(saved[0])
    tensors, _ = parse_safetensors(content, "x")
    body = json.loads(text)
    del body["tensors"]
    padded = 0
    for place in list(leaves(body)):
        if place[-1] == "padding":
            changed = copy.deepcopy(body)
            at = changed
            for key in place[:-1]:
                at = at[key]
            if not isinstance(at["padding"], list) or not at["padding"]:
                continue
            at["padding"][0] = [10**6] * len(at["padding"][0])
            sealed(tmp_path, changed, tensors)
            with pytest.raises(ValueError, match=r"elements an example|does not fit together"):
                deploy.load(tmp_path)
            padded += 1
    assert padded


WINDOW = {
    "window_dimensions": [1, 1, 1, 1],
    "window_strides": [1, 1, 1, 1],
    "padding": [[0, 0]] * 4,
    "base_dilation": [1, 1, 1, 1],
    "window_dilation": [1, 1, 1, 1],
}
FAR = [[0, 0], [900, 900], [900, 900], [0, 0]]


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        (
            {"base_dilation": [1, 10**6, 10**6, 1], "window_strides": [1, 10**7, 10**7, 1]},
            "elements",
        ),
        (
            {"window_dilation": [1, 10**9, 1, 1], "padding": [[0, 0], [10**9] * 2, *FAR[:2]]},
            "fit|el",
        ),
        ({"window_dimensions": [1, 1001, 1001, 1], "padding": FAR}, "operations an example"),
        ({"padding": FAR}, ""),
    ],
)
def test_a_number_does_not_decide_how_much_is_computed(attributes, match, saved, tmp_path):
    """A window over everything at each place, and one that is spread beyond any memory."""
    content, text = files(saved[0])
    tensors, _ = parse_safetensors(content, "x")
    body = json.loads(text)
    program = body["program"]
    step = {"is": "operation", "op": "reduce_window_max", "scope": "", "outputs": [9999]}
    step |= {"inputs": [program["inputs"][0]], "attributes": {**WINDOW, **attributes}}
    program["steps"].append(step)
    folder = sealed(tmp_path / "x", body, tensors)
    if not match:
        deploy.load(folder)
        return
    with pytest.raises(ValueError, match=match):
        deploy.load(folder)


def test_many_values_of_the_allowed_size_are_too_many(saved, tmp_path):
    content, text = files(saved[0])
    tensors, _ = parse_safetensors(content, "x")
    body = json.loads(text)
    wide = {"dtype": {"is": "dtype", "name": "float32"}, "shape": [31, 2000, 2000], "dimension": 1}
    step = {"is": "operation", "op": "iota", "inputs": [], "scope": "", "attributes": wide}
    body["program"]["steps"] += [step | {"outputs": [9000 + i]} for i in range(20)]
    with pytest.raises(ValueError, match="the values of its program would have 80,"):
        deploy.load(sealed(tmp_path / "x", body, tensors))


@pytest.mark.parametrize("pieces", [10**9, 0, -1])
def test_sums_are_cut_into_no_more_pieces_than_they_have_terms(pieces, saved, tmp_path):
    content, text = files(saved[0])
    tensors, _ = parse_safetensors(content, "x")
    body = json.loads(text)
    for step in body["program"]["steps"]:
        if step["is"] == "multiply":
            step["pieces"] = pieces
    with pytest.raises(ValueError, match=f"are cut into {pieces} pieces; they must be cut into 1"):
        deploy.load(sealed(tmp_path / "x", body, tensors))


@pytest.mark.slow
def test_fuzzed_json_with_right_hashes(saved, tmp_path):
    """A changed value: refused with a ValueError, or a model of the declared shape."""
    content, text = files(saved[0])
    tensors, _ = parse_safetensors(content, "x")
    body = json.loads(text)
    del body["tensors"]
    places = list(leaves(body))
    values = [
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        10**12,
        0.5,
        float("inf"),
        "",
        "x",
        [],
        {},
        [1],
        {"is": "x"},
    ]

    def damage(_, rng):
        changed, place = copy.deepcopy(body), rng.choice(places)
        at = changed
        for key in place[:-1]:
            at = at[key]
        old = at[place[-1]]
        if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.5:
            at[place[-1]] = old + rng.choice([-1, 1, 2, 1000])
        elif rng.random() < 0.1:
            del at[place[-1]]
        else:
            at[place[-1]] = rng.choice(values)
        sealed(tmp_path, changed, tensors)
        return (tmp_path / "model.json").read_bytes()

    def read():
        deploy.describe(tmp_path)
        return deploy.load(tmp_path)

    sealed(tmp_path, body, tensors)
    taken = 0
    for model in accepted(tmp_path / "model.json", read, damage=damage, named=tmp_path):
        taken += 1
        inputs = [jax.ShapeDtypeStruct((5, *a.shape[1:]), a.dtype) for a in model.program.signature]
        out = jax.eval_shape(integer_apply, model, inputs)
        (logits,) = jax.tree.leaves(out)
        assert logits.shape == (5, 3) and logits.dtype == jnp.float32
    assert taken < COUNT / 3


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_damaged_bytes(name, saved, tmp_path):
    """Nothing that differs from what was saved is taken, but for white space."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    body = json.loads(files(saved[0])[1])
    for _ in accepted(tmp_path / name, lambda: deploy.load(tmp_path), named=tmp_path):
        assert name == "model.json"
        assert json.loads((tmp_path / name).read_text()) == body


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_every_operation_has_its_primitive(op):
    assert primitive(op).name == op
    required = {k: 1 for k, v in OPERATIONS[op].items() if type(v) is object}
    kept = {k: v for k, v in required.items() if k in parameters_or_empty(op, required)}
    assert attributes(op, parameters(op, kept), "") == kept


def parameters_or_empty(op, required):
    """The required attributes, without those that files never hold."""
    from qkd_jax.deploy.integer import operations

    return [k for k in required if OPERATIONS[op][k] is operations.REQUIRED]


def test_operations_have_the_parameters_of_this_jax():
    """What `parameters` gives is what JAX binds, on a function with the commonest operations."""
    x = jnp.ones((2, 4, 4, 3))

    def f(x):
        y = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        y = jnp.concatenate([y, jnp.pad(y[:, ::-1], ((0, 0),) * 3 + ((0, 0),))], 1)
        y = jax.nn.gelu(y, approximate=False) + jax.nn.softmax(y) * jax.nn.sigmoid(y)
        y = jnp.take(y, jnp.array([0, 1]), axis=1) ** 3 / jnp.sqrt(1 + y.var((1, 2), keepdims=True))
        y = jax.lax.conv_general_dilated(
            y, jnp.ones((1, 1, 3, 2)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jnp.where(y > 0, jnp.round(y), jnp.exp(y)).transpose(0, 3, 1, 2).reshape(2, -1)
        y = jnp.cumsum(y @ jnp.ones((y.shape[1], 5)), axis=1) + jnp.arange(5.0)[None]
        return jnp.argmax(y.astype(jnp.bfloat16), -1), jnp.split(y, [2], 1)

    from qkd_jax import graph

    nodes = graph.trace(lambda _, x: f(x), {}, x, any_batch=True).nodes
    assert len({n.op for n in nodes}) > 20
    for node in nodes:
        back = decode(json.loads(json.dumps(encode(node))))
        assert back.primitive is node.primitive and back.inputs == node.inputs
        assert back.params == {**node.params, **back.params}
        assert set(back.params) == set(node.params)


def test_what_files_cannot_hold_is_refused(tmp_path):
    class Gamma(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.lax.lgamma(nn.Dense(3, name="head")(x))

    x = jnp.ones((2, 4))
    rules = [Rule("head", weight=Spec(8), input=Spec(8))]
    net, variables = small_nets.calibrated(Gamma(), rules, x)
    with pytest.raises(ValueError, match=r"operation 'lgamma' in .* cannot be saved; a model file"):
        deploy.save(convert(net, variables, x), tmp_path)
    with pytest.raises(ValueError, match="files cannot"):
        encode({"a": object()})
    with pytest.raises(ValueError, match="which a model file cannot hold"):
        attributes("mul", {"out_dtype": jnp.float32}, "layer")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(image_shape=(4, 4)), r"must be \(height, width, channels\)"),
        (dict(image_shape=(4, 0, 1)), "image_shape's width is 0"),
        (dict(mean=(0.1, 0.2)), "a number for each of the 1"),
        (dict(std=(0.0,)), "greater than 0"),
        (dict(mean=("x",)), "must be a number"),
        (dict(classes="ab"), "one for each logit"),
    ],
)
def test_descriptions_are_checked(fields, match):
    good = dict(image_shape=(4, 4, 1), mean=(0.1,), std=(0.2,))
    with pytest.raises(ValueError, match=match):
        Description(**{**good, **fields})


def test_a_description_normalizes_as_the_data_set_does():
    dataset = data.load("synthetic", image_shape=(5, 6, 3))
    description = Description(dataset.image_shape, dataset.mean, dataset.std)
    images = dataset.test_images[:7]
    np.testing.assert_array_equal(description.normalize(images), dataset.normalize(images))
    again = Description.from_json(json.loads(json.dumps(description.to_json())))
    assert again == description
    np.testing.assert_array_equal(again.normalize(images), dataset.normalize(images))


@pytest.mark.slow
def test_integer_only_programs_and_odd_codes_are_files_too(tmp_path):
    images = np.asarray(small_nets.images(4))
    model = small_nets.Mixed()
    for place, rules in enumerate(("w8a8:integer", "w2a2:dorefa")):
        fitted = presets.rules(rules, model=model, images=images)
        net, variables = small_nets.calibrated(model, fitted, images)
        integer = convert(net, variables, images, integer_only=not place)
        deploy.save(integer, tmp_path / rules)
        loaded = deploy.load(tmp_path / rules)
        np.testing.assert_array_equal(
            integer_apply(loaded, images[:3]), integer_apply(integer, images[:3])
        )
        assert [type(s) for s in loaded.program.steps] == [type(s) for s in integer.program.steps]
    # A stride that no code has is a wrong file, not a crash.
    step = next(s for s in encode(integer.program)["steps"] if s["is"] == "weight")
    body = json.loads((tmp_path / "w2a2:dorefa" / "model.json").read_text())
    for entry in body["program"]["steps"]:
        if entry.get("key") == step["key"]:
            entry["stride"] = 0
    tensors = dict(parse_safetensors(files(tmp_path / "w2a2:dorefa")[0], "model.safetensors")[0])
    with pytest.raises(ValueError, match="stride is 0"):
        deploy.load(sealed(tmp_path / "wrong", body, tensors))
