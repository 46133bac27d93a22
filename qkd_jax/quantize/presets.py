"""Named sets of rules, and the reading of rules from plain data.

A config says `rules="w2a2"` or gives a tuple of rule dicts:

    ({"pattern": "stem", "weight": {"bits": 8}, "input": {"bits": 8, "symmetric": False}}, ...)

Add a preset as one entry of PRESETS: a function from no arguments to such a tuple, or the tuple.
`w<k>a<k>` is understood for any widths, listed or not; `w<k>a<k>:<quantizer>` trains with any key
of QUANTIZERS; `w<k>a<k>:static` and `w<k>a<k>:dynamic` are for nets that are not trained any more,
with `:tensor`, `:channel` or a group size behind; `int<k>_weight_only:<group size>` as it says;
`w<k>a<k>:integer` is for nets that run on integers from end to end, and `w<k>a<k>:fused` for
engines that add a shortcut to a convolution's sums before they round (OpenVINO): what only goes
into a sum, and the logits, have no grid of their own.

What a preset cannot know is the model. Given it, `rules` makes inputs that may be negative (behind
a LayerNorm, a GELU, a linear bottleneck) signed, and finds the ends of a net that does not call
them "stem" and "head". Configs always give it.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from qkd_jax import checks
from qkd_jax.numerics import Spec
from qkd_jax.quantize.grid_sites import GridSites, LayerInputs, find_grid_sites
from qkd_jax.quantize.rules import Rule
from qkd_jax.quantizers import QUANTIZERS, facts

RuleDicts = tuple[Mapping[str, Any], ...]
KINDS = ("static", "dynamic")
INTEGER, FUSED = "integer", "fused"


def pair(
    quantizer: str, weight_bits: int, input_bits: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the inner layers' weights and of their inputs, for a net of one quantizer.

    What the quantizer's module states (its `PRESET`) stands over its own name.

    Raises:
        ValueError: an unknown quantizer.
    """
    if quantizer not in QUANTIZERS:
        raise checks.unknown("quantizer of a rules preset", quantizer, QUANTIZERS)
    stated = facts(quantizer)

    def fields(operand: str, bits: int) -> dict[str, Any]:
        own = stated.preset if bits != 8 else stated.preset_8_bits
        return {"quantizer": quantizer} | dict(own.get(operand, {}))

    return fields("weight", weight_bits), fields("input", input_bits)


def low_bit(
    weight_bits: int, input_bits: int, *, quantizer: str = "lsq", ternary: bool = False
) -> RuleDicts:
    """Rules of low-bit training: one quantizer everywhere, the first and last layer LSQ at 8 bits.

    The net's own input has both signs and a fixed distribution, so it is affine and not learned;
    every other input follows a ReLU and is unsigned. Steps are per tensor, as in the recipe.

    Args:
        weight_bits: bits of the inner layers' weights.
        input_bits: bits of the inner layers' inputs.
        quantizer: a key of QUANTIZERS.
        ternary: weights in {-1, 0, 1} times the step: 2 bits, narrow range.
    """
    weight, inputs = pair(quantizer, weight_bits, input_bits)
    inner = dict(bits=weight_bits, **weight)
    if ternary:
        inner["narrow_range"] = True
    # Not from the range: an 8-bit step whose outermost weights sit on the last code is pushed by
    # 127 times their gradient, and ran away within ten steps of distillation.
    end = dict(bits=8, quantizer="lsq")
    return (
        dict(pattern="stem|dense1", weight=end, input=dict(bits=8, signed=False, symmetric=False)),
        dict(pattern="head", weight=end, input=dict(bits=8, quantizer="lsq", signed=False)),
        dict(pattern=".*", weight=inner, input=dict(bits=input_bits, signed=False) | inputs),
    )


def post_training(
    weight_bits: int, input_bits: int, *, granularity: str | int = "channel", dynamic: bool = False
) -> RuleDicts:
    """Rules of quantization after training: uniform grids, inputs affine, the ends at 8 bits.

    Ranges come from `calibrate` and its observer ("static"), or, `dynamic`, those of the inputs
    from each row of the input as it comes, so that no calibration data are needed and the weights
    alone are prepared ahead of time.

    Args:
        weight_bits: bits of the inner layers' weights.
        input_bits: bits of the inner layers' inputs.
        granularity: of the weights: "channel", "tensor", or a group size.
        dynamic: dynamic input ranges, one a token (a row, a position of a sequence; for a
            convolution of images an example).
    """
    where = dict(dynamic=True, granularity="token") if dynamic else {}

    def inputs(bits: int) -> dict[str, Any]:
        return dict(bits=bits, signed=False, symmetric=False, **where)

    end = dict(bits=max(weight_bits, 8), granularity=granularity)
    ends = dict(weight=end, input=inputs(max(input_bits, 8)))
    return (
        dict(pattern="stem|dense1", **ends),
        dict(pattern="head", **ends),
        dict(
            pattern=".*",
            weight=dict(bits=weight_bits, granularity=granularity),
            input=inputs(input_bits),
        ),
    )


def weight_only(bits: int, *, granularity: str | int = "channel") -> RuleDicts:
    """Rules that quantize weights and leave every product in float: smaller, not faster.

    Args:
        bits: bits of the weights.
        granularity: "channel", "tensor", or a group size; int4 weights of language models have
            groups of 32 to 128. Fitted to a model, layers whose contraction axis it does not divide
            have one scale a channel.
    """
    return (dict(pattern=".*", weight=dict(bits=bits, granularity=granularity)),)


def block_scaled(bits: int, scale_format: str, *, size: int, quantizer: str = "float") -> RuleDicts:
    """Rules of weights and inputs in blocks with small scales: MX and NVFP4.

    The blocks of inputs have scales of every call. Fitted to a model, layers whose contraction axis
    the blocks do not divide have one scale a channel and a token, and attention's own products stay
    in float.

    Args:
        bits: of an element.
        scale_format: "e8m0" (MX) or "e4m3fn" (NVFP4).
        size: of a block, 32 for MX and 16 for NVFP4.
        quantizer: "float", or "uniform" for MXINT8.
    """
    spec = dict(
        bits=bits,
        quantizer=quantizer,
        granularity=size,
        options={"scale_format": scale_format},
    )
    return (dict(pattern=".*", weight=spec, input=spec | dict(dynamic=True)),)


PRESETS: dict[str, RuleDicts] = {
    "dynamic": post_training(8, 8, dynamic=True),
    "static": post_training(8, 8),
    "int8_weight_only": weight_only(8),
    "fp8": (
        dict(
            pattern=".*",
            weight=dict(bits=8, quantizer="float", granularity="channel"),
            input=dict(bits=8, quantizer="float"),
        ),
    ),
    "int4_weight_only": weight_only(4, granularity=32),
    "nf4": (dict(pattern=".*", weight=dict(bits=4, quantizer="codebook", granularity=64)),),
    "mxfp8": block_scaled(8, "e8m0", size=32),
    "mxfp6": block_scaled(6, "e8m0", size=32),
    "mxfp4": block_scaled(4, "e8m0", size=32),
    "mxint8": block_scaled(8, "e8m0", size=32, quantizer="uniform"),
    "nvfp4": block_scaled(4, "e4m3fn", size=16),
    "float": (),
    "w8a8": low_bit(8, 8),
    "w4a4": low_bit(4, 4),
    "w3a3": low_bit(3, 3),
    "w2a2": low_bit(2, 2),
    "ternary": low_bit(2, 2, ternary=True),
}


def rules(
    given: str | Iterable[Mapping[str, Any]],
    *,
    reduce_range: bool = False,
    model: nn.Module | None = None,
    images: Any = None,
    **kwargs: Any,
) -> tuple[Rule, ...]:
    """Builds rules from a preset's name or from rule dicts.

    Args:
        given: a name in PRESETS, "w<k>a<k>", or dicts with the fields of `Rule`, whose `weight`,
            `input` and `output` are dicts with the fields of `Spec`.
        reduce_range: give 8-bit weights 7 bits. x86 engines without VNNI add pairs of products in
            16 bits, which saturate with 8-bit weights: a wrong result without a warning.
        model: the model that a preset is for; rule dicts are taken as they are.
        images: example input of the model, or its shape: one argument, any pytree, or a tuple of
            positional arguments as for `calibrate`; None where the keywords hold every input.
        **kwargs: further arguments of the model's call, as for `calibrate`: `train=False`, masks,
            `method`.

    Returns:
        The rules, in order.

    Raises:
        ValueError: an unknown preset, field or value; ":integer" or ":fused" without a model; a
            model that is called otherwise, or would run in training mode.
    """
    if model is None and kwargs:
        raise ValueError(
            f"{', '.join(map(repr, sorted(kwargs)))} came without a model; keywords other than "
            "reduce_range, model and images are arguments of the model's call. Give model=."
        )
    if isinstance(given, str):
        name, given = given, _preset(given)
        ending = name.rpartition(":")[2]
        sited = ending if ending in (INTEGER, FUSED) else ""
        if model is not None and images is None and not kwargs:
            raise ValueError("model came without images; give an example batch, or its shape.")
        if model is not None and given:
            given = _fitted(given, find_grid_sites(model, images, **kwargs), sited)
        elif sited:
            raise ValueError(
                f"rules preset {name!r} depends on the model's sums and pools; give model=<the "
                "linen module> and images=<an example batch>."
            )
    return tuple(_rule(index, fields, reduce_range) for index, fields in enumerate(given))


def _preset(name: str) -> RuleDicts:
    if name in PRESETS:
        return PRESETS[name]
    form = re.fullmatch(r"w(\d+)a(\d+)(?::(\w+))?(?::(\w+))?", name)
    grouped = re.fullmatch(r"int(\d+)_weight_only:(\w+)", name)
    if grouped:
        checks.integer_in(f"bits of rules {name!r}", int(grouped[1]), 2, 8)
        return weight_only(int(grouped[1]), granularity=_granularity(name, grouped[2]))
    kind = form[3] or "lsq" if form else ""
    if form is None or (form[4] and kind not in KINDS):
        forms = ["w<k>a<k>", "w<k>a<k>:<quantizer>", "w<k>a<k>:static:<granularity>"]
        forms += [f"w<k>a<k>:{INTEGER}", f"w<k>a<k>:{FUSED}"]
        raise checks.unknown("rules preset", name, [*PRESETS, *forms])
    allowed = [*KINDS, INTEGER, FUSED, *QUANTIZERS]
    if kind not in allowed:
        raise checks.unknown("form or quantizer of a rules preset", kind, allowed)
    bits = [int(form[1]), int(form[2])]
    fewest = facts(kind).min_bits if kind in QUANTIZERS else 2
    for operand, value in zip(("weight", "input"), bits, strict=True):
        checks.integer_in(f"{operand} bits of rules {name!r}", value, fewest, 8)
    if kind in KINDS:
        granularity = _granularity(name, form[4] or "channel")
        return post_training(*bits, granularity=granularity, dynamic=kind == "dynamic")
    return low_bit(*bits, quantizer="lsq" if kind in (INTEGER, FUSED) else kind)


def _fitted(dicts: RuleDicts, found: GridSites, sited: str) -> RuleDicts:
    """Fits a preset to a model: rules for the layers that differ stand before the general ones.

    `sited`: INTEGER gives every site a grid, FUSED those that a layer reads or a pool, "" none.
    """
    if not found.layers:  # none has an end; what may remain are tables, which ".*" reaches
        dicts = tuple(fields for fields in dicts if fields["pattern"] == ".*")
    dicts = tuple(_ends_by_order(fields, found) for fields in dicts)
    sites = {
        site.path: site
        for site in found.sites
        if sited == INTEGER or (sited == FUSED and (site.readers or site.why == "pool"))
    }
    special: list[dict[tuple, list[str]]] = [{} for _ in dicts]
    fields_of: dict[tuple, dict[str, Any]] = {}
    outputs: dict[tuple, list[str]] = {}
    planned: dict[str, dict[str, Any]] = {}
    bits: dict[str, int] = {}  # of each layer's input
    layers = {layer.path: layer for layer in found.layers}
    for path in dict.fromkeys([*layers, *found.summed]):  # tables have no product: no `LayerInputs`
        index = next((i for i, d in enumerate(dicts) if re.fullmatch(d["pattern"], path)), -1)
        if index < 0:
            continue
        layer, plain = layers.get(path), {k: v for k, v in dicts[index].items() if k != "pattern"}
        fields = plain if layer is None else _signed(dicts[index], layer)
        planned[path] = fields = _grouped(fields, found.summed.get(path))
        if layer is not None:
            bits[path] = (dicts[index].get("input") or {}).get("bits", 8)
            if layer.source in sites and path in sites[layer.source].readers:
                fields["input"] = None
            if path in sites:
                fields["output"] = _output(sites[path].unsigned, 8)
        if fields != plain:
            key = (index, repr(sorted(fields.items())))
            special[index].setdefault(key, []).append(path)
            fields_of[key] = fields
    for site in sites.values():
        if site.path not in planned:
            width = max([bits.get(path, 8) for path in site.readers], default=8)
            outputs.setdefault((site.unsigned, width), []).append(site.path)
    result = [dict(pattern=_any(paths), output=_output(*key)) for key, paths in outputs.items()]
    for fields, groups in zip(dicts, special, strict=True):
        result += [dict(pattern=_any(paths), **fields_of[key]) for key, paths in groups.items()]
        if fields["pattern"] == ".*" or any(
            re.fullmatch(fields["pattern"], layer.path)
            and not any(re.fullmatch(rule["pattern"], layer.path) for rule in result)
            for layer in found.layers
        ):
            result.append(dict(fields))
    return tuple(result)


def _any(paths: Iterable[str]) -> str:
    return "|".join(map(re.escape, paths))


def _output(unsigned: bool, bits: int) -> dict[str, Any]:
    # The whole range of the type: engines have no kernel that also cuts off the lowest code.
    return dict(bits=bits, quantizer="lsq", signed=not unsigned, narrow_range=False)


def _ends_by_order(fields: Mapping[str, Any], found: GridSites) -> Mapping[str, Any]:
    """A rule for the net's ends that matches no layer takes the first or the last one instead."""
    paths = [layer.path for layer in found.layers]
    pattern = fields["pattern"]
    if any(re.fullmatch(pattern, path) for path in paths) or not paths:
        return fields
    ends = {"stem": paths[0], "head": paths[-1]}
    return {**fields, "pattern": _any(ends[p] for p in pattern.split("|") if p in ends)}


def _signed(fields: Mapping[str, Any], layer: LayerInputs) -> dict[str, Any]:
    """A rule's fields for one layer, its inputs signed where they may be negative."""
    out = {k: v for k, v in fields.items() if k != "pattern"}
    spec = out.get("input")
    if not spec or spec.get("signed", True) or not spec.get("symmetric", True):
        return out
    signed = {**spec, "signed": True, "narrow_range": False}
    if "quantizer" in spec and not facts(spec["quantizer"]).signed_inputs:
        signed["quantizer"] = "lsq"
    operands = layer.unsigned
    if not operands.get("input", True):
        out["input"] = signed
    if "other" in operands and operands["other"] != operands["input"]:
        out["other"] = spec if operands["other"] else signed
    return out


def _grouped(fields: dict[str, Any], summed: int | None) -> dict[str, Any]:
    """A rule's fields for one layer, whose groups do not fit: per channel, and inputs per token.

    `summed` is None for attention's products, which have no weight: blocks leave them in float.
    """
    fitted = dict(fields)
    for operand, otherwise in (("weight", "channel"), ("input", "token")):
        spec = fields.get(operand) or {}
        size = spec.get("granularity")
        if not isinstance(size, int) or (summed and summed % size == 0):
            continue
        if summed is not None:
            fitted[operand] = {**spec, "granularity": otherwise}
        elif operand == "input":
            fitted.update(input=None, weight=None)
    return fitted


def _granularity(name: str, text: str) -> str | int:
    if text.isdigit():
        return int(text)
    checks.one_of(f"granularity of rules {name!r}", text, ("tensor", "channel"))
    return text


def _rule(index: int, fields: Mapping[str, Any], reduce_range: bool) -> Rule:
    where = f"rules[{index}]"
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"{where} is {fields!r}; it must be a dict such as "
            "{'pattern': 'stem', 'weight': {'bits': 8}}."
        )
    known = [f.name for f in dataclasses.fields(Rule)]
    for key in fields:
        if key not in known:
            raise checks.unknown(f"field of {where}", key, known)
    if "pattern" not in fields:
        raise ValueError(f"{where} has no pattern; add a regular expression for whole layer paths.")
    specs = {k: _spec(f"{where}.{k}", v) for k, v in fields.items() if k != "pattern" and v}
    if reduce_range and "weight" in specs and specs["weight"].bits == 8:
        specs["weight"] = dataclasses.replace(specs["weight"], bits=7)
    return Rule(fields["pattern"], **specs)


def _spec(where: str, fields: Mapping[str, Any]) -> Spec:
    known = [f.name for f in dataclasses.fields(Spec)]
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no field {key!r}; it has {', '.join(known)}.{hint}")
    if "bits" not in fields:
        raise ValueError(f"{where} has no bits; add bits=<1 to 16>.")
    return Spec(**fields)
