"""Models: plain linen networks that know nothing of quantization, distillation or devices.

`MODELS` maps names to constructors; `create` adds every other CIFAR ResNet depth (6n + 2; 18, 34
and 50 are the nets for large images) and errors that name the nearest valid choice. To add a model,
write a linen module in a file of this package and give it a line in `MODELS`; the tests in
`tests/models/test_models.py` are parametrised over the table. The contract:

* `MODELS[name](num_classes=..., **fields)` is an unbound linen module, hashable, called as
  `model(images, train=False)` with images [batch, height, width, channels], floating, normalised
  (`checks.images` refuses others with a ValueError, as fields out of range are refused); it returns
  logits [batch, num_classes] in float32 or wider.
* Layers have explicit names that read well in a path ("stage1_block0/conv1"); the last product is
  "head", the first one "stem" where the architecture has one.
* The field `dtype` is the dtype of the computation, e.g. jnp.bfloat16 (None: that of images and
  parameters); parameters and BatchNorm's statistics stay float32.
* With `train=True` BatchNorm uses the batch's statistics and updates its running ones, collection
  "batch_stats", which must be mutable; the field `axis_name` is the mapped axis (pmap, shard_map)
  over which it takes them. Blocks have the same two fields.
* Features are sown (`features.sow_feature`) into the collection "features", which costs nothing
  unless it is mutable: `logits, aux = model.apply(variables, images, mutable="features")`, then
  `aux["features"]["stage1"][0]`. Every model names the head's input `pooled`; an activation has a
  bare name, its input the same with `_pre` (the same array where a stage ends without one).
* Optional: `model(images, train, head=False)` returns the last map or vector, the input of pooling
  and head, instead of logits, and makes no parameters of a head. `BorrowedClassifier` (SimKD) needs
  it of its body.

`components.logits_of` is a head that keeps these; `components.conv_and_norm` are layers that do.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.borrowed import BorrowedClassifier
from qkd_jax.models.convnext import ConvNeXt, ConvNeXtBlock
from qkd_jax.models.imagenet_resnet import Bottleneck, ImageNetResNet
from qkd_jax.models.mlp import MLP
from qkd_jax.models.mobilenet import InvertedResidual, MobileNet, MobileNetV2, SeparableBlock
from qkd_jax.models.mobilenet_v3 import GatedResidual, MobileNetV3
from qkd_jax.models.resnet import BasicBlock, ResNet, blocks_per_stage
from qkd_jax.models.vit import TransformerBlock, ViT

# What the published nets share; other sizes are fields: width=768, heads=12 makes a "base" net.
_VIT: dict[str, Any] = dict(
    patch=16, depth=12, mlp_ratio=4, pool="class", gelu="exact", epsilon=1e-6
)
_DINOV3: dict[str, Any] = _VIT | dict(
    epsilon=1e-5,
    layer_scale=1.0,
    registers=4,
    positions="rotary",
    biases=("query", "value", "out"),
)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(ResNet, depth=8),
    "resnet14": functools.partial(ResNet, depth=14),
    "resnet20": functools.partial(ResNet, depth=20),
    "resnet32": functools.partial(ResNet, depth=32),
    "resnet44": functools.partial(ResNet, depth=44),
    "resnet56": functools.partial(ResNet, depth=56),
    "resnet110": functools.partial(ResNet, depth=110),
    "resnet8x4": functools.partial(ResNet, depth=8, width=64, stem_width=32),
    "resnet32x4": functools.partial(ResNet, depth=32, width=64, stem_width=32),
    "resnet18": ImageNetResNet,
    "resnet34": functools.partial(ImageNetResNet, blocks=(3, 4, 6, 3)),
    "resnet50": functools.partial(ImageNetResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "mobilenet": MobileNet,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_small": MobileNetV3,
    "mobilenet_v3_large": functools.partial(MobileNetV3, size="large"),
    "convnext_tiny": ConvNeXt,
    "vit": ViT,
    "vit_tiny": functools.partial(ViT, width=192, heads=3, **_VIT),
    "vit_small": functools.partial(ViT, width=384, heads=6, **_VIT),
    "vit_base": functools.partial(ViT, width=768, heads=12, **_VIT),
    "deit_small_distilled": functools.partial(ViT, width=384, heads=6, distilled=True, **_VIT),
    "dinov2_small": functools.partial(
        ViT, width=384, heads=6, layer_scale=1.0, grid=37, **_VIT | dict(patch=14)
    ),
    "dinov3_small": functools.partial(ViT, width=384, heads=6, **_DINOV3),
    "siglip_base": functools.partial(
        ViT, width=768, heads=12, **_VIT | dict(pool="attention", gelu="tanh")
    ),
    "mlp": MLP,
}

__all__ = [
    "MLP",
    "MODELS",
    "BasicBlock",
    "BorrowedClassifier",
    "Bottleneck",
    "ConvNeXt",
    "ConvNeXtBlock",
    "GatedResidual",
    "ImageNetResNet",
    "InvertedResidual",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3",
    "ResNet",
    "SeparableBlock",
    "TransformerBlock",
    "ViT",
    "create",
]


def create(name: str, num_classes: int, **fields: Any) -> nn.Module:
    """Builds a model by name.

    Args:
        name: a key of `MODELS`, or "resnet<depth>" for any other depth of the form 6n + 2.
        num_classes: number of logits, at least 1.
        **fields: fields of the module, such as `width=8`; lists become tuples and a `dtype` may be
            a string like "bfloat16", so that values read from a JSON file work.

    Returns:
        An unbound linen module.

    Raises:
        ValueError: for an unknown name or field, with the nearest one that exists, or a depth that
            is not 6n + 2.
    """
    checks.integer_in("num_classes", num_classes, 1)
    build = MODELS.get(name)
    if build is None:
        depth = re.fullmatch(r"resnet(\d+)", name)
        if depth is None:
            raise checks.unknown("model", name, [*MODELS, "resnet<6n+2>"])
        blocks_per_stage(int(depth[1]))
        build = functools.partial(ResNet, depth=int(depth[1]))

    module = build.func if isinstance(build, functools.partial) else build
    if dataclasses.is_dataclass(module):
        allowed = {f.name for f in dataclasses.fields(module)} - {"parent", "name", "num_classes"}
        for field in fields:
            if field not in allowed:
                raise checks.unknown(f"field of model {name!r}:", field, allowed)
    for field, value in fields.items():
        if isinstance(value, list):
            fields[field] = tuple(value)
        elif field == "dtype" and isinstance(value, str):
            fields[field] = jnp.dtype(value)
    return build(num_classes=num_classes, **fields)
