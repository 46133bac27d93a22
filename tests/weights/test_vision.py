"""Nets of timm, torchvision and Hugging Face: their outputs from their files, and their sizes."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from formula_weights import fill

from qkd_jax import models, weights
from qkd_jax.models.positions import bicubic
from qkd_jax.quantize import load_float
from qkd_jax.trees import flatten
from qkd_jax.weights.files import safetensors_bytes
from qkd_jax.weights.layouts import chosen_layout
from qkd_jax.weights.other_names import LAYOUTS

GOLDEN = json.loads(pathlib.Path(__file__).parents[1].joinpath("golden", "vision.json").read_text())
SMALL = dict(patch=8, depth=2, width=32, heads=2)
NARROW = dict(blocks=(1, 1, 2, 1), widths=(8, 16, 24, 32))
# Reference -> (model, fields).
OURS = {
    "timm_vit": ("vit_tiny", SMALL),
    "timm_deit_distilled": ("deit_small_distilled", SMALL),
    "timm_dinov2": ("dinov2_small", SMALL | dict(grid=4, resampling="bicubic_antialias")),
    "timm_dinov2_registers": (
        "dinov2_small",
        SMALL | dict(grid=4, resampling="bicubic_antialias", registers=4, positions="patches"),
    ),
    "timm_dinov3": ("dinov3_small", SMALL),
    "timm_dinov3_no_bias": ("dinov3_small", SMALL | dict(biases=("out",))),
    "timm_siglip": ("siglip_base", SMALL | dict(gelu="exact")),
    "timm_convnext": ("convnext_tiny", NARROW),
    "timm_so400m": ("siglip_base", SMALL | dict(mlp_ratio=3.7362)),
    "timm_convnext_odd": ("convnext_tiny", NARROW),
    "timm_tf_mobilenet_v3_small": ("mobilenet_v3_small", dict(padding="same")),
    "timm_mobilenet_v3_small": ("mobilenet_v3_small", dict(epsilon=1e-5)),
    "timm_mobilenet_v3_large": ("mobilenet_v3_large", dict(epsilon=1e-5)),
    "hf_vit": ("vit_tiny", SMALL | dict(epsilon=1e-12)),
    "hf_ijepa": ("vit_tiny", SMALL | dict(epsilon=1e-12, pool="mean")),
    "hf_deit_distilled": ("deit_small_distilled", SMALL | dict(epsilon=1e-12)),
    "hf_dinov2": ("dinov2_small", SMALL | dict(grid=4, pool="class_mean")),
    "hf_dinov2_registers": (
        "dinov2_small",
        SMALL | dict(grid=4, pool="class_mean", registers=4, resampling="bicubic_antialias"),
    ),
    "hf_dinov3": ("dinov3_small", SMALL),
    "hf_siglip": ("siglip_base", SMALL),
    "hf_siglip_classifier": ("siglip_base", SMALL | dict(pool="mean")),
    "hf_convnext": ("convnext_tiny", NARROW | dict(head_epsilon=1e-12)),
    "torchvision_vit": ("vit_tiny", SMALL),
    "torchvision_convnext": ("convnext_tiny", dict(blocks=(1, 2, 1), widths=(8, 16, 24))),
    "torchvision_mobilenet_v3_small": ("mobilenet_v3_small", {}),
    "torchvision_mobilenet_v3_large": ("mobilenet_v3_large", {}),
}
WITHOUT_HEAD = ("hf_dinov3", "hf_siglip")  # of these the features are compared


def state_dict(name):
    shapes = GOLDEN[name]["shapes"]
    return {n: fill(n, shape, i) for i, (n, shape) in enumerate(shapes.items())}


def images_of(name):
    size, *shape = GOLDEN[name]["images"]
    images = fill("images.weight", (size, 1, *shape), 0)[:, 0] * 30
    return np.moveaxis(images, 1, -1)


def net_of(name):
    model = models.create(OURS[name][0], 5, **OURS[name][1])
    return model, jax.eval_shape(model.init, jax.random.key(0), images_of(name))


def written(name, folder, state=None):
    path = folder / f"{name}.safetensors"
    path.write_bytes(safetensors_bytes(state or state_dict(name), {"format": "pt"}))
    return path


def test_every_layout_has_a_reference():
    assert {LAYOUTS[name].title for name in LAYOUTS if name != "resnet"} == {
        chosen_layout(GOLDEN[name]["shapes"]).title for name in OURS
    }


@pytest.mark.parametrize("name", OURS)
def test_a_file_gives_the_references_output(name, tmp_path):
    model, shapes = net_of(name)
    loaded = weights.load(written(name, tmp_path), like=shapes)
    headless = name in WITHOUT_HEAD
    if headless:
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        loaded = load_float(zeros, loaded, fresh="head")
    else:
        loaded = load_float(shapes, loaded)
    apply = lambda v, x: model.apply(v, x, mutable="features")
    fast = jax.jit(apply, compiler_options={"xla_backend_optimization_level": 0})
    logits, aux = fast(loaded, images_of(name))
    found = aux["features"]["pooled"][0] if headless else logits
    wanted = np.asarray(GOLDEN[name]["output"])
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5


@pytest.mark.parametrize("name", GOLDEN["parameters"])
def test_the_published_sizes(name):
    side = 518 if name == "dinov2_small" else 224
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    model = models.create(name, 1000)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == GOLDEN["parameters"][name]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("timm_vit", dict(gelu="tanh")),
        ("timm_dinov2", dict(resampling="bicubic")),
        ("timm_dinov3", dict(epsilon=1e-6)),
        ("hf_siglip", dict(gelu="exact")),
        ("timm_tf_mobilenet_v3_small", dict(padding="equal")),
    ],
)
def test_a_field_of_another_library_is_noticed(name, fields, tmp_path):
    """What the table of the docs says makes a difference that the comparison would see."""
    model, shapes = net_of(name)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    fresh = "head" if name in WITHOUT_HEAD else ""
    loaded = load_float(zeros, weights.load(written(name, tmp_path), like=shapes), fresh=fresh)
    _, aux = model.clone(**fields).apply(loaded, images_of(name), mutable="features")
    _, own = model.apply(loaded, images_of(name), mutable="features")
    found, wanted = (np.asarray(a["features"]["pooled"][0]) for a in (aux, own))
    assert np.abs(found - wanted).max() > 2e-5 * np.abs(wanted).max()


def test_heads_have_64_channels_where_no_net_says_otherwise():
    width = 192
    state = {"blocks.0.attn.qkv.weight": np.arange(3 * width * width).reshape(3 * width, width)}
    state["blocks.0.attn.proj.weight"] = np.ones((width, width))
    found = weights.from_torch(state, "timm_vit")["params"]["block0"]["attention"]
    assert found["query"]["kernel"].shape == (width, 3, 64)
    assert found["out"]["kernel"].shape == (3, 64, width)
    # One matrix holds query, key and value, in this order, [out, in].
    np.testing.assert_array_equal(
        found["key"]["kernel"].reshape(width, width), state["blocks.0.attn.qkv.weight"][192:384].T
    )


def test_a_head_of_other_classes_stays_the_nets_own(tmp_path):
    model = models.create("vit_tiny", 7, **SMALL)
    images = images_of("timm_vit")
    own = model.init(jax.random.key(0), images)
    loaded = weights.load(written("timm_vit", tmp_path), like=own)
    with pytest.raises(ValueError, match=r"params/head/bias has shape \(5,\), wanted \(7,\)"):
        load_float(own, loaded)
    with pytest.raises(ValueError, match="fresh is 'haed' and matches no layer; there are block0"):
        load_float(own, loaded, fresh="haed")
    both = flatten(load_float(own, loaded, fresh="head"))
    for path, array in flatten(own).items():
        same = np.array_equal(both[path], array)
        assert same == path.startswith("params/head/"), path


def test_files_in_parts_are_one(tmp_path):
    _, shapes = net_of("timm_vit")
    state = state_dict("timm_vit")
    names = ["part-1.safetensors", "part-2.safetensors"]
    places = {name: names[i % 2] for i, name in enumerate(state)}
    for place in names:
        part = {name: state[name] for name in state if places[name] == place}
        (tmp_path / place).write_bytes(safetensors_bytes(part, {}))
    index = tmp_path / "model.safetensors.index.json"
    assert weights.is_source(index.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    one, parts = (
        flatten(weights.load(path, like=shapes)) for path in (written("timm_vit", tmp_path), index)
    )
    assert one.keys() == parts.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(parts[path], array)
    with pytest.raises(
        ValueError, match=r"It has part-1\.safetensors, part-2.*give the path of one"
    ):
        weights.load(tmp_path)
    for wrong, message in [
        (
            places | {"norm.scale": names[0]},
            "part-1.safetensors and it name different arrays: norm",
        ),
        (
            {**places, "norm.bias": "../x.safetensors"},
            "must name .safetensors files that lie beside it",
        ),
        ({**places, "norm.bias": 3}, "no index of shards"),
        ({}, "must name"),
    ]:
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=rf"index\.json is no file to rely on: .*{message}"):
            weights.load(index, like=shapes)
    (tmp_path / names[1]).unlink()
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"part-2\.safetensors"):
        weights.load(index, like=shapes)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blocks.0.attn.q_norm.weight", "normalized queries and keys"),
        ("fc_norm.weight", "a norm behind the pooling"),
        ("norm_pre.weight", "CLIP"),
        ("blocks.0.mlp.fc1_g.weight", "SwiGLU"),
        ("stages.0.blocks.0.mlp.grn.weight", "ConvNeXt V2"),
    ],
)
def test_parts_that_no_net_has_are_told_by_their_names(name, part):
    state = dict.fromkeys([*GOLDEN["timm_vit"]["shapes"], name], np.ones(3))
    with pytest.raises(ValueError, match=rf"They are of .*{part}.* which no net here has"):
        weights.from_torch(state)


def test_a_layout_is_near_only_where_it_knows_most_names():
    with pytest.raises(ValueError, match=r"1 of 3 .* The nearest layout is 'hf_siglip_classifier'"):
        weights.from_torch({"classifier.bias": 1, "vision_model.post_layernorm.bias": 1, "a.b": 1})
    with pytest.raises(ValueError, match=r"2 of 3 .* Layouts are resnet, timm_vit"):
        weights.from_torch({"classifier.bias": 1, "net.one.bias": 1, "net.two.bias": 1})


def test_what_does_not_fit_is_named(tmp_path):
    _, shapes = net_of("timm_vit")
    state = state_dict("timm_vit")
    extra = written("timm_vit", tmp_path, state | {"blocks.0.attn.q_norm.weight": np.ones(16)})
    with pytest.raises(
        ValueError,
        match=r"1 of 33 arrays .*layer: blocks\.0\.attn\.q_norm\.weight\. .* The nearest layout is "
        "'timm_vit', timm's ViT",
    ):
        weights.load(extra, like=shapes)
    with pytest.raises(ValueError, match=r"unknown layout 'timm_vti'.*Did you mean 'timm_vit'"):
        weights.load(extra, layout="timm_vti")
    with pytest.raises(ValueError, match=r"30 of 32 arrays .* The nearest layout is 'timm_vit'"):
        weights.load(written("timm_vit", tmp_path), layout="hf_dinov3", like=shapes)
    with pytest.raises(ValueError, match=r"like has the keys \['kernel'\]"):
        weights.load(written("timm_vit", tmp_path), like={"kernel": 0})
    odd = dict(state)
    odd["blocks.0.attn.qkv.weight"] = np.ones((95, 32), np.float32)
    with pytest.raises(ValueError, match=r"qkv\.weight has shape \(95, 32\).*3 equal parts"):
        weights.load(written("timm_vit", tmp_path, odd), like=shapes)
    odd["blocks.0.attn.qkv.weight"] = np.ones((96, 32, 1), np.float32)
    with pytest.raises(ValueError, match=r"qkv\.weight has shape \(96, 32, 1\).*\[out, in\]"):
        weights.load(written("timm_vit", tmp_path, odd), like=shapes)
    missing = {name: array for name, array in state.items() if name != "norm.bias"}
    with pytest.raises(ValueError, match="missing params/norm/bias"):
        load_float(shapes, weights.load(written("timm_vit", tmp_path, missing), like=shapes))


def test_a_text_tower_is_left_out():
    state = state_dict("hf_siglip_classifier")
    text = {"text_model.encoder.layers.0.mlp.fc1.bias": np.ones(3), "logit_scale": np.ones(1)}
    found = [flatten(weights.from_torch(each)) for each in (state, state | text)]
    assert found[0].keys() == found[1].keys()


def test_positions_of_another_grid_ask_for_it(tmp_path):
    model = models.create("dinov2_small", 5, **SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images_of("timm_dinov2"))
    path = written("timm_dinov2", tmp_path)
    with pytest.raises(
        ValueError, match=r"17 tokens .* 1370; build the net with grid=4 and pos.*'all'"
    ):
        weights.load(path, like=shapes)
    state = state_dict("timm_dinov2")
    state["pos_embed"] = state["pos_embed"][:, :16]
    path = written("timm_dinov2", tmp_path, state)
    with pytest.raises(ValueError, match=r"16 tokens .* with grid=4 and positions='patches'"):
        weights.load(path, like=shapes)
    state["pos_embed"] = state["pos_embed"][:, :13]
    path = written("timm_dinov2", tmp_path, state)
    with pytest.raises(ValueError, match=r"13 tokens .* patches is not square, or another net's"):
        weights.load(path, like=shapes)
    # Where the tokens differ, no grid helps: they are what is named.
    _, shapes = net_of("timm_vit")
    loaded = weights.load(written("timm_deit_distilled", tmp_path), like=shapes)
    with pytest.raises(ValueError, match="unexpected params/token_distilled"):
        load_float(shapes, loaded)


def test_resampling_keeps_constants_and_the_grid_itself():
    for antialias in (False, True):
        np.testing.assert_array_equal(bicubic(5, 5, antialias=antialias), np.eye(5))
        for old, new in ((7, 3), (3, 7), (37, 16)):
            rows = bicubic(old, new, antialias=antialias).sum(1)
            np.testing.assert_allclose(rows, 1, rtol=1e-12)
