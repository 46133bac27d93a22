"""Makes vision.json: outputs of timm's, torchvision's and Hugging Face's nets on formula weights.

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 numpy
    HF_HUB_OFFLINE=1 python tests/golden/make_vision.py

Every net is its library's own, small. Only names (those of the file that `save_pretrained` or
`state_dict` gives), shapes and outputs are stored: `fill` gives the weights here and in the test,
from integers. `parameters` has the sizes of the published nets for 1000 classes.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchConvNeXt

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from formula_weights import fill

OUT = pathlib.Path(__file__).with_name("vision.json")
SQUARE, WIDE, LARGE = (2, 3, 32, 32), (2, 3, 24, 48), (2, 3, 64, 64)
ODD = (2, 3, 43, 75)  # neither 4 nor 2 divide what ConvNeXt cuts into patches

TIMM = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
HIDDEN = dict(intermediate_size=128)
DINOV3 = TIMM | dict(
    global_pool="token",
    init_values=1.0,
    qkv_bias=True,
    rope_type="dinov3",
    rope_temperature=100,
    rope_rotate_half=True,
    use_rot_pos_emb=True,
    use_abs_pos_emb=False,
    num_reg_tokens=4,
    use_fc_norm=False,
    dynamic_img_size=True,
    norm_layer=lambda width, **kwargs: torch.nn.LayerNorm(width, eps=1e-5, **kwargs),
)
CONVNEXT = dict(depths=(1, 1, 2, 1), num_classes=5)
BLOCKS = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)]


def siglip():
    """The classifier of transformers; its vision tower alone has the attention pooling."""
    config = transformers.SiglipConfig(vision_config={**HF, **HIDDEN}, num_labels=5)
    return transformers.SiglipForImageClassification(config)


# name -> (net, shape of the images, what of its output)
NETS = {
    "timm_vit": (lambda: VisionTransformer(**TIMM), SQUARE, None),
    "timm_deit_distilled": (lambda: VisionTransformerDistilled(**TIMM), SQUARE, None),
    "timm_dinov2": (
        lambda: VisionTransformer(**TIMM, init_values=1.0, dynamic_img_size=True),
        WIDE,
        None,
    ),
    "timm_dinov2_registers": (
        lambda: VisionTransformer(
            **TIMM, init_values=1.0, reg_tokens=4, no_embed_class=True, dynamic_img_size=True
        ),
        WIDE,
        None,
    ),
    "timm_dinov3": (
        lambda: Eva(**DINOV3),
        WIDE,
        None,
    ),
    "timm_dinov3_no_bias": (lambda: Eva(**{**DINOV3, "qkv_bias": False}), WIDE, None),
    "timm_siglip": (
        lambda: VisionTransformer(**TIMM, global_pool="map", class_token=False),
        SQUARE,
        None,
    ),
    "timm_convnext": (lambda: ConvNeXt(dims=(8, 16, 24, 32), **CONVNEXT), LARGE, None),
    "timm_convnext_odd": (
        lambda: ConvNeXt(dims=(8, 16, 24, 32), conv_mlp=True, **CONVNEXT),
        ODD,
        None,
    ),
    "timm_tf_mobilenet_v3_small": (
        lambda: timm.create_model("tf_mobilenetv3_small_100", num_classes=5),
        LARGE,
        None,
    ),
    "timm_so400m": (
        lambda: VisionTransformer(
            **TIMM,
            global_pool="map",
            class_token=False,
            act_layer="gelu_tanh",
            mlp_ratio=3.7362,
        ),
        SQUARE,
        None,
    ),
    "timm_mobilenet_v3_small": (
        lambda: timm.create_model("mobilenetv3_small_100", num_classes=5),
        LARGE,
        None,
    ),
    "timm_mobilenet_v3_large": (
        lambda: timm.create_model("mobilenetv3_large_100", num_classes=5),
        LARGE,
        None,
    ),
    "hf_vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**HF, **HIDDEN, num_labels=5)
        ),
        SQUARE,
        "logits",
    ),
    "hf_ijepa": (
        lambda: transformers.IJepaForImageClassification(
            transformers.IJepaConfig(**HF, **HIDDEN, num_labels=5)
        ),
        SQUARE,
        "logits",
    ),
    "hf_deit_distilled": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(**HF, **HIDDEN, num_labels=5)
        ),
        SQUARE,
        "logits",
    ),
    "hf_dinov2": (
        lambda: transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(**HF, num_labels=5)
        ),
        WIDE,
        "logits",
    ),
    "hf_dinov2_registers": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**HF, num_labels=5)
        ),
        WIDE,
        "logits",
    ),
    "hf_dinov3": (
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**HF, **HIDDEN, num_register_tokens=4)
        ),
        WIDE,
        "pooler_output",
    ),
    "hf_siglip": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF, **HIDDEN)),
        SQUARE,
        "pooler_output",
    ),
    "hf_siglip_classifier": (siglip, SQUARE, "logits"),
    "hf_convnext": (
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(
                hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5
            )
        ),
        LARGE,
        "logits",
    ),
    "torchvision_vit": (
        lambda: torchvision.models.VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=32,
            mlp_dim=128,
            num_classes=5,
        ),
        SQUARE,
        None,
    ),
    "torchvision_convnext": (
        lambda: TorchConvNeXt(BLOCKS, num_classes=5),
        LARGE,
        None,
    ),
    "torchvision_mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        LARGE,
        None,
    ),
    "torchvision_mobilenet_v3_large": (
        lambda: torchvision.models.mobilenet_v3_large(num_classes=5),
        LARGE,
        None,
    ),
}
# A model of ours -> timm's name of the same net.
PUBLISHED = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov3_small": "vit_small_patch16_dinov3_qkvb",
    "siglip_base": "vit_base_patch16_siglip_224",
    "convnext_tiny": "convnext_tiny",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
}


def is_counter(name):
    return name.endswith("num_batches_tracked")


def with_formula_weights(net):
    """Returns (net, shapes by the names of its file); the file is written and read again."""
    if not isinstance(net, transformers.PreTrainedModel):
        shapes = {n: list(a.shape) for n, a in net.state_dict().items() if not is_counter(n)}
        state = {n: torch.from_numpy(fill(n, s, i)) for i, (n, s) in enumerate(shapes.items())}
        net.load_state_dict(state, strict=False)
        return net, shapes
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        path = pathlib.Path(folder, "model.safetensors")
        shapes = {n: list(a.shape) for n, a in safetensors.torch.load_file(path).items()}
        state = {n: torch.from_numpy(fill(n, s, i)) for i, (n, s) in enumerate(shapes.items())}
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        return type(net).from_pretrained(folder), shapes


def main():
    found = {
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, timm, transformers)}
    }
    for name, (make, shape, output) in NETS.items():
        net, shapes = with_formula_weights(make().eval())
        net = net.eval().double()
        images = torch.from_numpy(fill("images.weight", (shape[0], 1, *shape[1:]), 0)[:, 0]) * 30
        with torch.no_grad():
            values = net(images.double())
        values = (values if output is None else getattr(values, output)).numpy()
        found[name] = {
            "images": list(shape),
            "shapes": shapes,
            "output": np.round(values, 9).tolist(),
        }
        print(name, len(shapes), values[0, :4], values.std())
    found["parameters"] = {}
    for ours, theirs in PUBLISHED.items():
        with torch.device("meta"):
            net = timm.create_model(theirs, num_classes=1000)
        found["parameters"][ours] = sum(p.numel() for p in net.parameters())
    OUT.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
