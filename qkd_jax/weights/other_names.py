"""The layouts of other libraries: their names of layers and the paths of the same layers here.

    timm's blocks.0.attn.qkv     block0/attention/{query, key, value}
    torchvision's features.3.1.block.0     stage2_block1/depthwise

To read another family, add a `Layout` to `LAYOUTS`; its kinds of layers are those of
`qkd_jax.weights.layouts`. The names are those of the files that the libraries write: transformers 5
names some layers otherwise in memory.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

Layers = tuple[tuple[str, str, str], ...]
_compiled = functools.cache(re.compile)  # these are more patterns than `re` keeps


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one library for the nets of one family.

    Attributes:
        title: whose nets these are, for messages.
        layers: (regular expression of a layer's whole name, its path here, its kind).
        arrays: (regular expression of an array's whole name, path here, kind), for parameters that
            are no layer's.
        left_out: regular expression of arrays that the net does not need.
    """

    title: str
    layers: Layers
    arrays: Layers = ()
    left_out: str = r"(?!)"

    def layer(self, name: str) -> tuple[str, str] | None:
        """Returns (path here, kind) of a layer."""
        return _first(self.layers, name)

    def array(self, name: str) -> tuple[str, str] | None:
        """Returns (path here, kind) of an array that is no layer's."""
        return _first(self.arrays, name)


def _first(table: Layers, name: str) -> tuple[str, str] | None:
    for pattern, path, kind in table:
        if match := _compiled(pattern).fullmatch(name):
            return path.format(*match.groups()), kind
    return None


RESNET = Layout(
    "the ResNets of torchvision, timm and RepDistiller",
    (
        (r"conv1", "stem", "conv"),
        (r"bn1", "stem_bn", "norm"),
        (r"layer(\d+)\.(\d+)\.conv(\d+)", "stage{}_block{}/conv{}", "conv"),
        (r"layer(\d+)\.(\d+)\.bn(\d+)", "stage{}_block{}/bn{}", "norm"),
        (r"layer(\d+)\.(\d+)\.downsample\.0", "stage{}_block{}/shortcut", "conv"),
        (r"layer(\d+)\.(\d+)\.downsample\.1", "stage{}_block{}/shortcut_bn", "norm"),
        (r"fc", "head", "dense"),
    ),
)

TIMM_VIT = Layout(
    "timm's ViT, DeiT, DINOv2, DINOv3 and SigLIP",
    (
        (r"patch_embed\.proj", "stem", "conv"),
        (r"blocks\.(\d+)\.norm([12])", "block{}/norm{}", "layer_norm"),
        (r"blocks\.(\d+)\.attn\.qkv", "block{}/attention", "qkv"),
        (r"blocks\.(\d+)\.attn", "block{}/attention", "qkv_bias"),
        (r"blocks\.(\d+)\.attn\.proj", "block{}/attention/out", "out"),
        (r"blocks\.(\d+)\.mlp\.fc([12])", "block{}/mlp{}", "dense"),
        (r"norm", "norm", "layer_norm"),
        (r"attn_pool\.q", "attention_pool/attention/query", "heads"),
        (r"attn_pool\.kv", "attention_pool/attention", "kv"),
        (r"attn_pool\.proj", "attention_pool/attention/out", "out"),
        (r"attn_pool\.norm", "attention_pool/norm", "layer_norm"),
        (r"attn_pool\.mlp\.fc([12])", "attention_pool/mlp{}", "dense"),
        (r"head", "head", "dense"),
        (r"head_dist", "head_distilled", "dense"),
    ),
    (
        (r"cls_token", "token", "tokens"),
        (r"dist_token", "token_distilled", "tokens"),
        (r"reg_token", "registers", "tokens"),
        (r"pos_embed", "positions", "tokens"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", "block{}/scale{}", "vector"),
        (r"blocks\.(\d+)\.gamma_([12])", "block{}/scale{}", "vector"),
        (r"attn_pool\.latent", "attention_pool/probe", "tokens"),
    ),
    r"mask_token",
)

_VIT = r"(?:vit\.|deit\.|ijepa\.|dinov2\.|dinov2_with_registers\.)?"
_BLOCK = _VIT + r"encoder\.layer\.(\d+)\."
HF_VIT = Layout(
    "Hugging Face's ViT, DeiT, I-JEPA and DINOv2",
    (
        (_VIT + r"embeddings\.patch_embeddings\.projection", "stem", "conv"),
        (_BLOCK + r"(?:layernorm_before|norm1)", "block{}/norm1", "layer_norm"),
        (_BLOCK + r"(?:layernorm_after|norm2)", "block{}/norm2", "layer_norm"),
        (
            _BLOCK + r"attention\.attention\.(query|key|value)",
            "block{}/attention/{}",
            "heads",
        ),
        (_BLOCK + r"attention\.output\.dense", "block{}/attention/out", "out"),
        (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)", "block{}/mlp1", "dense"),
        (_BLOCK + r"(?:output\.dense|mlp\.fc2)", "block{}/mlp2", "dense"),
        (_VIT + r"layernorm", "norm", "layer_norm"),
        (r"(?:cls_)?classifier", "head", "dense"),
        (r"distillation_classifier", "head_distilled", "dense"),
    ),
    (
        (_VIT + r"embeddings\.cls_token", "token", "tokens"),
        (_VIT + r"embeddings\.distillation_token", "token_distilled", "tokens"),
        (_VIT + r"embeddings\.register_tokens", "registers", "tokens"),
        (_VIT + r"embeddings\.position_embeddings", "positions", "tokens"),
        (_BLOCK + r"layer_scale([12])\.lambda1", "block{}/scale{}", "vector"),
    ),
    _VIT + r"(?:embeddings\.mask_token|pooler\.dense\.(?:weight|bias))",
)

HF_DINOV3 = Layout(
    "Hugging Face's DINOv3 ViT",
    (
        (r"embeddings\.patch_embeddings", "stem", "conv"),
        (r"layer\.(\d+)\.norm([12])", "block{}/norm{}", "layer_norm"),
        (r"layer\.(\d+)\.attention\.q_proj", "block{}/attention/query", "heads"),
        (r"layer\.(\d+)\.attention\.k_proj", "block{}/attention/key", "heads"),
        (r"layer\.(\d+)\.attention\.v_proj", "block{}/attention/value", "heads"),
        (r"layer\.(\d+)\.attention\.o_proj", "block{}/attention/out", "out"),
        (r"layer\.(\d+)\.mlp\.up_proj", "block{}/mlp1", "dense"),
        (r"layer\.(\d+)\.mlp\.down_proj", "block{}/mlp2", "dense"),
        (r"norm", "norm", "layer_norm"),
    ),
    (
        (r"embeddings\.cls_token", "token", "tokens"),
        (r"embeddings\.register_tokens", "registers", "tokens"),
        (r"layer\.(\d+)\.layer_scale([12])\.lambda1", "block{}/scale{}", "vector"),
    ),
    r"embeddings\.mask_token",
)

_SIGLIP = r"(?:vision_model\.)?"
_LAYER = _SIGLIP + r"encoder\.layers\.(\d+)\."
HF_SIGLIP = Layout(
    "Hugging Face's SigLIP, its images' half",
    (
        (_SIGLIP + r"embeddings\.patch_embedding", "stem", "conv"),
        (_LAYER + r"layer_norm([12])", "block{}/norm{}", "layer_norm"),
        (_LAYER + r"self_attn\.q_proj", "block{}/attention/query", "heads"),
        (_LAYER + r"self_attn\.k_proj", "block{}/attention/key", "heads"),
        (_LAYER + r"self_attn\.v_proj", "block{}/attention/value", "heads"),
        (_LAYER + r"self_attn\.out_proj", "block{}/attention/out", "out"),
        (_LAYER + r"mlp\.fc([12])", "block{}/mlp{}", "dense"),
        (_SIGLIP + r"post_layernorm", "norm", "layer_norm"),
        (_SIGLIP + r"head\.attention", "attention_pool/attention", "qkv"),
        (_SIGLIP + r"head\.attention\.out_proj", "attention_pool/attention/out", "out"),
        (_SIGLIP + r"head\.layernorm", "attention_pool/norm", "layer_norm"),
        (_SIGLIP + r"head\.mlp\.fc([12])", "attention_pool/mlp{}", "dense"),
    ),
    (
        (_SIGLIP + r"embeddings\.position_embedding\.weight", "positions", "tokens"),
        (_SIGLIP + r"head\.probe", "attention_pool/probe", "tokens"),
    ),
    r"text_model\..*|logit_scale|logit_bias|.*position_ids",
)

# `SiglipForImageClassification` averages the tokens: its files have the pooling, which it ignores.
HF_SIGLIP_CLASSIFIER = Layout(
    "Hugging Face's SigLIP with a classifier",
    (
        *(row for row in HF_SIGLIP.layers if not row[1].startswith("attention_pool")),
        (r"classifier", "head", "dense"),
    ),
    tuple(row for row in HF_SIGLIP.arrays if not row[1].startswith("attention_pool")),
    HF_SIGLIP.left_out + r"|" + _SIGLIP + r"head\..*",
)

_ENCODER = r"encoder\.layers\.encoder_layer_(\d+)\."
TORCHVISION_VIT = Layout(
    "torchvision's ViT",
    (
        (r"conv_proj", "stem", "conv"),
        (_ENCODER + r"ln_([12])", "block{}/norm{}", "layer_norm"),
        (_ENCODER + r"self_attention", "block{}/attention", "qkv"),
        (_ENCODER + r"self_attention\.out_proj", "block{}/attention/out", "out"),
        (_ENCODER + r"mlp\.(?:0|linear_1)", "block{}/mlp1", "dense"),
        (_ENCODER + r"mlp\.(?:3|linear_2)", "block{}/mlp2", "dense"),
        (r"encoder\.ln", "norm", "layer_norm"),
        (r"heads\.head", "head", "dense"),
    ),
    ((r"class_token", "token", "tokens"), (r"encoder\.pos_embedding", "positions", "tokens")),
)


def _stages(count: int, *rows: tuple[str, str, str]) -> Iterable[tuple[str, str, str]]:
    """Rows for each stage: STAGE is counted from 0, ODD and EVEN are torchvision's places."""
    for stage in range(count):
        places = {"STAGE": stage, "ODD": 2 * stage + 1, "EVEN": 2 * stage}
        for pattern, path, kind in rows:
            for word, place in places.items():
                pattern = pattern.replace(word, str(place))
            yield pattern, f"stage{stage + 1}{path}", kind


TIMM_CONVNEXT = Layout(
    "timm's ConvNeXt",
    (
        (r"stem\.0", "stem", "conv"),
        (r"stem\.1", "stem_norm", "layer_norm"),
        (r"head\.norm", "norm", "layer_norm"),
        (r"head\.fc", "head", "dense"),
        *_stages(
            4,
            (r"stages\.STAGE\.downsample\.0", "_norm", "layer_norm"),
            (r"stages\.STAGE\.downsample\.1", "_downsample", "conv"),
            (r"stages\.STAGE\.blocks\.(\d+)\.conv_dw", "_block{}/depthwise", "conv"),
            (r"stages\.STAGE\.blocks\.(\d+)\.norm", "_block{}/norm", "layer_norm"),
            (r"stages\.STAGE\.blocks\.(\d+)\.mlp\.fc([12])", "_block{}/mlp{}", "dense"),
        ),
    ),
    tuple(_stages(4, (r"stages\.STAGE\.blocks\.(\d+)\.gamma", "_block{}/scale", "vector"))),
)

_CONVNEXT = r"(?:convnext\.)?"
_STAGE = _CONVNEXT + r"encoder\.stages\.STAGE\."
HF_CONVNEXT = Layout(
    "Hugging Face's ConvNeXt",
    (
        (_CONVNEXT + r"embeddings\.patch_embeddings", "stem", "conv"),
        (_CONVNEXT + r"embeddings\.layernorm", "stem_norm", "layer_norm"),
        (_CONVNEXT + r"layernorm", "norm", "layer_norm"),
        (r"classifier", "head", "dense"),
        *_stages(
            4,
            (_STAGE + r"downsampling_layer\.0", "_norm", "layer_norm"),
            (_STAGE + r"downsampling_layer\.1", "_downsample", "conv"),
            (_STAGE + r"layers\.(\d+)\.dwconv", "_block{}/depthwise", "conv"),
            (_STAGE + r"layers\.(\d+)\.layernorm", "_block{}/norm", "layer_norm"),
            (_STAGE + r"layers\.(\d+)\.pwconv([12])", "_block{}/mlp{}", "dense"),
        ),
    ),
    tuple(
        _stages(4, (_STAGE + r"layers\.(\d+)\.layer_scale_parameter", "_block{}/scale", "vector"))
    ),
)

TORCHVISION_CONVNEXT = Layout(
    "torchvision's ConvNeXt",
    (
        (r"features\.0\.0", "stem", "conv"),
        (r"features\.0\.1", "stem_norm", "layer_norm"),
        (r"classifier\.0", "norm", "layer_norm"),
        (r"classifier\.2", "head", "dense"),
        *_stages(
            4,
            (r"features\.EVEN\.0", "_norm", "layer_norm"),
            (r"features\.EVEN\.1", "_downsample", "conv"),
            (r"features\.ODD\.(\d+)\.block\.0", "_block{}/depthwise", "conv"),
            (r"features\.ODD\.(\d+)\.block\.2", "_block{}/norm", "layer_norm"),
            (r"features\.ODD\.(\d+)\.block\.3", "_block{}/mlp1", "dense"),
            (r"features\.ODD\.(\d+)\.block\.5", "_block{}/mlp2", "dense"),
        ),
    ),
    tuple(_stages(4, (r"features\.ODD\.(\d+)\.layer_scale", "_block{}/scale", "vector"))),
)


def _mobilenet_v3(library: str, size: str, blocks: tuple[int, ...]) -> Layout:
    """The layout of a MobileNetV3 whose stages have so many blocks."""
    rows: list[tuple[str, str, str]] = []

    def pair(conv: str, norm: str, path: str) -> None:
        rows.extend([(conv, path, "conv"), (norm, f"{path}_bn", "norm")])

    places = [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]
    timm = library == "timm"
    pair(*(("conv_stem", "bn1") if timm else (r"features\.0\.0", r"features\.0\.1")), "stem")
    for number, (stage, block) in enumerate(places, 1):
        # The first block has no `expand`, so its layers are counted from the depthwise one.
        here, first = f"stage{stage + 1}_block{block}", number == 1
        if timm:
            at = rf"blocks\.{stage}\.{block}\."
            if not first:
                pair(at + "conv_pw", at + "bn1", f"{here}/expand")
            depthwise = "bn1" if first else "bn2"
            pair(at + "conv_dw", at + depthwise, f"{here}/depthwise")
            project, norm = ("conv_pw", "bn2") if first else ("conv_pwl", "bn3")
            pair(at + project, at + norm, f"{here}/project")
            gate = at + r"se\.conv_{}"
        else:
            at = rf"features\.{number}\.block\."
            if not first:
                pair(at + r"0\.0", at + r"0\.1", f"{here}/expand")
            at_depthwise = 0 if first else 1
            pair(at + rf"{at_depthwise}\.0", at + rf"{at_depthwise}\.1", f"{here}/depthwise")
            last = rf"(?:{at_depthwise + 1}|{at_depthwise + 2})"  # a gate lies between, or none
            pair(at + rf"{last}\.0", at + rf"{last}\.1", f"{here}/project")
            gate = at + rf"{at_depthwise + 1}\.{{}}"
        names = ("reduce", "expand") if timm else ("fc1", "fc2")
        rows.extend(
            (gate.format(name), f"{here}/gate/{own}", "conv")
            for name, own in zip(names, ("reduce", "expand"), strict=True)
        )
    if timm:
        end = rf"blocks\.{len(blocks)}\.0\."
        pair(end + "conv", end + "bn1", "last")
        rows += [("conv_head", "last_dense", "dense"), ("classifier", "head", "dense")]
    else:
        end = rf"features\.{len(places) + 1}\."
        pair(end + "0", end + "1", "last")
        rows += [(r"classifier\.0", "last_dense", "dense"), (r"classifier\.3", "head", "dense")]
    return Layout(f"{library}'s MobileNetV3 {size}", tuple(rows))


_SMALL, _LARGE = (1, 2, 3, 2, 3), (1, 2, 3, 4, 2, 3)
LAYOUTS: dict[str, Layout] = {
    "resnet": RESNET,
    "timm_vit": TIMM_VIT,
    "timm_convnext": TIMM_CONVNEXT,
    "timm_mobilenet_v3_small": _mobilenet_v3("timm", "small", _SMALL),
    "timm_mobilenet_v3_large": _mobilenet_v3("timm", "large", _LARGE),
    "hf_vit": HF_VIT,
    "hf_dinov3": HF_DINOV3,
    "hf_siglip": HF_SIGLIP,
    "hf_siglip_classifier": HF_SIGLIP_CLASSIFIER,
    "hf_convnext": HF_CONVNEXT,
    "torchvision_vit": TORCHVISION_VIT,
    "torchvision_convnext": TORCHVISION_CONVNEXT,
    "torchvision_mobilenet_v3_small": _mobilenet_v3("torchvision", "small", _SMALL),
    "torchvision_mobilenet_v3_large": _mobilenet_v3("torchvision", "large", _LARGE),
}
# Names that tell of a part that no net here has -> the part, for messages.
LACKING: dict[str, str] = {
    r".*\bgrn\..*": "ConvNeXt V2's response normalization",
    r".*\.(?:weights_in|weights_out|w12|gate_proj|fc1_g)\..*": "gated (SwiGLU) perceptrons",
    r".*\b[qk]_norm\..*": "normalized queries and keys",
    r"fc_norm\..*": "a norm behind the pooling instead of before it",
    r".*\b(?:pre_layrnorm|norm_pre|pre_logits)\..*": "layers beside the blocks (CLIP, first ViTs)",
    r".*relative_position.*|.*rel_pos.*": "relative positions",
}
